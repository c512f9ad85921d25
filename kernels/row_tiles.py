"""How the normalisation kernels cover rows of D columns, and the few steps they share.

Triton's blocks are powers of two, and SiT-XL's D = 1152 padded to 2048 would leave 44 % of the lanes idle. A row is
therefore two tiles: the largest power of two in D, and the rest rounded up to a power of two. 384, 768, 1152 and 2304
come out exact, and no D wastes more than a third. In the kernels a row is a tuple with one entry a tile, and the
functions here that take a row walk that tuple, so nothing is written twice for the second tile.

A tile is a (chunks, rows, lanes) block. The compiler hands the last axis to the threads first, the middle axis to the
warps, and keeps the first in registers: with `lanes` what one warp moves in one 16-byte access each, a warp owns whole
rows and a row's sum needs shuffles only, no shared memory and no barrier. Where a row is too long for the registers of
one warp, `lanes` widens over several.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

WARP = 32
VECTOR_BYTES = 16
PROGRAM_WARPS = 4
MAX_COLUMNS = 8192
ASSUMED_MULTIPROCESSORS = 132  # an H100 or H200; used where there is no device to ask


@dataclass(frozen=True)
class RowTiles:
    """The blocks of one kernel: a program holds `rows` rows at once, each `main` and then `tail` (0: none) columns."""

    main: int
    tail: int
    lanes: int
    rows: int
    num_warps: int

    def constexprs(self) -> dict[str, Any]:
        """The keyword arguments every row kernel takes; WIDTHS, LANES: columns and lanes of the one or two tiles."""
        widths = (self.main, self.tail) if self.tail else (self.main,)
        lanes = tuple(min(self.lanes, width) for width in widths)
        return {"WIDTHS": widths, "LANES": lanes, "ROWS": self.rows, "num_warps": self.num_warps}


@dataclass(frozen=True)
class RowLaunch:
    """The blocks of an op's two kernels, and how far the backward prefetches."""

    forward: RowTiles
    backward: RowTiles
    backward_stages: int


def split_columns(D: int) -> tuple[int, int]:
    """(main, tail): powers of two, tail possibly 0, with main + tail >= D and the least padding two tiles allow."""
    main = 1 << (D.bit_length() - 1)
    tail = triton.next_power_of_2(D - main) if main < D else 0
    return (2 * main, 0) if tail == main else (main, tail)


