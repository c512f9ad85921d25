"""cuBLASLt's epilogues against float64, in a CUDA graph, and as the choice of a model; a step that is one graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lib.step_rows import Setting, StepRow
from rehearsal import of_a_gpu_alone, sized
from sra2_fast.kernels import cublaslt
from sra2_fast.kernels import linear as kernels
from tolerance import assert_close

from sra2_fast import backends
from sra2_fast.models.products import WAYS, set_products

BF16 = torch.bfloat16
# The products of SiT-XL/2 at batch 4, those of S/2, and rows that are no multiple of anything.
SHAPES = [(1024, 1152, 4608), (1024, 1152, 3456), (2048, 384, 1536), (37, 64, 96)]
needs_cublaslt = pytest.mark.skipif(cublaslt.why_not() is not None, reason=f"cublaslt: {cublaslt.why_not()}")


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(shape, device="cuda")).to(BF16)


def gelu(h: torch.Tensor) -> torch.Tensor:
    return F.gelu(h, approximate="tanh")


@of_a_gpu_alone
@needs_cublaslt
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_the_products_against_float64(rows: int, inputs: int, outputs: int) -> None:
    x, weight, bias = normal(rows, inputs), normal(outputs, inputs, scale=inputs**-0.5), normal(outputs)
    y, h = kernels.linear_gelu_fwd(x, weight, bias)
    true = x.double() @ weight.double().t() + bias.double()
    assert_close(h, true, BF16, 1, inputs, name="h")
    assert_close(y, gelu(true), BF16, 1, inputs, name="GELU(h)")

    dy, back = normal(rows, inputs), normal(inputs, outputs, scale=inputs**-0.5)
    dh, dbias = kernels.linear_gelu_bwd(dy, back, h)
    exact = h.double().requires_grad_()
    want = torch.autograd.grad(gelu(exact), exact, dy.double() @ back.double())[0]
    assert_close(dh, want, BF16, 1, inputs, name="dh")
    assert_close(dbias, want.sum(0), BF16, 1, rows + inputs, want.abs().sum(0), name="dbias of GELU")

    dweight, dbias = kernels.linear_weight_bwd(h, x)
    assert_close(dweight, h.double().t() @ x.double(), BF16, 1, rows, name="dweight")
    assert_close(dbias, h.double().sum(0), BF16, 1, rows, h.double().abs().sum(0), name="dbias")


@of_a_gpu_alone
@needs_cublaslt
def test_equal_bits_at_every_call_and_from_a_graph() -> None:
    dy, x = normal(1024, 1152), normal(1024, 384)
    first = kernels.linear_weight_bwd(dy, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.linear_weight_bwd(dy, x)
    for one in captured:
        one.zero_()
    graph.replay()
    again = kernels.linear_weight_bwd(dy.clone(), x.clone())
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, captured, again, strict=True))


def setting(**changes: object) -> Setting:
    values = {"batch_size": 4, "precision": "bf16", "implementation": "fused", "is_compiled": False}
    model = sized("1152,2,16,2", "64,2,2,8")
    return Setting(**{**values, "model": model, "device": torch.device("cuda"), **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("row", ["baseline", "sra2-cosine"])
def test_a_step_agrees_with_a_float32_eager_model_either_way(row: str, way: str) -> None:
    step = StepRow(row, setting())
    set_products(step.sit, way)
    step.check()
    step.remember()
    step.check_after(step())


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("row", ["baseline", "sra2-cosine"])
def test_a_captured_step_is_the_step(row: str, is_compiled: bool) -> None:
    """The same kernels on the same batches; only the graph's own memory may let cuBLAS choose another algorithm."""
    captured, plain = (
        StepRow(row, setting(is_compiled=is_compiled, is_captured=is_captured)) for is_captured in (True, False)
    )
    for _ in range(sized(8, 5)):
        a, b = captured(), plain()
        torch.testing.assert_close(a, b, rtol=2.0**-8, atol=0)
    pairs = zip(captured.sit.parameters(), plain.sit.parameters(), strict=True)
    assert all(float((a - b).norm()) <= 2.0**-8 * float(b.norm()) for a, b in pairs)


@of_a_gpu_alone
def test_the_backend_is_named() -> None:
    assert backends.choose("linear", "cuda").backend == ("cublaslt" if cublaslt.why_not() is None else "pytorch")
