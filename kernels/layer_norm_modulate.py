"""y = LayerNorm(x) (1 + scale_b) + shift_b on CUDA, forward and backward, each in one pass over the rows.

Launchers take what `sra2_fast.ops.layer_norm_modulate` has checked: contiguous x and dy, modulation of any row stride
and unit last stride. The mathematics and its derivation are in `sra2_fast/reference/layer_norm_modulate.py`.

Bytes at SiT-XL/2, float32 x and bf16 y, per row of 1152: forward 6.9 kB, backward 11.5 kB. The forward holds a row in
one warp's registers. The backward walks several rows with the next ones already on their way to shared memory, and
keeps its part of dshift and dscale in registers; partials are summed by a second small launch in a fixed order, without
atomics, so runs are bitwise equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .row_tiles import (
    LaunchConfig,
    choose_tiles,
    cut_samples,
    multiprocessors,
    narrowest,
    row_sum,
    row_sums,
    store_row,
    store_slice,
    sum_slices,
    tile_columns,
    tile_mask,
)

# Registers of sm_90 at D = 1152 (benchmarks/aot_table.py): the forward holds 36 columns a thread in 72 registers, 28
# warps a multiprocessor. The backward at 36 takes 255 and none is left to prefetch; at 18 it takes about 160.
FORWARD_COLUMNS = 48
BACKWARD_COLUMNS = 24
# Every program writes partials of 2 D floats, written and read again: with two programs a multiprocessor that is 8 % on
# top of a bf16 batch of 32, with three 12 %. Two programs of two rows keep enough bytes on their way (37 kB a
# multiprocessor in bf16, 55 kB in float32) when they run two steps ahead, in three stages.
BACKWARD_PROGRAMS = 2
BACKWARD_STAGES = 3


def launch_config(rows: int, D: int, dtype: torch.dtype) -> LaunchConfig:
    """How to launch on `rows` rows of D columns; dtype: the narrowest type moved. Pure: no device is asked."""
    return LaunchConfig(
        forward=choose_tiles(rows, D, dtype, FORWARD_COLUMNS, num_warps=4),
        backward=choose_tiles(rows, D, dtype, BACKWARD_COLUMNS, num_warps=4),
        backward_stages=BACKWARD_STAGES,
    )


@triton.jit
def _layer_norm_modulate_fwd_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    total_rows,
    N,
    stride_shift,
    stride_scale,
    eps,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    LANES: tl.constexpr,
    TAIL_LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, :, None]
    in_rows = row < total_rows
    shift_row = shift_ptr + (row // N) * stride_shift
    scale_row = scale_ptr + (row // N) * stride_scale

    cols = tile_columns(0, MAIN, LANES)
    mask = tile_mask(in_rows, cols, MAIN > D, D)
    x = tl.load(x_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
    total = row_sum(x)
    if TAIL > 0:
        cols_t = tile_columns(MAIN, TAIL, TAIL_LANES)
        mask_t = tile_mask(in_rows, cols_t, MAIN + TAIL > D, D)
        x_t = tl.load(x_ptr + row * D + cols_t, mask=mask_t, other=0.0).to(tl.float32)
        total += row_sum(x_t)

    mean = total * (1.0 / D)
    x = tl.where(mask, x - mean, 0.0) if MAIN > D else x - mean
    squares = row_sum(x * x)
    if TAIL > 0:
        x_t = tl.where(mask_t, x_t - mean, 0.0) if MAIN + TAIL > D else x_t - mean
        squares += row_sum(x_t * x_t)
    rstd = tl.rsqrt(squares * (1.0 / D) + eps)
    store_row(mean_ptr, row, mean, in_rows)
    store_row(rstd_ptr, row, rstd, in_rows)

    scale = tl.load(scale_row + cols, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(shift_row + cols, mask=mask, other=0.0).to(tl.float32)
    y = x * rstd * (1.0 + scale) + shift
    tl.store(y_ptr + row * D + cols, y.to(y_ptr.dtype.element_ty), mask=mask)
    if TAIL > 0:
        scale_t = tl.load(scale_row + cols_t, mask=mask_t, other=0.0).to(tl.float32)
        shift_t = tl.load(shift_row + cols_t, mask=mask_t, other=0.0).to(tl.float32)
        y_t = x_t * rstd * (1.0 + scale_t) + shift_t
        tl.store(y_ptr + row * D + cols_t, y_t.to(y_ptr.dtype.element_ty), mask=mask_t)


@triton.jit
def _layer_norm_modulate_bwd_kernel(
    dy_ptr,
    x_ptr,
    scale_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    N,
    slice_rows,
    stride_scale,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    LANES: tl.constexpr,
    TAIL_LANES: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx_ptr, partial_ptr: None for what is not needed."""
    piece = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    lane_row = tl.arange(0, ROWS)[None, :, None]
    scale_row = scale_ptr + sample * stride_scale + lane_row * 0

    cols = tile_columns(0, MAIN, LANES)
    gain = 1.0 + tl.load(scale_row + cols, mask=tile_mask(lane_row >= 0, cols, MAIN > D, D), other=0.0).to(tl.float32)
    dshift = tl.zeros((MAIN // LANES, ROWS, LANES), tl.float32)
    dscale = tl.zeros((MAIN // LANES, ROWS, LANES), tl.float32)
    if TAIL > 0:
        cols_t = tile_columns(MAIN, TAIL, TAIL_LANES)
        all_t = tile_mask(lane_row >= 0, cols_t, MAIN + TAIL > D, D)
        gain_t = 1.0 + tl.load(scale_row + cols_t, mask=all_t, other=0.0).to(tl.float32)
        dshift_t = tl.zeros((TAIL // TAIL_LANES, ROWS, TAIL_LANES), tl.float32)
        dscale_t = tl.zeros((TAIL // TAIL_LANES, ROWS, TAIL_LANES), tl.float32)

    first = piece * slice_rows
    for start in tl.range(first, tl.minimum(first + slice_rows, N), ROWS, num_stages=STAGES):
        token = start + lane_row
        in_rows = token < N
        row = sample * N + token
        mask = tile_mask(in_rows, cols, MAIN > D, D)
        x = tl.load(x_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=in_rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=in_rows, other=0.0)
        # Where a mask is off dy is 0, so the value of x there (-mean rstd, finite) reaches no sum.
        x = (x - mean) * rstd
        if partial_ptr is not None:
            dshift += dy
            dscale += dy * x
        dy = dy * gain
        sums = row_sums(dy, dy * x)
        if TAIL > 0:
            mask_t = tile_mask(in_rows, cols_t, MAIN + TAIL > D, D)
            x_t = tl.load(x_ptr + row * D + cols_t, mask=mask_t, other=0.0).to(tl.float32)
            dy_t = tl.load(dy_ptr + row * D + cols_t, mask=mask_t, other=0.0).to(tl.float32)
            x_t = (x_t - mean) * rstd
            if partial_ptr is not None:
                dshift_t += dy_t
                dscale_t += dy_t * x_t
            dy_t = dy_t * gain_t
            sums += row_sums(dy_t, dy_t * x_t)

        if dx_ptr is not None:
            mean_dy, mean_dyx = tl.split(sums * (1.0 / D))
            offset = mean_dy[None, :, None] * rstd
            slope = mean_dyx[None, :, None] * rstd
            dx = dy * rstd - (x * slope + offset)
            tl.store(dx_ptr + row * D + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if TAIL > 0:
                dx_t = dy_t * rstd - (x_t * slope + offset)
                tl.store(dx_ptr + row * D + cols_t, dx_t.to(dx_ptr.dtype.element_ty), mask=mask_t)

    if partial_ptr is not None:
        shift_part = partial_ptr + (sample * tl.num_programs(0) + piece) * D
        scale_part = shift_part + tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * D
        store_slice(shift_part, dshift, cols, D)
        store_slice(scale_part, dscale, cols, D)
        if TAIL > 0:
            store_slice(shift_part, dshift_t, cols_t, D)
            store_slice(scale_part, dscale_t, cols_t, D)


def layer_norm_modulate_fwd(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y = (x - mean) rstd (1 + scale) + shift, and the statistics.

    x: (B, N, D) float32 or bf16, contiguous; shift, scale: (B, D), any row stride.
    Returns y (B, N, D) out_dtype, mean and rstd (B, N) float32. Sums in float32, one rounding to out_dtype.
    """
    B, N, D = x.shape
    y = torch.empty_like(x, dtype=out_dtype)
    mean = torch.empty((B, N), device=x.device, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return y, mean, rstd
    tiles = launch_config(B * N, D, narrowest(x, y, shift, scale)).forward
    _layer_norm_modulate_fwd_kernel[(triton.cdiv(B * N, tiles.rows),)](
        x, shift, scale, y, mean, rstd, B * N, N, shift.stride(0), scale.stride(0), eps, D=D, **tiles.constexprs()
    )
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
    B, N, D = x.shape
    dx = torch.empty_like(x) if need_dx else None
    if x.numel() == 0:
        dshift, dscale = (scale.new_zeros(B, D) if need_modulation else None for _ in range(2))
        return dx, dshift, dscale
    config = launch_config(B * N, D, narrowest(x, dy, scale))
    tiles = config.backward
    slices, slice_rows = cut_samples(B, N, tiles.rows, BACKWARD_PROGRAMS * multiprocessors(x.device))
    partial = x.new_empty((2, B, slices, D), dtype=torch.float32) if need_modulation else None
    _layer_norm_modulate_bwd_kernel[(slices, B)](
        dy,
        x,
        scale,
        mean,
        rstd,
        dx,
        partial,
        N,
        slice_rows,
        scale.stride(0),
        D=D,
        STAGES=config.backward_stages,
        **tiles.constexprs(),
    )
    if partial is None:
        return dx, None, None
    dshift, dscale = sum_slices(partial, (scale.dtype, scale.dtype))
    return dx, dshift, dscale
