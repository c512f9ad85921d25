"""The registry of operators: who runs an op where, and that every adapter takes what its schema says."""

from __future__ import annotations

import inspect

import pytest
import torch
from sra2_fast.kernels import cublaslt
from torch.nn.attention import SDPBackend, sdpa_kernel

from sra2_fast import backends, ops
from sra2_fast.errors import InputError
from sra2_fast.models import SiT
from sra2_fast.ops import adamw_ema, linear  # noqa: F401  (register their operators)
from sra2_fast.ops.registry import ADAPTERS, on_its_device

OPERATORS = (
    "adamw_ema_norm",
    "adamw_ema_step",
    "alignment_velocity_loss_bwd",
    "alignment_velocity_loss_fwd",
    "gated_residual_layer_norm_modulate_bwd",
    "gated_residual_layer_norm_modulate_fwd",
    "layer_norm_modulate_bwd",
    "layer_norm_modulate_fwd",
    "linear_gelu_bwd",
    "linear_gelu_fwd",
    "linear_weight_bwd",
)


def test_every_operator_is_registered_once() -> None:
    assert tuple(sorted(ADAPTERS)) == OPERATORS
    first = {name: next(iter(adapters)) for name, adapters in ADAPTERS.items()}
    assert all(first[name] == ("cublaslt" if name.startswith("linear") else "triton") for name in OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_an_adapter_takes_the_arguments_of_its_schema_in_their_order(name: str) -> None:
    schema = getattr(torch.ops.sra2_fast, name).default._schema
    adapter = next(iter(ADAPTERS[name].values()))
    assert list(inspect.signature(adapter).parameters) == [argument.name for argument in schema.arguments]
    other = getattr(torch.ops.sra2_fast, f"{name}_cuda", None)
    assert (other is not None) == ("cuda c++" in ADAPTERS[name])
    if other is not None:
        assert str(other.default._schema).replace("_cuda(", "(") == str(schema)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "choose", backends.choose.__wrapped__)


