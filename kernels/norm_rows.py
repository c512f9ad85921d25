"""The norm of a residual stream, forward and backward, each in one pass over the rows, for both ops that have it.

`layer_norm_modulate` is `gated_residual_layer_norm_modulate` without a branch: the same two kernels with None for the
pointers that it lacks, and what they are for is compiled away. Each op's file beside this one has its launch choices
and launchers, and says how many bytes it moves; the mathematics is in `sra2_fast/reference/`, the blocks are in
`row_tiles.py`.

The forward holds a row in registers. The backward walks several rows with the next ones already on their way to shared
memory, and keeps its part of the sums over tokens in registers; partials are summed by a second small launch in a fixed
order, without atomics, so runs are bitwise equal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .row_tiles import (
    RowLaunch,
    add_tile,
    append,
    cut_samples,
    load_f32,
    multiprocessors,
    narrowest,
    plus,
    row_sum,
    row_sums,
    store_row,
    store_slice,
    sum_slices,
    tile_at,
    tile_columns,
    zero_rows,
)

ChooseLaunch = Callable[[int, int, torch.dtype], RowLaunch]
# Programs a multiprocessor in the backward. Each writes 2 or 3 partial sums of D floats, which are read again: with two
# programs that is 8 % on top of the plain norm's bytes at a bf16 batch of 32, with three 12 %.
BACKWARD_PROGRAMS = 2


@triton.jit
def _residual_sum(x_ptr, branch_ptr, gate_ptr, x_new_ptr, at, columns, mask):
    """One tile of x, float32; with a branch of x + gate * branch, which is stored first and used as it was rounded."""
    if branch_ptr is None:
        return load_f32(x_ptr + at, mask)
    else:
        x_at, branch_at, gate_at, x_new_at = x_ptr + at, branch_ptr + at, gate_ptr + columns, x_new_ptr + at
        x, branch, gate = load_f32(x_at, mask), load_f32(branch_at, mask), load_f32(gate_at, mask)
        x_new = (x + gate * branch).to(x_new_ptr.dtype.element_ty)
        tl.store(x_new_at, x_new, mask=mask)
        return x_new.to(tl.float32)


@triton.jit
def _norm_rows_fwd_kernel(
    x_ptr, branch_ptr,  # (B, N, D) contiguous, float32 or bf16 each; branch None: a plain norm
    gate_ptr, shift_ptr, scale_ptr,  # (B, D) float32 or bf16, rows of the strides below; gate None without a branch
    x_new_ptr, y_ptr,  # (B, N, D), x_new of x's type: written; x_new None without a branch
    mean_ptr, rstd_ptr,  # (B, N) float32: written
    total_rows, N,  # B N, and the rows of one sample
    stride_gate, stride_shift, stride_scale,
    eps,
    D: tl.constexpr, WIDTHS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # int64: a batch may have more than 2^31 elements.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, :, None]
    in_rows = row < total_rows
    sample = row // N
    gate_row = gate_ptr
    if gate_ptr is not None:
        gate_row = gate_ptr + sample * stride_gate
    shift_row = shift_ptr + sample * stride_shift
    scale_row = scale_ptr + sample * stride_scale

    x, total = (), None
    for i in tl.static_range(len(WIDTHS)):
        columns, mask = tile_at(i, in_rows, WIDTHS, LANES, D)
        tile = _residual_sum(x_ptr, branch_ptr, gate_row, x_new_ptr, row * D + columns, columns, mask)
        x, total = append(x, tile), plus(total, row_sum(tile))
    mean = total * (1.0 / D)
    centered, squares = (), None
    for i in tl.static_range(len(WIDTHS)):
        tile = x[i] - mean
        if i * WIDTHS[0] + WIDTHS[i] > D:
            _, mask = tile_at(i, in_rows, WIDTHS, LANES, D)
            tile = tl.where(mask, tile, 0.0)
        centered, squares = append(centered, tile), plus(squares, row_sum(tile * tile))
    rstd = tl.rsqrt(squares * (1.0 / D) + eps)
    store_row(mean_ptr, row, mean, in_rows)
    store_row(rstd_ptr, row, rstd, in_rows)
    for i in tl.static_range(len(WIDTHS)):
        columns, mask = tile_at(i, in_rows, WIDTHS, LANES, D)
        scale = load_f32(scale_row + columns, mask)
        shift = load_f32(shift_row + columns, mask)
        y = centered[i] * rstd * (1.0 + scale) + shift
        # One address, added up in the order that takes fewer registers: 60, not 72, with a branch (float32, D = 1152);
        # 32, not 36, without one (D = 384).
        y_at = y_ptr + row * D + columns if branch_ptr is None else y_ptr + (row * D + columns)
        tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _modulation(pointer, lane_row, WIDTHS: tl.constexpr, LANES: tl.constexpr, D: tl.constexpr):
    """One sample's shift, scale or gate, float32, repeated for every row of the program."""
    values = ()
    for i in tl.static_range(len(WIDTHS)):
        columns, mask = tile_at(i, lane_row >= 0, WIDTHS, LANES, D)
        values = append(values, load_f32(pointer + lane_row * 0 + columns, mask))
    return values


