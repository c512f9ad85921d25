"""What counts as out of memory: the allocators' own errors, and nothing that only looks like them."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import torch

from sra2_fast.errors import InputError, is_out_of_memory

PETABYTE = 1 << 50


def test_a_cpu_without_memory_is_a_plain_runtime_error_of_torch() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(PETABYTE, dtype=torch.uint8)
    assert type(caught.value) is RuntimeError  # why its words must be read
    assert is_out_of_memory(caught.value)


def test_numpys_and_pythons_own_errors_count() -> None:
    with pytest.raises(MemoryError) as caught:
        np.empty(PETABYTE, dtype=np.uint8)
    assert is_out_of_memory(caught.value) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_gpus_errors_count(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        OSError(errno.ENOSPC, "No space left on device"),
        InputError("train: --batch-size must be at least 1, got 0"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_do_not(error: BaseException) -> None:
    assert not is_out_of_memory(error)