def choose_tiles(rows: int, D: int, dtype: torch.dtype, columns_per_thread: int) -> RowTiles:
    """Tiles in which a thread holds at most `columns_per_thread` columns, all rows of the program counted.

    rows: how many rows there are in all; few rows make small programs, so that they spread over the device.
    dtype: the narrowest type the kernel moves: its 16-byte access sets how many columns a warp covers at once.
    """
    if not 1 <= D <= MAX_COLUMNS:
        raise ValueError(f"row_tiles: D must be from 1 to {MAX_COLUMNS}, got {D}")
    main, tail = split_columns(D)
    warps_per_row = 1
    while main + tail > columns_per_thread * WARP * warps_per_row:
        warps_per_row *= 2
    num_warps = max(PROGRAM_WARPS, warps_per_row)
    while num_warps > warps_per_row and rows * warps_per_row < ASSUMED_MULTIPROCESSORS * num_warps:
        num_warps //= 2
    lanes = WARP * VECTOR_BYTES // dtype.itemsize * warps_per_row
    return RowTiles(main, tail, min(lanes, main), num_warps // warps_per_row, num_warps)


def cut_samples(B: int, N: int, rows: int, programs: int) -> tuple[int, int]:
    """(slices, slice_rows): cut the N tokens of each of B samples so that about `programs` programs share them all.

    slice_rows is a multiple of `rows`, so only a sample's last program meets a masked row.
    """
    wanted = max(1, min(programs // max(B, 1), triton.cdiv(N, rows)))
    slice_rows = triton.cdiv(triton.cdiv(N, wanted), rows) * rows
    return triton.cdiv(N, slice_rows), slice_rows


def narrowest(*tensors: torch.Tensor | None) -> torch.dtype:
    """The smallest element type among the tensors that are there."""
    return min((tensor.dtype for tensor in tensors if tensor is not None), key=lambda dtype: dtype.itemsize)


def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of a device."""
    return _cuda_multiprocessors(device) if device.type == "cuda" else ASSUMED_MULTIPROCESSORS


@functools.cache
def _cuda_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def tile_columns(i: tl.constexpr, WIDTHS: tl.constexpr, LANES: tl.constexpr):
    """(chunks, 1, lanes) column numbers of tile i; the second begins where the first ends."""
    chunk = tl.arange(0, WIDTHS[i] // LANES[i])[:, None, None]
    return i * WIDTHS[0] + chunk * LANES[i] + tl.arange(0, LANES[i])[None, None, :]


@triton.jit
def tile_at(i: tl.constexpr, in_rows, WIDTHS: tl.constexpr, LANES: tl.constexpr, D: tl.constexpr):
    """Tile i's column numbers, and the (chunks, rows, lanes) mask of what exists in it.

    Columns are compared with D in a padded tile only; in an exact one the comparison is of constants.
    """
    columns = tile_columns(i, WIDTHS, LANES)
    if i * WIDTHS[0] + WIDTHS[i] > D:
        return columns, in_rows & (columns < D)
    else:
        return columns, in_rows & (columns >= 0)


@triton.jit
def load_f32(pointer, mask):
    """A tile as float32, 0 where the mask is off."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def append(row, tile):
    """A row with one more tile."""
    row += (tile,)
    return row


@triton.jit
def plus(total, more):
    """total + more, where None is nothing yet: adding to 0.0 would be one instruction more for each element."""
    if total is None:
        return more
    else:
        return total + more


@triton.jit
def _zero_tile(CHUNKS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    return tl.zeros((CHUNKS, ROWS, LANES), tl.float32)


@triton.jit
def zero_rows(SUMS: tl.constexpr, ROWS: tl.constexpr, WIDTHS: tl.constexpr, LANES: tl.constexpr):
    """Accumulators: SUMS zero tiles for the first tile of a row, then as many for the second."""
    rows = ()
    for i in tl.static_range(len(WIDTHS)):
        for _ in tl.static_range(SUMS):
            rows = append(rows, _zero_tile(WIDTHS[i] // LANES[i], ROWS, LANES[i]))
    return rows


@triton.jit
def add_tile(rows, i: tl.constexpr, tile):
    """rows with `tile` added to its tile i."""
    total = ()
    for j in tl.static_range(len(rows)):
        total = append(total, rows[j] + tile if j == i else rows[j])
    return total


@triton.jit
def row_sum(tile):
    """(chunks, rows, lanes) -> (1, rows, 1): within each thread first, then across the lanes."""
    return tl.sum(tl.sum(tile, axis=0), axis=1)[None, :, None]


@triton.jit
def row_sums(a, b):
    """Both row sums of (chunks, rows, lanes) tiles as (rows, 2): one exchange between warps instead of two."""
    return tl.sum(tl.sum(tl.join(a, b), axis=0), axis=1)


@triton.jit
def store_row(pointer, row, value, in_rows):
    """Store one number a row. The first lane of each row does it, where the value already is: a (rows,) store would
    take a layout of its own, and a trip through shared memory to reach it."""
    lane = tl.arange(0, 32)[None, None, :]
    tl.store(pointer + row + lane * 0, value + lane * 0.0, mask=in_rows & (lane == 0))


@triton.jit
def store_slice(pointer, tile, columns, D: tl.constexpr):
    """Sum a (chunks, rows, lanes) accumulator over its rows and store its columns."""
    tl.store(pointer + columns, tl.sum(tile, axis=1)[:, None, :], mask=columns < D)


@triton.jit
def _sum_slices_kernel(
    partial_ptr,  # (sums, B, slices, D) float32
    first_ptr, second_ptr, third_ptr,  # (B, D) each, any float type: what comes out; with fewer sums some repeat
    slices,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)  # the first axis: the others end at 65,535
    which = tl.program_id(2)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    first = (which.to(tl.int64) * tl.num_programs(0) + sample) * slices
    total = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for start in range(0, slices, BLOCK_S):
        piece = start + tl.arange(0, BLOCK_S)[:, None]
        mask = (piece < slices) & (column < D)
        total += tl.load(partial_ptr + (first + piece) * D + column, mask=mask, other=0.0)
    result = tl.sum(total, axis=0)[None, :]
    outputs = (first_ptr, second_ptr, third_ptr)
    for i in tl.static_range(3):
        if which == i:
            tl.store(outputs[i] + sample * D + column, result.to(outputs[i].dtype.element_ty), mask=column < D)


def sum_slices(partial: torch.Tensor, dtypes: Sequence[torch.dtype]) -> tuple[torch.Tensor, ...]:
    """partial: (1 to 3, B, slices, D) float32 -> as many (B, D) sums over the slices, rounded to dtypes, in one launch.

    Separate tensors, not views of one: outputs of a registered op must not alias. The order of the sum is fixed.
    """
    count, B, slices, D = partial.shape
    sums = tuple(torch.empty((B, D), device=partial.device, dtype=dtype) for dtype in dtypes)
    block_d = min(128, triton.next_power_of_2(D))
    block_s = min(16, triton.next_power_of_2(slices))
    grid = (B, triton.cdiv(D, block_d), count)
    _sum_slices_kernel[grid](
        partial, sums[0], sums[min(1, count - 1)], sums[-1], slices, D=D, BLOCK_D=block_d, BLOCK_S=block_s, num_warps=4
    )
    return sums
