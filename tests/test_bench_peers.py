"""Other libraries' norms as benchmark variants: stand-ins with their signatures, for what is added around them."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from lib import cudnn_norm, op_bench, peers

from sra2_fast.ops.gated_residual_layer_norm_modulate import eager as gated_eager
from sra2_fast.ops.layer_norm_modulate import eager as norm_eager
from sra2_fast.reference import layer_norm_modulate as reference


def test_peers_are_listed_whether_or_not_they_import(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("liger", "cudnn"):
        monkeypatch.setitem(peers.PEER_MODULES, name, "no_such_module_here")
    monkeypatch.setitem(peers.PEER_MODULES, "apex", "json")
    told = peers.report()
    assert told["apex"] == "unmeasured: the installed `apex` is not NVIDIA's"
    assert told["liger"] == "unmeasured: ModuleNotFoundError: No module named 'no_such_module_here'"
    assert peers.layer_norm_modulate_peers() == {} and peers.load("liger") is None


def module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    made = types.ModuleType(name)
    vars(made).update(members)
    monkeypatch.setitem(sys.modules, name, made)


class LigerLayerNormFunction:
    @staticmethod
    def apply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


class CudnnTensor:
    def set_output(self, is_output: bool) -> CudnnTensor:
        return self

    def set_data_type(self, data_type: str) -> CudnnTensor:
        return self


class CudnnGraph:
    """The calls of cudnn.pygraph that a norm needs, with its argument names; `execute` computes in float64."""

    def __init__(self, *, intermediate_data_type: str, compute_data_type: str, handle: str) -> None:
        self.given: dict[str, CudnnTensor] = {}
        self.made: tuple[CudnnTensor, ...] = ()

    def tensor(
        self, *, name: str, dim: list[int], stride: list[int], data_type: str, is_pass_by_value: bool = False
    ) -> CudnnTensor:
        return CudnnTensor()

    def adalayernorm(
        self, *, norm_forward_phase: str, input: Any, scale: Any, bias: Any, epsilon: Any, name: str
    ) -> Any:
        self.given = {"x": input, "scale": scale, "bias": bias, "epsilon": epsilon}
        self.made = (CudnnTensor(), CudnnTensor(), CudnnTensor())
        return self.made

    def adalayernorm_backward(
        self, *, grad: Any, input: Any, scale: Any, mean: Any, inv_variance: Any, name: str
    ) -> Any:
        self.given = {"dy": grad, "x": input, "scale": scale, "mean": mean, "rstd": inv_variance}
        self.made = (CudnnTensor(), CudnnTensor(), CudnnTensor())
        return self.made

    def _nothing(self, *plans: object) -> None: ...

    validate = build_operation_graph = create_execution_plans = check_support = build_plans = _nothing

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, values: dict[CudnnTensor, torch.Tensor], workspace: torch.Tensor, handle: str) -> None:
        x, scale = values[self.given["x"]].double(), values[self.given["scale"]].double()
        if "dy" in self.given:
            dy = values[self.given["dy"]].double()
            results = reference.backward(dy, x, scale[:, 0] - 1, 1e-6)
            results = (results[0], results[2][:, None], results[1][:, None])
        else:
            normal, rstd = reference.normalize(x, float(values[self.given["epsilon"]]))
            results = (normal * scale + values[self.given["bias"]], x.mean(-1, keepdim=True), rstd)
        for tensor, result in zip(self.made, results, strict=True):
            values[tensor].copy_(result)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger, apex and cuDNN, as far as the variants ask for them, on a CPU."""
    module(monkeypatch, "liger_stand_in", LigerLayerNormFunction=LigerLayerNormFunction)
    monkeypatch.setitem(peers.PEER_MODULES, "liger", "liger_stand_in")
    module(monkeypatch, "apex_stand_in", FusedAdam=object)
    monkeypatch.setitem(peers.PEER_MODULES, "apex", "apex_stand_in")
    for name in ("apex", "apex.normalization"):
        module(monkeypatch, name)
    norm = lambda x, shape, eps: F.layer_norm(x, shape, eps=eps)  # noqa: E731
    module(monkeypatch, "apex.normalization.fused_layer_norm", fused_layer_norm=norm)
    module(
        monkeypatch,
        "cudnn",
        create_handle=lambda: "handle",
        set_stream=lambda *, handle, stream: None,
        pygraph=CudnnGraph,
        data_type=SimpleNamespace(FLOAT="float", BFLOAT16="bf16"),
        heur_mode=SimpleNamespace(A="A", FALLBACK="fallback"),
        norm_forward_phase=SimpleNamespace(TRAINING="training"),
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    empty = torch.empty
    monkeypatch.setattr(cudnn_norm.torch, "empty", lambda *a, device=None, **k: empty(*a, **k))
    cudnn_norm._plan.cache_clear()
    cudnn_norm._handle.cache_clear()


@pytest.mark.parametrize("name", ["liger", "apex", "cudnn"])
def test_a_librarys_norm_is_modulated_as_ours_is(libraries: None, name: str) -> None:
    x, branch = torch.randn(2, 3, 5, 8).unbind()
    gate, shift, scale = torch.randn(3, 3, 8).unbind()
    found = peers.layer_norm_modulate_peers()
    assert list(found) == ["liger", "apex", "cudnn"]
    inputs = [t.clone().requires_grad_() for t in (x, shift, scale)]
    dy = torch.randn_like(x)
    got, want = found[name](*inputs), norm_eager(*inputs)
    torch.testing.assert_close(got, want)
    for one, other in zip(torch.autograd.grad(got, inputs, dy), torch.autograd.grad(want, inputs, dy), strict=True):
        torch.testing.assert_close(one, other)
    gated = peers.gated_residual_layer_norm_modulate_peers()[name]
    for one, other in zip(
        gated(x, branch, gate, shift, scale), gated_eager(x, branch, gate, shift, scale), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_at_the_types_of_training_y_is_bf16() -> None:
    """Eager's y is float32 there, and the product that reads it casts it: the cast belongs to what is compared."""
    x, shift, scale = torch.randn(2, 3, 8), *torch.randn(2, 2, 8).bfloat16()
    as_trained = op_bench.as_in_training(norm_eager, torch.device("cpu"))
    assert norm_eager(x, shift, scale).dtype == torch.float32 and as_trained(x, shift, scale).dtype == torch.bfloat16
    x_new, y = op_bench.as_in_training(gated_eager, torch.device("cpu"))(x, x.bfloat16(), shift, shift, scale)
    assert (x_new.dtype, y.dtype) == (torch.float32, torch.bfloat16)


def test_a_library_that_does_not_run_here_costs_ours_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise RuntimeError("no kernel for sm_90\nand more")

    variants = {"fused": fails, "liger": lambda: None, "cudnn": fails}
    assert list(op_bench.without_failing_peers(variants)) == ["fused", "liger"]
    assert capsys.readouterr().out == "cudnn: unmeasured: RuntimeError: no kernel for sm_90\n"
