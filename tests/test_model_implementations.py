"""SiT's two implementations: the fused one is held to the eager one, plain and compiled."""

from __future__ import annotations

import pytest
import torch
from models import SMALL, batch_for, outputs_and_gradients, small_model
from tolerance import allowed, relative_error

from sra2_fast import SiT

WIDTHS = {"S": (384, 6), "B": (768, 12), "L": (1024, 16), "XL": (1152, 16)}


def twin(model: SiT, implementation: str) -> SiT:
    """The same weights, the same tensors even, in the other implementation."""
    with torch.device("meta"):
        other = SiT(**{**model.config(), "implementation": implementation})
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval()


def float64_truth(model: SiT, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """The eager model in float64 on the same weights; only the 256 features of the time stay in float32."""
    return outputs_and_gradients(twin(model, "eager").double(), (inputs[0].double(), *inputs[1:]))


def assert_no_less_accurate(
    got: dict[str, torch.Tensor], peer: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Each error at most twice the peer's and one rounding more.

    The gradient of `k_norm.bias` is left out: softmax makes it zero, all that is left of it is rounding.
    """
    assert got.keys() == peer.keys() == truth.keys()
    for name, want in truth.items():
        if name.endswith("k_norm.bias"):
            continue
        error, peer_error = (relative_error(values[name], want)[0] for values in (got, peer))
        limit = 2 * peer_error + allowed(dtype, 1, row_size=want.numel())
        assert error <= limit, f"{name} in {dtype}: relative error {error:.2e}, the eager model has {peer_error:.2e}"


@pytest.mark.parametrize("qk_norm", (False, True))
@pytest.mark.parametrize(("size", "depth"), (("S", 2), ("B", 1), ("L", 1), ("XL", 1)))
def test_fused_is_no_less_accurate_than_eager(size: str, depth: int, qk_norm: bool) -> None:
    """Outputs and gradients of both against eager in float64 on the same weights, in float32 and bf16 autocast."""
    hidden_size, num_heads = WIDTHS[size]
    sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "depth": depth, "mlp_ratio": 1.0}
    eager = small_model(**sizes, qk_norm=qk_norm, align_depth=1, projector_layers=1, implementation="eager")
    inputs = batch_for(eager.eval(), batch=2)
    fused = twin(eager, "fused")
    measured = {
        (name, autocast): outputs_and_gradients(model, inputs, autocast)
        for name, model in (("eager", eager), ("fused", fused))
        for autocast in (False, True)
    }
    truth = float64_truth(eager, inputs)
    for autocast, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        assert_no_less_accurate(measured["fused", autocast], measured["eager", autocast], truth, dtype)


def test_fused_is_the_default_and_eager_a_choice() -> None:
    assert SiT(**SMALL).implementation == "fused"
    assert SiT(**SMALL, implementation="eager").implementation == "eager"
    assert list(SiT(**SMALL).state_dict()) == list(SiT(**SMALL, implementation="eager").state_dict())


@pytest.mark.parametrize("implementation", ("eager", "fused"))
def test_compiled_without_a_graph_break_it_gives_the_same_velocity_and_gradients(implementation: str) -> None:
    model = small_model(depth=1, align_depth=1, projector_layers=1, qk_norm=True, implementation=implementation).eval()
    inputs = batch_for(model)
    want = outputs_and_gradients(model, inputs)
    truth = float64_truth(model, inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if implementation == "fused" else "aot_eager")
    got = {name.removeprefix("_orig_mod."): v for name, v in outputs_and_gradients(compiled, inputs).items()}
    assert_no_less_accurate(got, want, truth, torch.float32)
