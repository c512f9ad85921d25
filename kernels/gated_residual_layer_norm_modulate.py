"""x' = x + gate_b branch and y = LayerNorm(x') (1 + scale_b) + shift_b on CUDA, forward and backward, one pass each.

Launchers take what `sra2_fast.ops.gated_residual_layer_norm_modulate` has checked; the mathematics and its derivation
are in `sra2_fast/reference/gated_residual_layer_norm_modulate.py`, the kernels in `norm_rows.py`.

Bytes at SiT-XL/2 (float32 residual, bf16 branch and y) per row of 1152: forward 13.8 kB, backward 20.7 kB. The forward
normalises x' as it was rounded for storage, since that is what the backward reads again.
"""

from __future__ import annotations

import torch

from .norm_rows import norm_rows_bwd, norm_rows_fwd
from .row_tiles import RowLaunch, choose_tiles

FORWARD_COLUMNS = 48
BACKWARD_COLUMNS = 18  # 18 at D = 1152: 168 registers of sm_90 and 12 warps, 224 and 8 with a bf16 branch
BACKWARD_STAGES = 2  # one step ahead: 55 kB on their way to each multiprocessor


def launch_config(rows: int, D: int, dtype: torch.dtype) -> RowLaunch:
    """How to launch on `rows` rows of D columns; dtype: the narrowest type moved. Pure: no device is asked."""
    return RowLaunch(
        forward=choose_tiles(rows, D, dtype, FORWARD_COLUMNS),
        backward=choose_tiles(rows, D, dtype, BACKWARD_COLUMNS),
        backward_stages=BACKWARD_STAGES,
    )


def gated_residual_layer_norm_modulate_fwd(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x' = x + gate branch, y = (x' - mean) rstd (1 + scale) + shift, and the statistics.

    x, branch: (B, N, D) float32 or bf16, contiguous; gate, shift, scale: (B, D), any row stride.
    Returns x' (B, N, D) x.dtype, y (B, N, D) out_dtype, mean and rstd (B, N) float32. Sums in float32, one rounding
    each to x.dtype and out_dtype.
    """
    x_new, y, mean, rstd = norm_rows_fwd(x, branch, gate, shift, scale, eps, out_dtype, launch_config)
    assert x_new is not None  # there is a branch
    return x_new, y, mean, rstd


def gated_residual_layer_norm_modulate_bwd(
    dx_new: torch.Tensor | None,
    dy: torch.Tensor,
    x_new: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    need_dx: bool = True,
    need_dbranch: bool = True,
    need_dgate: bool = True,
    need_modulation: bool = True,
) -> tuple[torch.Tensor | None, ...]:
    """(dx, dbranch, dgate, dshift, dscale) of gated_residual_layer_norm_modulate_fwd; None for what is not needed.

    dx_new: (B, N, D) contiguous, or None where nothing else used x'; dy, x_new, branch: (B, N, D) contiguous;
    gate, scale: (B, D), any row stride; mean, rstd: (B, N) float32.
    Returns dx x_new.dtype and dbranch branch.dtype (B, N, D); dgate gate.dtype, dshift and dscale scale.dtype (B, D),
    summed over tokens in float32 in a fixed order.
    """
    needs = (need_dx, need_dbranch, need_dgate, need_modulation)
    return norm_rows_bwd(dx_new, dy, x_new, branch, gate, scale, mean, rstd, needs, launch_config)