def test_choose_names_the_backend_and_why_no_better_one(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(backends, "_why_not_importable", lambda name: "not installed")
    monkeypatch.setattr(backends, "_load_extension", lambda kind: (True, "loaded"))
    assert backends.choose("layer_norm_modulate", "cuda") == ("cuda c++", "triton: not installed")
    assert backends.choose("layer_norm_modulate", "cpu") == ("c++", "")
    assert backends.choose("alignment_velocity_loss", "cuda") == ("pytorch", "triton: not installed")
    assert backends.choose("adamw_ema", "mps") == ("pytorch", "")
    assert backends.fused_devices("adamw_ema") == {"cpu"}
    monkeypatch.setattr(torch.version, "cuda", None)
    no_cuda = f"torch {torch.__version__} has no CUDA"
    assert backends.choose("adamw_ema", "cuda") == ("pytorch", f"triton: {no_cuda}")


def test_attention_says_what_there_is_and_why_not_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    monkeypatch.setattr(backends, "_why_not_importable", lambda name: None if name == "flash_attn" else "not installed")
    assert backends.status()["attention on cuda"] == (
        "the fastest of flash-attn, flash, efficient, sdpa (flash-attn-3: not installed; cudnn: torch has no cuDNN)"
    )
    monkeypatch.setattr(torch.version, "cuda", None)
    assert backends.attention_backends("cuda")["flash"] == f"torch {torch.__version__} has no CUDA"
    assert backends.attention_backends("cpu") == {"sdpa": "", "matmul": ""}
    assert backends.attention_backends("cpu", is_bf16=False) == {"sdpa": "", "matmul": "needs bf16"}
    assert backends.attention_backends("mps") == {"sdpa": ""}


def test_info_is_true_where_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to say "CUDA C++ kernels" for all ops while the loss and the optimizer ran eager."""
    forget(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(backends, "_why_not_importable", lambda name: "not installed")
    monkeypatch.setattr(backends, "_load_extension", lambda kind: (True, "loaded"))
    told = backends.status()
    assert told["layer_norm_modulate on cuda"] == "cuda c++ (triton: not installed)"
    assert told["alignment_velocity_loss on cuda"] == told["adamw_ema on cuda"] == "pytorch (triton: not installed)"
    assert {f"{op} on {kind}" for op in backends.CANDIDATES for kind in ("cpu", "cuda")} <= told.keys()


def test_what_runs_without_kernels_is_said_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(backends, "_why_not_importable", lambda name: "not installed")
    monkeypatch.setattr(backends, "_load_extension", lambda kind: (True, "loaded"))
    monkeypatch.setattr(cublaslt, "why_not", lambda: None)
    assert backends.without_kernels("cpu") == ""
    assert backends.without_kernels("cuda") == "alignment_velocity_loss, adamw_ema (triton: not installed)"
    monkeypatch.setattr(backends, "_load_extension", lambda kind: (False, "not built"))
    norms = "layer_norm_modulate, gated_residual_layer_norm_modulate (triton: not installed; cuda c++: not built)"
    assert backends.without_kernels("cuda") == f"{norms}; alignment_velocity_loss, adamw_ema (triton: not installed)"
    monkeypatch.setattr(backends, "_why_not_importable", lambda name: None)
    assert backends.without_kernels("cuda") == ""  # Triton alone is enough


def small_fused() -> tuple[SiT, tuple[torch.Tensor, ...]]:
    model = SiT(input_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=3, learn_sigma=False).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.5)
    return model.requires_grad_(False), (torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([0, 1]))


@pytest.mark.skipif(not backends.fused_devices("layer_norm_modulate") >= {"cpu"}, reason="the extension is not built")
def test_forward_mode_through_the_kernels_is_refused_not_zero() -> None:
    """No input requires a gradient, so the kernel was called past autograd, and the tangent came out as zero."""
    model, (x, t, y) = small_fused()
    wanted = 'are not for the fused kernels; implementation="eager" takes them'
    with pytest.raises(InputError, match=rf"layer_norm_modulate: torch.func's transforms \(jvp, vmap, grad\) {wanted}"):
        torch.func.jvp(lambda x: model(x, t, y), (x,), (torch.ones_like(x),))
    modulation = torch.randn(2, 2, 16)
    with pytest.raises(InputError, match=r"torch.func's transforms"):
        torch.func.vmap(lambda x: ops.layer_norm_modulate(x, *modulation))(torch.randn(3, 2, 4, 16))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(InputError, match=f"forward-mode gradients {wanted}"):
        model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), t, y)
    torch.compiler.reset()
    compiled = torch.compile(lambda x, v: torch.func.jvp(lambda x: model(x, t, y), (x,), (v,)), backend="eager")
    with pytest.raises(InputError, match=r"torch.func's transforms"):
        compiled(x, torch.ones_like(x))
    eager = SiT(**{**model.config(), "implementation": "eager"}).eval().requires_grad_(False)
    eager.load_state_dict(model.state_dict())
    value, tangent = torch.func.jvp(lambda x: eager(x, t, y), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(value, model(x, t, y), rtol=1e-5, atol=1e-6)
    step = 1e-3
    numeric = (eager(x + step, t, y) - eager(x - step, t, y)) / (2 * step)
    assert float(tangent.norm()) > 0.1
    torch.testing.assert_close(tangent, numeric, rtol=1e-2, atol=1e-2 * float(numeric.abs().max()))
    with sdpa_kernel(SDPBackend.MATH):  # the one that has a batching rule
        single = torch.func.vmap(lambda x, t, y: eager(x[None], t[None], y[None])[0])(x, t, y)
    torch.testing.assert_close(single, value, rtol=1e-5, atol=1e-6)  # the labels' values were read, which vmap refuses


@pytest.mark.skipif(not backends.fused_devices("layer_norm_modulate") >= {"cpu"}, reason="the extension is not built")
def test_a_second_backward_for_one_derivative_is_refused_not_zero() -> None:
    """torch's once_differentiable cuts gradients off from their sources; asked for one of these, torch found zero."""
    model, (x, t, y) = small_fused()
    for second in (
        lambda: torch.autograd.functional.jvp(lambda x: model(x, t, y), x, torch.ones_like(x)),
        lambda: torch.autograd.functional.hessian(lambda x: model(x, t, y).square().sum(), x),
    ):
        with pytest.raises(
            RuntimeError,
            match=r'once_differentiable; implementation="eager" takes second derivatives, with sdpa_kernel',
        ):
            second()


def test_an_adapter_runs_with_the_device_of_its_first_tensor_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor on cuda:1 while cuda:0 is current: the launch went to cuda:0 with cuda:1's addresses."""
    entered: list[torch.Tensor] = []

    class DeviceOf:
        def __init__(self, tensor: torch.Tensor) -> None:
            entered.append(tensor)

        def __enter__(self) -> None:
            entered.append(torch.ones(1))

        def __exit__(self, *error: object) -> None:
            entered.append(torch.zeros(1))

    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    call = on_its_device(lambda *arguments: (len(entered), arguments))
    x = torch.randn(3)
    assert call(x, 4, 5) == (2, (x, 4, 5)) and entered[0] is x and len(entered) == 3
    assert call([x, x], 6) == (5, ([x, x], 6)) and entered[3] is x
