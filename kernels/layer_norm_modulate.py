"""y = LayerNorm(x) (1 + scale_b) + shift_b on CUDA, forward and backward: the norm of `norm_rows.py` without a branch.

Launchers take what `sra2_fast.ops.layer_norm_modulate` has checked: contiguous x and dy, modulation of any row stride
and unit last stride. The mathematics and its derivation are in `sra2_fast/reference/layer_norm_modulate.py`.

Bytes at SiT-XL/2, float32 x and bf16 y, per row of 1152: forward 6.9 kB, backward 11.5 kB.
"""

from __future__ import annotations

import torch

from .norm_rows import norm_rows_bwd, norm_rows_fwd
from .row_tiles import RowLaunch, choose_tiles

FORWARD_COLUMNS = 48  # 36 at D = 1152: 72 registers of sm_90, 28 warps a multiprocessor
BACKWARD_COLUMNS = 24  # 18 at D = 1152: about 160 registers; 36 would take all 255
BACKWARD_STAGES = 3  # two steps ahead: 37 kB (bf16) or 55 kB (float32) on their way to each multiprocessor


def launch_config(rows: int, D: int, dtype: torch.dtype) -> RowLaunch:
    """How to launch on `rows` rows of D columns; dtype: the narrowest type moved. Pure: no device is asked."""
    return RowLaunch(
        forward=choose_tiles(rows, D, dtype, FORWARD_COLUMNS),
        backward=choose_tiles(rows, D, dtype, BACKWARD_COLUMNS),
        backward_stages=BACKWARD_STAGES,
    )


def layer_norm_modulate_fwd(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y = (x - mean) rstd (1 + scale) + shift, and the statistics.

    x: (B, N, D) float32 or bf16, contiguous; shift, scale: (B, D), any row stride.
    Returns y (B, N, D) out_dtype, mean and rstd (B, N) float32. Sums in float32, one rounding to out_dtype.
    """
    _, y, mean, rstd = norm_rows_fwd(x, None, None, shift, scale, eps, out_dtype, launch_config)
    return y, mean, rstd


def layer_norm_modulate_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    need_dx: bool = True,
    need_modulation: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dx, dshift, dscale) of layer_norm_modulate_fwd; None for what is not needed, which is not computed either.

    dy, x: (B, N, D) contiguous; scale: (B, D), any row stride; mean, rstd: (B, N) float32.
    Returns dx (B, N, D) x.dtype, dshift and dscale (B, D) scale.dtype, summed over tokens in float32 in a fixed order.
    """
    needs = (need_dx, False, False, need_modulation)
    dx, _, _, dshift, dscale = norm_rows_bwd(None, dy, x, None, None, scale, mean, rstd, needs, launch_config)
    return dx, dshift, dscale
