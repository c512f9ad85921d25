"""y = LN(x)(1 + scale_b) + shift_b: layer norm without weights, modulated per sample.

The mathematics is in reference/layer_norm_modulate.py; kernels: kernels/layer_norm_modulate.py (Triton) and
csrc/norm_rows* (C++ and CUDA), which the gated norm shares.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .checks import check_array, check_rows, once_differentiable, output_dtype, records_gradient
from .registry import filled, launchers, operator

_OP = "layer_norm_modulate"
_FUSED_ON = backends.fused_devices(_OP)


def eager(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """The public style: `F.layer_norm`, then modulate."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """y = LN(x)(1 + scale_b) + shift_b, in one pass over x.

    x: (B, N, D) float32 or bfloat16, N >= 1, D <= 8192; rows of unit stride, a strided x is copied.
    shift, scale: (B, D) float32 or bfloat16, any row stride: slices of one conditioning matrix.
    Returns y: (B, N, D) in the autocast dtype where autocast is on, else in x's.
    Raises InputError for other shapes, dtypes, devices or strides.
    Precision: statistics and all sums in float32, one rounding to y's type; gradients likewise, one rounding each.
    Deterministic, and independent of the number of threads. Saved for backward: x, scale, and 8 bytes a row.
    """
    check_rows(_OP, "x", x)
    check_array(_OP, "shift", shift, x, "(B, D)")
    check_array(_OP, "scale", scale, x, "(B, D)")
    dtype = output_dtype(_OP, x)
    if x.device.type not in _FUSED_ON:
        return eager(x, shift, scale, eps).to(dtype)
    x = x.contiguous()
    bf16_out = dtype == torch.bfloat16
    if records_gradient(_OP, x, shift, scale):
        return _LayerNormModulate.apply(x, shift, scale, eps, bf16_out)
    return _fwd(x, shift, scale, eps, bf16_out)[0]


class _LayerNormModulate(torch.autograd.Function):
    """Half the overhead of torch.library.register_autograd (7.6 against 16.5 us forward)."""

    @staticmethod
    def forward(ctx, x, shift, scale, eps, bf16_out):
        y, mean, rstd = _fwd(x, shift, scale, eps, bf16_out)
        ctx.save_for_backward(x, scale, mean, rstd)
        ctx.shift_dtype = shift.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, scale, mean, rstd = ctx.saved_tensors
        need_dx, need_dshift, need_dscale = ctx.needs_input_grad[:3]
        dx, dshift, dscale = _bwd(dy.contiguous(), x, scale, mean, rstd, need_dx, need_dshift or need_dscale)
        return (
            dx if need_dx else None,
            dshift.to(ctx.shift_dtype) if need_dshift else None,
            dscale if need_dscale else None,
            None,
            None,
        )


def _fwd_triton(x, shift, scale, eps, bf16_out):
    return launchers(_OP).layer_norm_modulate_fwd(x, shift, scale, eps, torch.bfloat16 if bf16_out else torch.float32)


@operator(
    _OP,
    "fwd",
    "(Tensor x, Tensor shift, Tensor scale, float eps, bool bf16_out) -> (Tensor, Tensor, Tensor)",
    triton=_fwd_triton,
    has_cuda_cpp=True,
)
def _fwd(x, shift, scale, eps, bf16_out):
    y = torch.empty_like(x, dtype=torch.bfloat16 if bf16_out else torch.float32)
    mean = x.new_empty(x.shape[:2], dtype=torch.float32)
    return y, mean, torch.empty_like(mean)


def _bwd_triton(dy, x, scale, mean, rstd, need_dx, need_modulation):
    gradients = launchers(_OP).layer_norm_modulate_bwd(dy, x, scale, mean, rstd, need_dx, need_modulation)
    return filled(gradients, (x, scale, scale))


@operator(
    _OP,
    "bwd",
    "(Tensor dy, Tensor x, Tensor scale, Tensor mean, Tensor rstd, bool need_dx, bool need_modulation)"
    " -> (Tensor, Tensor, Tensor)",
    triton=_bwd_triton,
    has_cuda_cpp=True,
)
def _bwd(dy, x, scale, mean, rstd, need_dx, need_modulation):
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dshift = scale.new_empty(scale.shape if need_modulation else 0)
    return dx, dshift, torch.empty_like(dshift)