@triton.jit
def _split_gradient(dx, dx_new_ptr, branch_ptr, gate, dx_ptr, dbranch_ptr, row_at, columns, mask):
    """One tile of dx += dx_new and dbranch = gate * dx, both stored; returns its terms of dgate = sum branch * dx.

    A pointer is None where there is nothing to read or nothing to be stored. dx_new and branch are read here, after the
    row sums, so that they are not in registers while those are formed.
    """
    if dx_new_ptr is not None:
        dx += load_f32(dx_new_ptr + row_at + columns, mask)
    terms = dx
    if branch_ptr is not None:
        terms = load_f32(branch_ptr + row_at + columns, mask) * dx
    if dx_ptr is not None:
        tl.store(dx_ptr + row_at + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if dbranch_ptr is not None:
        tl.store(dbranch_ptr + row_at + columns, (gate * dx).to(dbranch_ptr.dtype.element_ty), mask=mask)
    return terms


@triton.jit
def _norm_rows_bwd_kernel(
    dx_new_ptr, dy_ptr, x_ptr, branch_ptr,  # (B, N, D) contiguous; x: as normalised; dx_new None: only y used x
    gate_ptr, scale_ptr,  # (B, D) float32 or bf16, rows of the strides below; gate None without a branch
    mean_ptr, rstd_ptr,  # (B, N) float32
    dx_ptr, dbranch_ptr,  # (B, N, D), of x's and branch's types: written
    dgate_ptr, modulation_ptr,  # (B, slices, D), (2: dshift and dscale, B, slices, D) float32: partial sums, written
    N, slice_rows,  # the rows of a sample, and of one program
    stride_gate, stride_scale,
    D: tl.constexpr, WIDTHS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A result that is not needed, and branch where dgate is not, is None. A program owns slice_rows rows of one
    sample, so what it sums over tokens belongs to one row of the modulation."""
    sample = tl.program_id(0).to(tl.int64)  # the first axis: the others end at 65,535
    piece = tl.program_id(1)
    lane_row = tl.arange(0, ROWS)[None, :, None]
    gain = [1.0 + scale for scale in _modulation(scale_ptr + sample * stride_scale, lane_row, WIDTHS, LANES, D)]
    gate = gain  # without a gate it is not used
    if gate_ptr is not None:
        gate = _modulation(gate_ptr + sample * stride_gate, lane_row, WIDTHS, LANES, D)
    # dmodulation: dshift and dscale of the first tile, then of the second. Other orders of these sums cost registers:
    # figures in benchmarks/RECORDS.md.
    dgate, dmodulation = zero_rows(1, ROWS, WIDTHS, LANES), zero_rows(2, ROWS, WIDTHS, LANES)

    first = piece * slice_rows
    for start in tl.range(first, tl.minimum(first + slice_rows, N), ROWS, num_stages=STAGES):
        token = start + lane_row
        in_rows = token < N
        row = sample * N + token
        x, dy, sums = (), (), None
        for i in tl.static_range(len(WIDTHS)):
            columns, mask = tile_at(i, in_rows, WIDTHS, LANES, D)
            # Where a mask is off dy is 0, so the value of x there (-mean rstd, finite) reaches no sum.
            x_tile, dy_tile = load_f32(x_ptr + row * D + columns, mask), load_f32(dy_ptr + row * D + columns, mask)
            if i == 0:  # behind the row's first loads: before them it took 153 registers, not 142 (float32, D = 1152)
                mean = tl.load(mean_ptr + row, mask=in_rows, other=0.0)
                rstd = tl.load(rstd_ptr + row, mask=in_rows, other=0.0)
            x_tile = (x_tile - mean) * rstd
            if modulation_ptr is not None:
                dmodulation = add_tile(dmodulation, 2 * i, dy_tile)
                dmodulation = add_tile(dmodulation, 2 * i + 1, dy_tile * x_tile)
            dy_tile *= gain[i]
            x, dy, sums = append(x, x_tile), append(dy, dy_tile), plus(sums, row_sums(dy_tile, dy_tile * x_tile))
        mean_dy, mean_dyx = tl.split(sums * (1.0 / D))
        offset = mean_dy[None, :, None] * rstd
        slope = mean_dyx[None, :, None] * rstd
        for i in tl.static_range(len(WIDTHS)):
            columns, mask = tile_at(i, in_rows, WIDTHS, LANES, D)
            dx = dy[i] * rstd - (x[i] * slope + offset)
            terms = _split_gradient(dx, dx_new_ptr, branch_ptr, gate[i], dx_ptr, dbranch_ptr, row * D, columns, mask)
            if dgate_ptr is not None:
                dgate = add_tile(dgate, i, terms)

    part = (sample * tl.num_programs(1) + piece) * D
    one_sum = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * D
    for i in tl.static_range(len(WIDTHS)):
        columns = tile_columns(i, WIDTHS, LANES)
        if dgate_ptr is not None:
            store_slice(dgate_ptr + part, dgate[i], columns, D)
        if modulation_ptr is not None:
            store_slice(modulation_ptr + part, dmodulation[2 * i], columns, D)
            store_slice(modulation_ptr + one_sum + part, dmodulation[2 * i + 1], columns, D)


def norm_rows_fwd(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype,
    launch_config: ChooseLaunch,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x', y, mean, rstd) as the ops' launchers describe them; x' is None where branch and gate are."""
    B, N, D = x.shape
    x_new = None if branch is None else torch.empty_like(x)
    y = torch.empty_like(x, dtype=out_dtype)
    mean = torch.empty((B, N), device=x.device, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return x_new, y, mean, rstd
    tiles = launch_config(B * N, D, narrowest(x, branch, y, gate, shift, scale)).forward
    _norm_rows_fwd_kernel[(triton.cdiv(B * N, tiles.rows),)](
        x, branch,
        gate, shift, scale,
        x_new, y,
        mean, rstd,
        B * N, N,
        0 if gate is None else gate.stride(0), shift.stride(0), scale.stride(0),
        eps,
        D=D, **tiles.constexprs(),
    )  # fmt: skip
    return x_new, y, mean, rstd


def norm_rows_bwd(
    dx_new: torch.Tensor | None,
    dy: torch.Tensor,
    x: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    scale: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    needs: tuple[bool, bool, bool, bool],
    launch_config: ChooseLaunch,
) -> tuple[torch.Tensor | None, ...]:
    """(dx, dbranch, dgate, dshift, dscale) as the ops' launchers describe them.

    needs: whether dx, dbranch, dgate, and both of the modulation are wanted; without branch and gate the middle ones
    are not. None for what is not.
    """
    need_dx, need_dbranch, need_dgate, need_modulation = needs
    B, N, D = x.shape
    dx = torch.empty_like(x) if need_dx else None
    dbranch = torch.empty_like(branch) if branch is not None and need_dbranch else None
    dtypes = [] if gate is None else [gate.dtype] * need_dgate
    dtypes += [scale.dtype] * (2 * need_modulation)
    if x.numel() == 0:
        sums = [x.new_zeros((B, D), dtype=dtype) for dtype in dtypes]
    else:
        config = launch_config(B * N, D, narrowest(x, dy, branch, gate, scale))
        tiles = config.backward
        slices, slice_rows = cut_samples(B, N, tiles.rows, BACKWARD_PROGRAMS * multiprocessors(x.device))
        partial = x.new_empty((len(dtypes), B, slices, D), dtype=torch.float32)
        _norm_rows_bwd_kernel[(B, slices)](
            dx_new, dy, x, branch if need_dgate else None,
            gate, scale,
            mean, rstd,
            dx, dbranch,
            partial[0] if need_dgate else None, partial[int(need_dgate) :] if need_modulation else None,
            N, slice_rows,
            0 if gate is None else gate.stride(0), scale.stride(0),
            D=D, STAGES=config.backward_stages, **tiles.constexprs(),
        )  # fmt: skip
        sums = list(sum_slices(partial, dtypes)) if dtypes else []
    dgate = sums.pop(0) if need_dgate else None
    dshift, dscale = sums if need_modulation else (None, None)
    return dx, dbranch, dgate, dshift, dscale
