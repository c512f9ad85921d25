"""What every op asks of its tensors, in one form of words.

The kernels read rows of unit stride in float32 or bfloat16. Whatever else is given raises and names the way out: the
eager implementation takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from ..errors import InputError, must_be, must_have_type

MAX_ROW = 8192
FLOATS = (torch.float32, torch.bfloat16)
_WAY_OUT = 'implementation="eager" takes'


def check_rows(op: str, name: str, x: torch.Tensor) -> None:
    """Raise InputError unless x is (B, N, D), N >= 1, 1 <= D <= 8192, float32 or bfloat16, unit last stride."""
    if not isinstance(x, torch.Tensor):
        raise must_have_type(op, name, "a tensor", type(x).__name__)
    if x.dim() != 3:
        raise must_be(op, name, "(B, N, D)", tuple(x.shape))
    if x.shape[1] < 1:
        raise must_be(op, name, "(B, N, D) with at least one row", tuple(x.shape))
    if not 1 <= x.shape[2] <= MAX_ROW:
        raise must_be(op, name, f"(B, N, D) with D from 1 to {MAX_ROW} ({_WAY_OUT} more)", tuple(x.shape))
    _check_layout(op, name, x)


def check_array(op: str, name: str, t: torch.Tensor, like: torch.Tensor, dims: str) -> None:
    """The same for another argument: dims "(B, N, D)" or "(B, D)" of x = like, on the same device."""
    if not isinstance(t, torch.Tensor):
        raise must_have_type(op, name, "a tensor", type(t).__name__)
    shape = like.shape if dims == "(B, N, D)" else (like.shape[0], like.shape[2])
    if t.shape != shape:
        raise must_be(op, name, f"{dims} = {tuple(shape)}", tuple(t.shape))
    if t.device != like.device:
        raise must_be(op, name, f"on {like.device} like x", t.device)
    _check_layout(op, name, t)


def _check_layout(op: str, name: str, t: torch.Tensor) -> None:
    if t.dtype not in FLOATS:
        raise must_have_type(op, name, f"float32 or bfloat16 ({_WAY_OUT} other floats)", t.dtype)
    if t.stride(-1) != 1 and t.shape[-1] > 1:
        raise must_be(op, name, f"of stride 1 in its last dimension ({_WAY_OUT} others)", f"stride {t.stride(-1)}")


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The type autocast computes in on this kind of device; None where it is off or unknown."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def output_dtype(op: str, x: torch.Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on for x's device, else x's own."""
    dtype = autocast_dtype(x.device.type)
    if dtype is None:
        return x.dtype
    if dtype not in FLOATS:
        raise must_have_type(op, "the autocast dtype", "bfloat16 (or float32)", dtype)
    return dtype


def records_gradient(op: str, *tensors: torch.Tensor) -> bool:
    """Whether a backward pass may be asked for; tensors: every differentiable argument.

    Raises InputError inside torch.func's transforms and for forward-mode tangents, where a kernel, which knows neither,
    would give zeros without a word.
    """
    transformed = torch._C._are_functorch_transforms_active()
    if transformed or (forward_ad._current_level >= 0 and any(map(_has_tangent, tensors))):
        what = "torch.func's transforms (jvp, vmap, grad)" if transformed else "forward-mode gradients"
        raise InputError(f"{op}: {what} are not for the fused kernels; {_WAY_OUT} them")
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _has_tangent(t: torch.Tensor) -> bool:
    return forward_ad.unpack_dual(t).tangent is not None


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a backward pass that has no derivative of its own: asking for one raises, at no cost where nobody does.

    torch's decorator of this name cuts the gradients off from what they depend on. It raises where everything is
    differentiated, but `torch.autograd.functional.jvp` and `hessian`, which ask for one derivative, read zero.
    """

    def differentiate(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        there = [one for one in results if one is not None]
        sources = [one for one in (*gradients, *ctx.saved_tensors) if one is not None]
        refusing = iter(_DifferentiatedOnce.apply(len(there), *there, *sources))
        return tuple(None if one is None else next(refusing) for one in results)

    return differentiate


class _DifferentiatedOnce(torch.autograd.Function):
    """The first `count` tensors as they are, depending on all the others: differentiating them raises."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(one.view_as(one) for one in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        way_out = f"{_WAY_OUT} second derivatives, with sdpa_kernel(SDPBackend.MATH) around the forward"
        raise RuntimeError(f"the fused kernels are once_differentiable; {way_out}")
