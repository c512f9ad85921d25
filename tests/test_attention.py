"""Every backend of attention computes softmax(q k^T / sqrt(head_dim)) v; those of a GPU are played by stand-ins."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from repository import ROOT
from tolerance import assert_close, relative_error
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from sra2_fast import backends
from sra2_fast.ops import attention as op
from sra2_fast.ops import attention_matmul

sys.path.insert(0, str(ROOT / "benchmarks"))

from lib import flash_attn_stand_in as stand_in

B, N, H, HEAD_DIM = 3, 37, 2, 24
BF16 = torch.bfloat16
FLASH = ("flash-attn", "flash-attn-3")
KERNELS = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}


def install_flash_attn(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    """Both flash-attn packages, as far as they are used, on the CPU; `calls` grows by what was called."""

    def noting(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*tensors: Tensor, deterministic: bool) -> Tensor:
            calls.append(name)
            return function(*tensors, deterministic=deterministic)

        return call

    for name, module_name in (("flash-attn", "flash_attn"), ("flash-attn-3", "flash_attn_interface")):
        module: Any = types.ModuleType(module_name)
        module.__spec__ = importlib.util.spec_from_loader(module_name, loader=None)
        module.flash_attn_qkvpacked_func = noting(f"{name} packed", stand_in.flash_attn_qkvpacked_func)
        module.flash_attn_func = noting(f"{name} separate", stand_in.flash_attn_func)
        monkeypatch.setitem(sys.modules, module_name, module)


def on_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> op.Backend:
    """The backend, but that it takes the CPU's tensors; PyTorch's GPU kernels become its CPU's flash kernel."""
    if name in KERNELS:
        for kernel in KERNELS.values():
            monkeypatch.setattr(op.SDPBackend, kernel, SDPBackend.FLASH_ATTENTION, raising=False)
    elif name in FLASH:
        install_flash_attn(monkeypatch, [])
    found = op.find(name)
    return op.Backend(found.name, found.separate, found.packed, None, found.dtypes)


def inputs(dtype: torch.dtype = BF16, n: int = N) -> tuple[Tensor, Tensor]:
    """A packed projection that is a slice of something wider, and a gradient that is not contiguous."""
    wide = torch.randn(B, n, 3, H, HEAD_DIM + 8).to(dtype)
    return wide[..., :HEAD_DIM], torch.randn(B, H, n, HEAD_DIM).to(dtype).transpose(1, 2)


