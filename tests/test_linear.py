"""Products with an epilogue: the binding against a CPU stand-in for cuBLASLt, the ops against autograd, the layers."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import batch_for, outputs_and_gradients, small_model
from repository import ROOT
from sra2_fast.kernels import cublaslt
from sra2_fast.kernels import linear as kernels
from tolerance import assert_close
from torch import Tensor, nn

from sra2_fast import backends
from sra2_fast.errors import InputError
from sra2_fast.layers.linear import Mlp
from sra2_fast.models import products
from sra2_fast.models.products import choose_products, set_products
from sra2_fast.ops import linear as op

BF16 = torch.bfloat16
CPU = torch.device("cpu")
SHAPES = [(5, 16, 24), (1, 8, 8), (37, 40, 16)]  # rows, inputs, outputs


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library = tmp_path_factory.mktemp("cublaslt") / "libcublasLt.so"
    source = str(ROOT / "tests" / "cublaslt_on_cpu.c")
    subprocess.run([compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", source, "-o", library, "-lm"], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture
def on_stand_in(stand_in: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cublaslt, "library", lambda: stand_in)
    monkeypatch.setattr(cublaslt, "_of_thread", type(cublaslt._of_thread)())
    yield


def normal(*shape: int) -> Tensor:
    return torch.randn(shape).to(BF16)


def gelu(h: Tensor) -> Tensor:
    return F.gelu(h, approximate="tanh")


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_gelu_in_the_product(rows: int, inputs: int, outputs: int, on_stand_in: None) -> None:
    x, weight, bias = normal(rows, inputs), normal(outputs, inputs), normal(outputs)
    y, h = kernels.linear_gelu_fwd(x, weight, bias)
    true = x.double() @ weight.double().t() + bias.double()
    assert_close(h, true, BF16, 1, inputs, name="h")
    assert_close(y, gelu(true), BF16, 1, inputs, name="GELU(h)")


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_the_derivative_of_gelu_and_its_sum(rows: int, inputs: int, outputs: int, on_stand_in: None) -> None:
    dy, weight, h = normal(rows, inputs), normal(inputs, outputs), normal(rows, outputs)
    dh, dbias = kernels.linear_gelu_bwd(dy, weight, h)
    exact = h.double().requires_grad_()
    true = torch.autograd.grad(gelu(exact), exact, dy.double() @ weight.double())[0]
    assert_close(dh, true, BF16, 1, inputs, name="dh")
    assert_close(dbias, true.sum(0), BF16, 1, rows + inputs, true.abs().sum(0), name="dbias")


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_the_gradients_of_weight_and_bias(rows: int, inputs: int, outputs: int, on_stand_in: None) -> None:
    dy, x = normal(rows, outputs), normal(rows, inputs)
    dweight, dbias = kernels.linear_weight_bwd(dy, x)
    assert_close(dweight, dy.double().t() @ x.double(), BF16, 1, rows, name="dweight")
    assert_close(dbias, dy.double().sum(0), BF16, 1, rows, dy.double().abs().sum(0), name="dbias")


def test_a_plan_is_made_once_for_a_shape_and_points_at_each_call_s_tensors(on_stand_in: None) -> None:
    made: list[Any] = []
    for _ in range(3):
        dy, x = normal(5, 24), normal(5, 16)
        _, dbias = kernels.linear_weight_bwd(dy, x)
        assert_close(dbias, dy.double().sum(0), BF16, 1, 5, dy.double().abs().sum(0))
        made.append(dict(cublaslt._of_thread.plans))
    assert len(made[0]) == len(made[2]) == 1
    odd = torch.empty(5 * 24 + 1, dtype=BF16)[1:].view(5, 24).copy_(dy)  # 2-byte aligned: another plan
    kernels.linear_weight_bwd(odd, x)
    assert len(cublaslt._of_thread.plans) == 2


def test_what_cublaslt_does_not_have_is_said(on_stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"cublaslt: there is no product \(3, 16\) x \(12, 16\) with epilogue 164"):
        kernels.linear_gelu_fwd(normal(3, 16), normal(12, 16), normal(12))  # rows of GELU's input: a multiple of 8
    monkeypatch.setattr(cublaslt, "_R_16BF", 2)
    with pytest.raises(RuntimeError, match="cublaslt: cublasLtMatrixLayoutCreate failed with status 7"):
        kernels.linear_weight_bwd(normal(5, 8), normal(5, 8))


def test_why_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.version.cuda is None:
        assert backends.choose("linear", "cuda").why_not_better == f"cublaslt: torch {torch.__version__} has no CUDA"
        assert cublaslt.why_not() == f"torch {torch.__version__} has no CUDA"
    monkeypatch.setattr(torch.version, "cuda", "77.1")
    cublaslt.library.cache_clear()
    assert cublaslt.why_not() == "torch has not loaded libcublasLt.so.77"
    monkeypatch.setattr(cublaslt, "library", lambda: ctypes.CDLL(None))
    assert cublaslt.why_not() == "libcublasLt.so.77 has no cublasLtCreate"


def weights(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(2, 3, 8), (16, 8), (16,), (24, 16), (24,)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def test_gradients_are_the_derivatives() -> None:
    x, weight1, bias1, weight2, bias2 = weights(torch.float64)
    assert torch.autograd.gradcheck(op.mlp, (x, weight1, bias1, weight2, bias2))
    assert torch.autograd.gradcheck(op.linear, (x, weight1, bias1))


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (3,), (4,), (1, 2), (3, 4), (0, 1, 2)], ids=str)
def test_only_what_is_wanted_is_computed_and_it_is_what_autograd_gives(frozen: tuple[int, ...]) -> None:
    arguments = weights(BF16)
    for index in frozen:
        arguments[index].requires_grad_(False)
    x, weight1, bias1, weight2, bias2 = arguments
    wanted = [one for one in arguments if one.requires_grad]
    got = op.mlp(*arguments)
    want = F.linear(gelu(F.linear(x, weight1, bias1)), weight2, bias2)
    assert torch.equal(got, want)
    dout = torch.randn_like(got)
    pairs = zip(torch.autograd.grad(got, wanted, dout), torch.autograd.grad(want, wanted, dout), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_autocast_opcheck_compile_and_no_second_derivative() -> None:
    arguments = weights(torch.float32)
    with torch.autocast("cpu", BF16):
        out = op.mlp(*arguments)
        assert out.dtype is BF16 and op.takes(arguments[0], arguments[1])
    assert not op.takes(arguments[0], arguments[1]) and not op.takes(normal(4, 12), normal(16, 12))
    (gradient,) = torch.autograd.grad(out.float().sum(), arguments[1])
    assert gradient.dtype is torch.float32
    ops = torch.ops.sra2_fast
    torch.library.opcheck(ops.linear_gelu_fwd, (normal(3, 8), normal(16, 8), normal(16)))
    torch.library.opcheck(ops.linear_gelu_bwd, (normal(3, 8), normal(8, 16), normal(3, 16)))
    torch.library.opcheck(ops.linear_weight_bwd, (normal(3, 8), normal(3, 16)))
    compiled = torch.compile(op.mlp, fullgraph=True, backend="aot_eager")
    low = weights(BF16)
    out, want = compiled(*low), op.mlp(*low)
    pairs = zip(torch.autograd.grad(out.sum(), low), torch.autograd.grad(want.sum(), low), strict=True)
    assert torch.equal(out, want) and all(torch.equal(a, b) for a, b in pairs)
    (dx,) = torch.autograd.grad(op.linear(*low[:3]).sum(), low[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("size", [{}, {"hidden_size": 36}], ids=["fits", "rows that do not fit"])
def test_a_model_with_epilogues_is_bitwise_the_one_without(size: dict[str, Any]) -> None:
    """Here the operators are compositions of what the modules run."""
    found = []
    for way in products.WAYS:
        model = small_model(learn_sigma=False, align_depth=1, **size)
        set_products(model, way)
        found.append(outputs_and_gradients(model, batch_for(model), autocast=True))
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


def test_the_epilogues_are_used_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = op.mlp
    monkeypatch.setattr("sra2_fast.layers.linear._op.mlp", lambda *a: (calls.append("mlp"), real(*a))[1])
    mlp, x = Mlp(16, 32).bfloat16(), normal(2, 3, 16)
    mlp(x)
    assert calls == []
    set_products(mlp, "epilogues")
    want = mlp(x)
    assert calls == ["mlp"]
    seen: list[Tensor] = []
    handle = mlp.fc1.register_forward_hook(lambda module, args, out: seen.append(out))
    assert torch.equal(mlp(x), want) and len(seen) == 1 and calls == ["mlp"]
    handle.remove()
    mlp.act = nn.SiLU()
    assert not torch.equal(mlp(x), want) and calls == ["mlp"]


def test_the_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = small_model()
    settings: dict[str, Any] = {"device": CPU, "autocast_dtype": BF16}
    assert choose_products([model], 2, device=CPU, autocast_dtype=None) is None
    assert choose_products([nn.Linear(2, 2)], 2, **settings) is None
    assert choose_products([small_model(implementation="eager")], 2, **settings) is None
    assert choose_products([model], 2, **settings) is None
    assert choose_products([model], 2, **settings, kept="epilogues") is None
    assert "products: no epilogues here, which the checkpoint was trained with" in capsys.readouterr().out
    there = backends.Choice("cublaslt", "")
    monkeypatch.setattr(backends, "choose", lambda name, kind: there)
    state = torch.get_rng_state()
    chosen = choose_products([None, model], 2, **settings)
    assert chosen is not None and chosen.how == "measured" and set(chosen.ms) == set(products.WAYS)
    assert torch.equal(torch.get_rng_state(), state)  # the run's draws stay what they are
    assert choose_products([model], 2, **settings) == (chosen.name, "measured earlier", chosen.ms)
    assert all(block.mlp.has_epilogue == (chosen.name == "epilogues") for block in model.blocks)
    for kept in products.WAYS:
        assert choose_products([model], 2, **settings, kept=kept) == (kept, "as before", {})
        assert all(block.attn.qkv.has_epilogue == (kept == "epilogues") for block in model.blocks)


def test_transforms_are_refused() -> None:
    with pytest.raises(InputError, match=r"linear: torch\.func's transforms"):
        torch.func.grad(lambda x: op.linear(x, normal(8, 8), normal(8)).sum())(normal(2, 8))
