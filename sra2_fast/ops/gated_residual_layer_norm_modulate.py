"""x' = x + gate_b branch, y = LN(x')(1 + scale_b) + shift_b: from one branch of a block to the next, in one pass.

The mathematics is in reference/gated_residual_layer_norm_modulate.py; kernels: kernels/ under the same name
(Triton) and csrc/norm_rows* (C++ and CUDA), which the plain norm shares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from .checks import check_array, check_rows, once_differentiable, output_dtype, records_gradient
from .layer_norm_modulate import eager as _layer_norm_modulate
from .registry import filled, launchers, operator

_OP = "gated_residual_layer_norm_modulate"
_FUSED_ON = backends.fused_devices(_OP)


def eager(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The public style: gate, add, `F.layer_norm`, modulate."""
    x = x + gate.unsqueeze(1) * branch
    return x, _layer_norm_modulate(x, shift, scale, eps)


def gated_residual_layer_norm_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """x' = x + gate_b branch and y = LN(x')(1 + scale_b) + shift_b, in one pass over x and branch.

    x, branch: (B, N, D) float32 or bfloat16, each its own; N >= 1, D <= 8192; rows of unit stride, strided ones are
        copied.
    gate, shift, scale: (B, D) float32 or bfloat16, any row stride: slices of one conditioning matrix.
    Returns (x', y), both (B, N, D): x' in x's dtype, y in the autocast dtype where autocast is on, else in x's.
    Raises InputError for other shapes, dtypes, devices or strides.
    Precision: all arithmetic and sums in float32; x' is rounded once and y is the norm of the rounded x', rounded
    once; gradients are rounded once each. Deterministic, and independent of the number of threads.
    Saved for backward: x', branch, gate, scale, and 8 bytes a row.
    """
    check_rows(_OP, "x", x)
    check_array(_OP, "branch", branch, x, "(B, N, D)")
    check_array(_OP, "gate", gate, x, "(B, D)")
    check_array(_OP, "shift", shift, x, "(B, D)")
    check_array(_OP, "scale", scale, x, "(B, D)")
    dtype = output_dtype(_OP, x)
    if x.device.type not in _FUSED_ON:
        x_new, y = eager(x, branch, gate, shift, scale, eps)
        return x_new.to(x.dtype), y.to(dtype)
    x, branch = x.contiguous(), branch.contiguous()
    bf16_out = dtype == torch.bfloat16
    if records_gradient(_OP, x, branch, gate, shift, scale):
        return _GatedResidualLayerNormModulate.apply(x, branch, gate, shift, scale, eps, bf16_out)
    return _fwd(x, branch, gate, shift, scale, eps, bf16_out)[:2]


class _GatedResidualLayerNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, gate, shift, scale, eps, bf16_out):
        x_new, y, mean, rstd = _fwd(x, branch, gate, shift, scale, eps, bf16_out)
        ctx.save_for_backward(x_new, branch, gate, scale, mean, rstd)
        ctx.shift_dtype, ctx.y_dtype = shift.dtype, y.dtype
        ctx.set_materialize_grads(False)  # where x' goes nowhere else, its zeros need not be read
        return x_new, y

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_new, dy):
        x_new, branch, gate, scale, mean, rstd = ctx.saved_tensors
        need_dx, need_dbranch, need_dgate, need_dshift, need_dscale = ctx.needs_input_grad[:5]
        dx_new = x_new.new_empty(0) if dx_new is None else dx_new.contiguous()
        dy = torch.zeros_like(x_new, dtype=ctx.y_dtype) if dy is None else dy.contiguous()
        dx, dbranch, dgate, dshift, dscale = _bwd(
            dx_new, dy, x_new, branch, gate, scale, mean, rstd,
            need_dx, need_dbranch, need_dgate, need_dshift or need_dscale,
        )  # fmt: skip
        return (
            dx if need_dx else None,
            dbranch if need_dbranch else None,
            dgate if need_dgate else None,
            dshift.to(ctx.shift_dtype) if need_dshift else None,
            dscale if need_dscale else None,
            None,
            None,
        )


def _fwd_triton(x, branch, gate, shift, scale, eps, bf16_out):
    dtype = torch.bfloat16 if bf16_out else torch.float32
    return launchers(_OP).gated_residual_layer_norm_modulate_fwd(x, branch, gate, shift, scale, eps, dtype)


@operator(
    _OP,
    "fwd",
    "(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, float eps, bool bf16_out)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    triton=_fwd_triton,
    has_cuda_cpp=True,
)
def _fwd(x, branch, gate, shift, scale, eps, bf16_out):
    y = torch.empty_like(x, dtype=torch.bfloat16 if bf16_out else torch.float32)
    mean = x.new_empty(x.shape[:2], dtype=torch.float32)
    return torch.empty_like(x), y, mean, torch.empty_like(mean)


def _bwd_triton(dx_new, dy, x_new, branch, gate, scale, mean, rstd, need_dx, need_dbranch, need_dgate, need_modulation):
    gradients = launchers(_OP).gated_residual_layer_norm_modulate_bwd(
        dx_new if dx_new.dim() == 3 else None, dy, x_new, branch, gate, scale, mean, rstd,
        need_dx, need_dbranch, need_dgate, need_modulation,
    )  # fmt: skip
    return filled(gradients, (x_new, branch, gate, scale, scale))


@operator(
    _OP,
    "bwd",
    "(Tensor dx_new, Tensor dy, Tensor x_new, Tensor branch, Tensor gate, Tensor scale, Tensor mean, Tensor rstd,"
    " bool need_dx, bool need_dbranch, bool need_dgate, bool need_modulation)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    triton=_bwd_triton,
    has_cuda_cpp=True,
)
def _bwd(dx_new, dy, x_new, branch, gate, scale, mean, rstd, need_dx, need_dbranch, need_dgate, need_modulation):
    wanted = ((need_dx, x_new), (need_dbranch, branch), (need_dgate, gate), (need_modulation, scale))
    dx, dbranch, dgate, dshift = (t.new_empty(t.shape if needed else 0) for needed, t in wanted)
    return dx, dbranch, dgate, dshift, torch.empty_like(dshift)