def of(run: Callable[[Tensor], Tensor], qkv: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """Result and packed gradient."""
    qkv = qkv.detach().requires_grad_()
    out = run(qkv)
    return out.detach(), torch.autograd.grad(out, qkv, dout)[0]


class Named(TorchDispatchMode):
    """The names of the operators that run in the block."""

    def __enter__(self) -> list[str]:  # type: ignore[override]
        super().__enter__()
        self.names: list[str] = []
        return self.names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def in_float64(qkv: Tensor) -> Tensor:
    q, k, v = qkv.transpose(1, 3).unbind(2)  # each (B, H, N, head_dim)
    weights = torch.softmax(q @ k.transpose(-1, -2) * HEAD_DIM**-0.5, -1)
    return (weights @ v).transpose(1, 2)


def separately(backend: op.Backend) -> Callable[[Tensor], Tensor]:
    return lambda qkv: op.attention_unpacked(*qkv.unbind(2), backend)


@pytest.mark.parametrize("name", op.BACKENDS)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "separate"])
def test_values_and_gradients(name: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, dout = inputs()
    want, dwant = of(in_float64, qkv.double(), dout.double())
    backend = on_cpu(name, monkeypatch)
    run = (lambda qkv: op.attention(qkv, backend)) if packed else separately(backend)
    got, dgot = of(run, qkv, dout)
    assert got.dtype == dgot.dtype == BF16 and dgot.shape == qkv.shape
    # The result; in the gradients the weights, the result that delta reads, dS, and the gradient itself.
    assert_close(got, want, BF16, 2, N)
    assert_close(dgot, dwant, BF16, 4, 2 * N)


@pytest.mark.parametrize("name", op.BACKENDS)
def test_the_default_is_what_pytorch_does_bit_for_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was chosen, tensors that it does not take go to SDPA, as all did."""
    qkv, dout = inputs(torch.float32)

    def public(qkv: Tensor) -> Tensor:
        q, k, v = (m.transpose(1, 2) for m in qkv.unbind(2))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    install_flash_attn(monkeypatch, [])
    backend = op.find(name)
    for got, want in zip(of(lambda qkv: op.attention(qkv, backend), qkv, dout), of(public, qkv, dout), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", FLASH)
def test_flash_attn_gets_the_projection_and_gives_its_gradient_packed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    install_flash_attn(monkeypatch, calls)
    backend = op.find(name)
    qkv = torch.randn(B, N, 3, H, HEAD_DIM, dtype=BF16, requires_grad=True)
    op.attention(qkv, backend)
    assert not calls  # on a CPU
    backend = op.Backend(name, backend.separate, backend.packed, "cpu", (BF16,))
    out = op.attention(qkv, backend)
    assert calls == [f"{name} packed"] and out.shape == (B, N, H, HEAD_DIM)
    with Named() as names:
        (dqkv,) = torch.autograd.grad(out, qkv, torch.randn_like(out))
    assert dqkv.is_contiguous() and not {"aten::stack", "aten::cat", "aten::copy_"} & set(names)
    op.attention_unpacked(*qkv.unbind(2), backend)
    assert calls[1:] == [f"{name} separate"]


def test_flash_attn_is_deterministic_where_torch_is_and_older_ones_return_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bool] = []

    def function(qkv: Tensor, deterministic: bool) -> tuple[Tensor, Tensor]:
        asked.append(deterministic)
        return qkv[:, :, 0], qkv.sum()

    monkeypatch.setattr(backends, "flash_attn_functions", lambda name: (function, function))
    backend = op.find("flash-attn-3")
    assert backend.packed is not None
    qkv = torch.randn(B, N, 3, H, HEAD_DIM)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(backend.packed(qkv), qkv[:, :, 0])
    finally:
        torch.use_deterministic_algorithms(False)
    backend.packed(qkv)
    assert asked == [True, False]


@pytest.mark.parametrize("n", [64, 256])
def test_products_are_no_less_accurate_than_pytorchs_kernel(n: int) -> None:
    """Scores rounded to bf16 had twice its error; dS rounded before dq as well had 1.2 times dq's."""
    qkv, dout = inputs(n=n)
    want, dwant = of(in_float64, qkv.double(), dout.double())
    got, dgot = of(attention_matmul.attention_matmul, qkv, dout)
    eager, deager = of(op.attention, qkv, dout)
    assert relative_error(got, want)[0] <= 1.05 * relative_error(eager, want)[0]
    for one, other, true in zip(*(gradient.unbind(2) for gradient in (dgot, deager, dwant)), strict=True):
        assert relative_error(one, true)[0] <= 1.05 * relative_error(other, true)[0]


@pytest.mark.slow
def test_products_as_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, dout = inputs()
    torch.library.opcheck(attention_matmul._fwd, (qkv, True))
    torch.library.opcheck(attention_matmul._fwd, (qkv, False))
    out, weights = attention_matmul._fwd(qkv, True)
    torch.library.opcheck(attention_matmul._bwd, (dout, qkv, out, weights))
    assert attention_matmul.attention_matmul(qkv[:0]).shape == (0, N, H, HEAD_DIM)
    pieces = of(attention_matmul.attention_matmul, qkv, dout)
    monkeypatch.setattr(attention_matmul, "_pieces", lambda batch_size: [slice(0, 2), slice(2, 3)])
    for one, other in zip(pieces, of(attention_matmul.attention_matmul, qkv, dout), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        x = qkv.detach().requires_grad_()
        (first,) = torch.autograd.grad(attention_matmul.attention_matmul(x), x, dout, create_graph=True)
        first.sum().backward()


@pytest.mark.parametrize("name", op.BACKENDS)
def test_forward_mode_goes_through_pytorchs_composition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, tangent = (inputs(torch.float32)[0] for _ in range(2))
    backend = on_cpu(name, monkeypatch)
    _, got = torch.func.jvp(lambda qkv: op.attention(qkv, backend), (qkv,), (tangent,))
    _, want = torch.func.jvp(in_float64, (qkv.double(),), (tangent.double(),))
    assert_close(got, want, torch.float32, 4, N)


def test_every_name_is_known_everywhere() -> None:
    names = {name for names in backends.ATTENTION.values() for name in names}
    assert names == set(op.BACKENDS)
    with pytest.raises(ImportError):
        op.find("flash-attn-3")


@pytest.mark.parametrize("packed", [True, False])
def test_more_samples_than_a_grid_holds_are_computed_in_parts(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA refuses a grid of more than 65,535 in y or z, where attention's kernels count samples."""
    monkeypatch.setattr(op, "MOST_SAMPLES", 3)
    seen: list[int] = []

    def separate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(len(q))
        return op.sdpa(q, k, v)

    backend = op.Backend("counting", separate, device_type=None, dtypes=None)
    qkv = torch.randn(7, 4, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    out = op.attention(qkv, backend) if packed else op.attention_unpacked(*qkv.unbind(2), backend)
    assert seen == [3, 3, 1]
    want = op.sdpa(*qkv.unbind(2))
    torch.testing.assert_close(out, want)
    cotangent = torch.randn_like(out)
    torch.testing.assert_close(*(torch.autograd.grad(one, qkv, cotangent)[0] for one in (out, want)))
