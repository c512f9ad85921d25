"""Linear layers whose products take an epilogue with them: GELU, its derivative, and the sums for the biases.

In PyTorch's own operators GELU reads and writes its (B, N, 4D) tensor once more in each direction, and every bias
costs a pass over its output's gradient: 11 of the 60 GB that a step of SiT-XL/2 at batch 32 moves outside products.
cuBLASLt's epilogues (kernels/linear.py) have them where the product's tile is in registers. An entry to NVIDIA's
products, not an op with kernels of ours: elsewhere the same operators are compositions of PyTorch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import autocast_dtype, once_differentiable, records_gradient
from .registry import launchers, operator

_OP = "linear"
_MULTIPLE = 8  # of elements: the leading dimension of GELU's input, and 16-byte rows


def takes(x: Tensor, *weights: Tensor) -> bool:
    """Whether these products have an epilogue: bf16 under autocast or by type, rows of a multiple of 16 bytes, where no
    transform or second derivative looks at them."""
    dtype = autocast_dtype(x.device.type) or x.dtype
    return dtype == torch.bfloat16 and all(size % _MULTIPLE == 0 for weight in weights for size in weight.shape)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b; the bias's gradient is summed beside the weight's product.

    x: (.., K), weight: (N, K), bias: (N,); taken to the autocast dtype where that is on, else bfloat16 as they are.
    Returns (.., N). Precision: as F.linear; the bias's gradient is a float32 sum, rounded once.
    Saved for backward: x and weight.
    """
    x, weight, bias = _low(x, weight, bias)
    if not records_gradient(_OP, x, weight, bias):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """GELU(x W1^T + b1) W2^T + b2, with the tanh approximation.

    x: (.., K), weight1: (H, K), bias1: (H,), weight2: (N, H), bias2: (N,); types as `linear`. Returns (.., N).
    Precision: GELU and its derivative act on the product's float32 sums, so there is one rounding less each than in
    PyTorch's operators; h is rounded once for the backward. Saved for backward: x, h, GELU(h) and the weights.
    """
    arguments = _low(x, weight1, bias1, weight2, bias2)
    if records_gradient(_OP, *arguments):
        return _Mlp.apply(*arguments)
    x, weight1, bias1, weight2, bias2 = arguments
    return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate="tanh"), weight2, bias2)


def _low(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = autocast_dtype(tensors[0].device.type) or tensors[0].dtype
    return tuple(tensor.to(dtype) for tensor in tensors)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy2, x2 = _rows(dy), _rows(x)
        need_dx, need_dweight, need_dbias = ctx.needs_input_grad
        dx = (dy2 @ weight).view(x.shape) if need_dx else None
        return dx, *_of_weight(dy2, x2, need_dweight, need_dbias)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2):
        y, h = _gelu_fwd(_rows(x), weight1, bias1)
        ctx.save_for_backward(x, weight1, h, y, weight2)
        return torch.addmm(bias2, y, weight2.t()).view(*x.shape[:-1], len(weight2))

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, weight1, h, y, weight2 = ctx.saved_tensors
        need_dx, need_dweight1, need_dbias1, need_dweight2, need_dbias2 = ctx.needs_input_grad
        dout2, x2 = _rows(dout), _rows(x)
        dweight2, dbias2 = _of_weight(dout2, y, need_dweight2, need_dbias2)
        dx = dweight1 = dbias1 = None
        if need_dx or need_dweight1 or need_dbias1:
            dh, dbias1 = _gelu_bwd(dout2, weight2, h)
            dweight1 = dh.t() @ x2 if need_dweight1 else None
            dx = (dh @ weight1).view(x.shape) if need_dx else None
        return dx, dweight1, dbias1 if need_dbias1 else None, dweight2, dbias2


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _of_weight(dy: Tensor, x: Tensor, need_dweight: bool, need_dbias: bool) -> tuple[Tensor | None, Tensor | None]:
    if need_dweight and need_dbias:
        return _weight_bwd(dy, x)
    return dy.t() @ x if need_dweight else None, dy.sum(0) if need_dbias else None


def _gelu_fwd_composition(x, weight, bias):
    h = torch.addmm(bias, x, weight.t())
    return F.gelu(h, approximate="tanh"), h


def _gelu_fwd_cublaslt(x, weight, bias):
    return launchers(_OP).linear_gelu_fwd(x, weight, bias)


@operator(
    _OP,
    "gelu_fwd",
    "(Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor)",
    cublaslt=_gelu_fwd_cublaslt,
    composition=_gelu_fwd_composition,
)
def _gelu_fwd(x, weight, bias):
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, torch.empty_like(y)


def _gelu_bwd_composition(dy, weight, h):
    dh = torch.ops.aten.gelu_backward(dy @ weight, h, approximate="tanh")
    return dh, dh.sum(0)


def _gelu_bwd_cublaslt(dy, weight, h):
    return launchers(_OP).linear_gelu_bwd(dy, weight, h)


@operator(
    _OP,
    "gelu_bwd",
    "(Tensor dy, Tensor weight, Tensor h) -> (Tensor, Tensor)",
    cublaslt=_gelu_bwd_cublaslt,
    composition=_gelu_bwd_composition,
)
def _gelu_bwd(dy, weight, h):
    return torch.empty_like(h), h.new_empty(h.shape[1])


def _weight_bwd_composition(dy, x):
    return dy.t() @ x, dy.sum(0)


def _weight_bwd_cublaslt(dy, x):
    return launchers(_OP).linear_weight_bwd(dy, x)


@operator(
    _OP,
    "weight_bwd",
    "(Tensor dy, Tensor x) -> (Tensor, Tensor)",
    cublaslt=_weight_bwd_cublaslt,
    composition=_weight_bwd_composition,
)
def _weight_bwd(dy, x):
    return x.new_empty(dy.shape[1], x.shape[1]), dy.new_empty(dy.shape[1])
