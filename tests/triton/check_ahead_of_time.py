"""The real launchers compiled for sm_80 and sm_90 without a GPU: spills, shared memory, instructions, bytes.

Run by test_triton.py in a process of its own: the fake driver belongs to no process that runs other tests.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import aot_table
from lib import aot_compile

ARCH = int(os.environ["SRA2_FAST_ARCH"])
# All model widths where it matters most, the widest on the older chip.
SIZES = ("SiT-S", "SiT-B", "SiT-L", "SiT-XL") if ARCH == 90 else ("SiT-XL",)
CASES = [
    case
    for size in SIZES
    for types in ("autocast", "bfloat16")
    for case in aot_table.row_cases(size, types)
    if types == "autocast" or size == "SiT-XL"
]
CASES += [
    aot_table.loss_case("SiT-XL", "bfloat16"),
    aot_table.loss_case("SiT-XL", "float32", align="smooth_l1"),
    aot_table.loss_case("SiT-XL", "bfloat16", channels=3),
    aot_table.loss_case("SiT-XL", "bfloat16", patch=8),
    *aot_table.optimizer_cases(),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.direction}-{case.size}-{case.types}")
def test_the_compiled_kernels(case: aot_table.Case) -> None:
    records = aot_table.records(case, ARCH)
    assert records
    for record in records:
        assert record["spill_instructions"] == 0, record
        assert record["shared_bytes"] <= aot_compile.SHARED_BYTES_OF_A_PROGRAM[ARCH], record
        assert record["warps"] >= 8, record
        assert record["loads_128"] > 0 or record["kernel"] == "root_of_sum_kernel" or "P=12" in case.size, record
    main = records[0]
    if case.op == "alignment_velocity_loss":
        assert (main["hgmma"] if ARCH == 90 else main["hmma"]) > 0, main
        assert ARCH == 80 or main["hmma"] == 0, main
    # Partial sums are the only bytes beyond the floor.
    assert main["call_bytes"] <= 1.12 * main["floor_bytes"], main


def test_the_inspection_sees_spills_and_missing_matrix_instructions() -> None:
    """So that zero spills, or some HGMMA, are findings: a backward squeezed into 32 registers spills, and has none."""
    from sra2_fast.kernels import norm_rows as kernels

    case = next(case for case in CASES if case.op == "layer_norm_modulate" and case.direction == "backward")
    kernel = kernels._norm_rows_bwd_kernel
    run = type(kernel).run
    try:
        type(kernel).run = lambda self, *args, **kwargs: run(self, *args, **(kwargs | {"maxnreg": 32}))
        record = aot_table.records(case, ARCH)[0]
    finally:
        type(kernel).run = run
    assert record["spill_instructions"] > 0 and record["registers"] <= 32 and record["hgmma"] == record["hmma"] == 0


@pytest.mark.parametrize("gated", [False, True])
def test_a_batch_may_have_more_samples_than_a_grid_has_in_y(gated: bool) -> None:
    """CUDA ends at 65,535 programs in y and z; the batch stood in y."""
    from sra2_fast.kernels import gated_residual_layer_norm_modulate as with_branch
    from sra2_fast.kernels import layer_norm_modulate as plain

    B, N, D = 70_000, 1, 64
    x, rows, statistic = torch.empty(B, N, D), torch.empty(B, D), torch.empty(B, N)
    with aot_compile.compile_only(ARCH) as launches:
        if gated:
            with_branch.gated_residual_layer_norm_modulate_fwd(x, x, rows, rows, rows, 1e-6, torch.float32)
            with_branch.gated_residual_layer_norm_modulate_bwd(x, x, x, x, rows, rows, statistic, statistic)
        else:
            plain.layer_norm_modulate_fwd(x, rows, rows, 1e-6, torch.float32)
            plain.layer_norm_modulate_bwd(x, x, rows, statistic, statistic)
    assert len(launches) == 3
    assert all(max((*launch.grid, 1)[1:]) <= 65_535 for launch in launches), [launch.grid for launch in launches]
