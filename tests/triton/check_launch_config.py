"""The pure launch choices of kernels/: what they cover, for every size. Run by test_triton.py in its own process."""

from __future__ import annotations

import pytest
import torch
from sra2_fast.kernels import adamw_ema, alignment_velocity_loss, row_tiles
from sra2_fast.kernels import gated_residual_layer_norm_modulate as gated
from sra2_fast.kernels import layer_norm_modulate as plain

F32, BF16 = torch.float32, torch.bfloat16
ROWS = 32 * 256


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def test_two_tiles_cover_every_row_and_waste_at_most_a_third() -> None:
    for D in range(1, row_tiles.MAX_COLUMNS + 1):
        main, tail = row_tiles.split_columns(D)
        assert is_power_of_two(main) and (tail == 0 or (is_power_of_two(tail) and tail < main))
        assert main + tail >= D and 3 * (main + tail - D) <= main + tail


@pytest.mark.parametrize("D", [384, 768, 1024, 1152, 2304])
def test_model_widths_waste_nothing(D: int) -> None:
    assert sum(row_tiles.split_columns(D)) == D


@pytest.mark.parametrize("kernels", [plain, gated])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_tiles_are_blocks_the_compiler_takes(kernels, dtype: torch.dtype) -> None:
    for rows in (1, 300, ROWS):
        for D in (1, 4, 72, 384, 1000, 1152, 4608, 8191, 8192):
            config = kernels.launch_config(rows, D, dtype)
            for tiles in (config.forward, config.backward):
                constexprs = tiles.constexprs()
                sizes = [*constexprs.pop("WIDTHS"), *constexprs.pop("LANES"), *constexprs.values()]
                assert len(sizes) >= 4 and all(is_power_of_two(size) for size in sizes)
                assert tiles.main % tiles.lanes == 0 and tiles.num_warps <= 32


def test_few_rows_make_small_programs() -> None:
    """132 rows on 132 multiprocessors: a program each, not four to every fourth."""
    assert plain.launch_config(132, 384, BF16).forward.rows == 1
    assert plain.launch_config(ROWS, 384, BF16).forward.rows == 4


@pytest.mark.parametrize("D", [0, 8193])
def test_a_width_the_kernels_do_not_take(D: int) -> None:
    with pytest.raises(ValueError, match=f"row_tiles: D must be from 1 to 8192, got {D}"):
        plain.launch_config(ROWS, D, F32)


def test_slices_cover_every_token_once() -> None:
    for B in (1, 3, 32, 1000):
        for N in (1, 7, 256, 4096):
            for rows in (1, 2, 4):
                slices, slice_rows = row_tiles.cut_samples(B, N, rows, 396)
                assert slice_rows % rows == 0
                assert (slices - 1) * slice_rows < N <= slices * slice_rows
                assert B * slices <= max(396 + B, B)


def test_the_product_has_a_block_for_every_patch() -> None:
    for P in (1, 4, 12, 16, 64, 255, 256):
        for K in (1, 48, 768, 4608):
            for dtype in (F32, BF16):
                config = alignment_velocity_loss.launch_config(ROWS, K, P, dtype)
                assert config.block_p >= max(P, 16) and config.block_k >= 16 and config.block_t >= 16
    assert alignment_velocity_loss.launch_config(ROWS, 2304, 16, BF16).block_t == 64


def test_optimizer_blocks_cut_a_chunk_evenly() -> None:
    config = adamw_ema.launch_config(1, 1, F32)
    assert adamw_ema.CHUNK % config.block == 0 and config == adamw_ema.launch_config(10**9, 1, F32)
