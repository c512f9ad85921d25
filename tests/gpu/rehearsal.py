"""Sizes for a rehearsal of these tests on a CPU in a GPU's place (benchmarks/lib/cuda_stand_in.py)."""

from __future__ import annotations

from typing import TypeVar

import pytest
from lib import cuda_stand_in

T = TypeVar("T")
IS_REHEARSAL = cuda_stand_in.is_installed()
of_a_gpu_alone = pytest.mark.skipif(IS_REHEARSAL, reason="a CPU in a GPU's place does not have what is tested")


def sized(full: T, rehearsed: T) -> T:
    """The sizes of a test: what a GPU is tested with, or what an interpreter gets through."""
    return rehearsed if IS_REHEARSAL else full
