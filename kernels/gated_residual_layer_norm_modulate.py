"""x' = x + gate_b branch and y = LayerNorm(x') (1 + scale_b) + shift_b on CUDA, forward and backward, one pass each.

Launchers take what `sra2_fast.ops.gated_residual_layer_norm_modulate` has checked; the mathematics and its derivation
are in `sra2_fast/reference/gated_residual_layer_norm_modulate.py`. Blocks and helpers are those of
`layer_norm_modulate.py` beside this file; what is said there of bytes in flight and of determinism holds here.

Bytes at SiT-XL/2 (float32 residual, bf16 branch and y) per row of 1152: forward 13.8 kB, backward 20.7 kB. The forward
normalises x' as it was rounded for storage, since that is what the backward reads again.
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

FORWARD_COLUMNS = 48
# The backward keeps three sums and two modulations of every column: 18 columns a thread at D = 1152 are 222 registers
# of sm_90, so 8 warps in two programs a multiprocessor, with 55 kB of the next rows on their way. Registers capped to
# fit three programs spill; 9 columns a thread fit 16 warps, but then 128 tail columns come in 2-byte loads, which are
# not prefetched.
BACKWARD_COLUMNS = 18
BACKWARD_STAGES = 2
BACKWARD_PROGRAMS = 2


def launch_config(rows: int, D: int, dtype: torch.dtype) -> LaunchConfig:
    """How to launch on `rows` rows of D columns; dtype: the narrowest type moved. Pure: no device is asked."""
    return LaunchConfig(
        forward=choose_tiles(rows, D, dtype, FORWARD_COLUMNS, num_warps=4),
        backward=choose_tiles(rows, D, dtype, BACKWARD_COLUMNS, num_warps=4),
        backward_stages=BACKWARD_STAGES,
    )


@triton.jit
def _gated_sum(x_ptr, branch_ptr, gate_ptr, x_new_ptr, mask):
    """Store x + gate * branch of one tile, and return what was stored, as float32."""
    x = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    branch = tl.load(branch_ptr, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    x_new = (x + gate * branch).to(x_new_ptr.dtype.element_ty)
    tl.store(x_new_ptr, x_new, mask=mask)
    return x_new.to(tl.float32)


@triton.jit
def _gated_residual_layer_norm_modulate_fwd_kernel(
    x_ptr,
    branch_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    x_new_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    total_rows,
    N,
    stride_gate,
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
    sample = row // N
    gate_row = gate_ptr + sample * stride_gate
    shift_row = shift_ptr + sample * stride_shift
    scale_row = scale_ptr + sample * stride_scale

    cols = tile_columns(0, MAIN, LANES)
    mask = tile_mask(in_rows, cols, MAIN > D, D)
    at = row * D + cols
    x = _gated_sum(x_ptr + at, branch_ptr + at, gate_row + cols, x_new_ptr + at, mask)
    total = row_sum(x)
    if TAIL > 0:
        cols_t = tile_columns(MAIN, TAIL, TAIL_LANES)
        mask_t = tile_mask(in_rows, cols_t, MAIN + TAIL > D, D)
        at_t = row * D + cols_t
        x_t = _gated_sum(x_ptr + at_t, branch_ptr + at_t, gate_row + cols_t, x_new_ptr + at_t, mask_t)
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
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    if TAIL > 0:
        scale_t = tl.load(scale_row + cols_t, mask=mask_t, other=0.0).to(tl.float32)
        shift_t = tl.load(shift_row + cols_t, mask=mask_t, other=0.0).to(tl.float32)
        y_t = x_t * rstd * (1.0 + scale_t) + shift_t
        tl.store(y_ptr + at_t, y_t.to(y_ptr.dtype.element_ty), mask=mask_t)


@triton.jit
def _split_gradient(dx, dx_new_ptr, branch_ptr, gate, dx_ptr, dbranch_ptr, at, mask):
    """One tile of dx += dx_new and dbranch = gate * dx, both stored; returns its terms of dgate = sum branch * dx.

    A pointer is None where there is nothing to read or nothing to be stored. dx_new and branch are read here, after the
    row sums, so that they are not in registers while those are formed.
    """
    if dx_new_ptr is not None:
        dx += tl.load(dx_new_ptr + at, mask=mask, other=0.0).to(tl.float32)
    terms = dx
    if branch_ptr is not None:
        terms = tl.load(branch_ptr + at, mask=mask, other=0.0).to(tl.float32) * dx
    if dx_ptr is not None:
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if dbranch_ptr is not None:
        tl.store(dbranch_ptr + at, (gate * dx).to(dbranch_ptr.dtype.element_ty), mask=mask)
    return terms


@triton.jit
def _gated_residual_layer_norm_modulate_bwd_kernel(
    dx_new_ptr,
    dy_ptr,
    x_new_ptr,
    branch_ptr,
    gate_ptr,
    scale_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dbranch_ptr,
    dgate_ptr,
    modulation_ptr,
    N,
    slice_rows,
    stride_gate,
    stride_scale,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    LANES: tl.constexpr,
    TAIL_LANES: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dgate_ptr, modulation_ptr: partial sums. None: dx_new where nothing else used x', and what is not needed."""
    piece = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    lane_row = tl.arange(0, ROWS)[None, :, None]
    gate_row = gate_ptr + sample * stride_gate + lane_row * 0
    scale_row = scale_ptr + sample * stride_scale + lane_row * 0

    cols = tile_columns(0, MAIN, LANES)
    every = tile_mask(lane_row >= 0, cols, MAIN > D, D)
    gain = 1.0 + tl.load(scale_row + cols, mask=every, other=0.0).to(tl.float32)
    gate = tl.load(gate_row + cols, mask=every, other=0.0).to(tl.float32)
    dgate = tl.zeros((MAIN // LANES, ROWS, LANES), tl.float32)
    dshift = tl.zeros((MAIN // LANES, ROWS, LANES), tl.float32)
    dscale = tl.zeros((MAIN // LANES, ROWS, LANES), tl.float32)
    if TAIL > 0:
        cols_t = tile_columns(MAIN, TAIL, TAIL_LANES)
        every_t = tile_mask(lane_row >= 0, cols_t, MAIN + TAIL > D, D)
        gain_t = 1.0 + tl.load(scale_row + cols_t, mask=every_t, other=0.0).to(tl.float32)
        gate_t = tl.load(gate_row + cols_t, mask=every_t, other=0.0).to(tl.float32)
        dgate_t = tl.zeros((TAIL // TAIL_LANES, ROWS, TAIL_LANES), tl.float32)
        dshift_t = tl.zeros((TAIL // TAIL_LANES, ROWS, TAIL_LANES), tl.float32)
        dscale_t = tl.zeros((TAIL // TAIL_LANES, ROWS, TAIL_LANES), tl.float32)

    first = piece * slice_rows
    for start in tl.range(first, tl.minimum(first + slice_rows, N), ROWS, num_stages=STAGES):
        token = start + lane_row
        in_rows = token < N
        row = sample * N + token
        mask = tile_mask(in_rows, cols, MAIN > D, D)
        at = row * D + cols
        x = tl.load(x_new_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=in_rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=in_rows, other=0.0)
        # Where a mask is off dy is 0, so the value of x there (-mean rstd, finite) reaches no sum.
        x = (x - mean) * rstd
        if modulation_ptr is not None:
            dshift += dy
            dscale += dy * x
        dy = dy * gain
        sums = row_sums(dy, dy * x)
        if TAIL > 0:
            mask_t = tile_mask(in_rows, cols_t, MAIN + TAIL > D, D)
            at_t = row * D + cols_t
            x_t = tl.load(x_new_ptr + at_t, mask=mask_t, other=0.0).to(tl.float32)
            dy_t = tl.load(dy_ptr + at_t, mask=mask_t, other=0.0).to(tl.float32)
            x_t = (x_t - mean) * rstd
            if modulation_ptr is not None:
                dshift_t += dy_t
                dscale_t += dy_t * x_t
            dy_t = dy_t * gain_t
            sums += row_sums(dy_t, dy_t * x_t)

        mean_dy, mean_dyx = tl.split(sums * (1.0 / D))
        offset = mean_dy[None, :, None] * rstd
        slope = mean_dyx[None, :, None] * rstd
        dx = dy * rstd - (x * slope + offset)
        terms = _split_gradient(dx, dx_new_ptr, branch_ptr, gate, dx_ptr, dbranch_ptr, at, mask)
        if dgate_ptr is not None:
            dgate += terms
        if TAIL > 0:
            dx_t = dy_t * rstd - (x_t * slope + offset)
            terms_t = _split_gradient(dx_t, dx_new_ptr, branch_ptr, gate_t, dx_ptr, dbranch_ptr, at_t, mask_t)
            if dgate_ptr is not None:
                dgate_t += terms_t

    part = (sample * tl.num_programs(0) + piece) * D
    if dgate_ptr is not None:
        store_slice(dgate_ptr + part, dgate, cols, D)
        if TAIL > 0:
            store_slice(dgate_ptr + part, dgate_t, cols_t, D)
    if modulation_ptr is not None:
        one_sum = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * D
        store_slice(modulation_ptr + part, dshift, cols, D)
        store_slice(modulation_ptr + one_sum + part, dscale, cols, D)
        if TAIL > 0:
            store_slice(modulation_ptr + part, dshift_t, cols_t, D)
            store_slice(modulation_ptr + one_sum + part, dscale_t, cols_t, D)


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
    B, N, D = x.shape
    x_new = torch.empty_like(x)
    y = torch.empty_like(x, dtype=out_dtype)
    mean = torch.empty((B, N), device=x.device, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return x_new, y, mean, rstd
    tiles = launch_config(B * N, D, narrowest(x, branch, y, gate, shift, scale)).forward
    _gated_residual_layer_norm_modulate_fwd_kernel[(triton.cdiv(B * N, tiles.rows),)](
        x,
        branch,
        gate,
        shift,
        scale,
        x_new,
        y,
        mean,
        rstd,
        B * N,
        N,
        gate.stride(0),
        shift.stride(0),
        scale.stride(0),
        eps,
        D=D,
        **tiles.constexprs(),
    )
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
    B, N, D = x_new.shape
    dx = torch.empty_like(x_new) if need_dx else None
    dbranch = torch.empty_like(branch) if need_dbranch else None
    dtypes = [gate.dtype] * need_dgate + [scale.dtype] * (2 * need_modulation)
    if x_new.numel() == 0:
        sums = [x_new.new_zeros((B, D), dtype=dtype) for dtype in dtypes]
    else:
        config = launch_config(B * N, D, narrowest(x_new, dy, branch, gate, scale))
        tiles = config.backward
        slices, slice_rows = cut_samples(B, N, tiles.rows, BACKWARD_PROGRAMS * multiprocessors(x_new.device))
        partial = x_new.new_empty((len(dtypes), B, slices, D), dtype=torch.float32)
        _gated_residual_layer_norm_modulate_bwd_kernel[(slices, B)](
            dx_new,
            dy,
            x_new,
            branch if need_dgate else None,
            gate,
            scale,
            mean,
            rstd,
            dx,
            dbranch,
            partial[0] if need_dgate else None,
            partial[int(need_dgate) :] if need_modulation else None,
            N,
            slice_rows,
            gate.stride(0),
            scale.stride(0),
            D=D,
            STAGES=config.backward_stages,
            **tiles.constexprs(),
        )
        sums = list(sum_slices(partial, dtypes)) if dtypes else []
    dgate = sums.pop(0) if need_dgate else None
    dshift, dscale = sums if need_modulation else (None, None)
    return dx, dbranch, dgate, dshift, dscale
