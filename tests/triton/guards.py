"""Allocations that show reads and writes out of bounds, and elements nobody wrote.

The interpreter checks no bounds. So inputs lie between NaNs, which poison a result that reads beyond them, and
whatever a launcher allocates starts as NaN between guard bytes that must be intact afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

GUARD_BYTES = 4096
PATTERN = 0xFF  # a NaN in every floating type, -1 in integers


def _guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    size = torch.Size(shape).numel() * dtype.itemsize
    storage = torch.full((size + 2 * GUARD_BYTES,), PATTERN, dtype=torch.uint8)
    return storage, storage[GUARD_BYTES : GUARD_BYTES + size].view(dtype).view(shape)


def between_nans(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, of any strides, with NaNs on both sides of its memory."""
    assert tensor.dim() > 0
    extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    if tensor.numel() == 0:
        return tensor.clone()
    _, flat = _guarded((extent,), tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


@contextmanager
def guarded_allocations() -> Iterator[None]:
    """Every torch.empty and torch.empty_like inside is guarded; leaving it checks the guards."""
    empty, empty_like, storages = torch.empty, torch.empty_like, []

    def guarded_empty(*shape, dtype=torch.float32, device=None):
        shape = tuple(shape[0]) if shape and not isinstance(shape[0], int) else shape
        storage, tensor = _guarded(shape, dtype)
        storages.append((storage, tensor.numel() * dtype.itemsize))
        return tensor

    def guarded_empty_like(tensor, *, dtype=None):
        return guarded_empty(tuple(tensor.shape), dtype=dtype or tensor.dtype)

    torch.empty, torch.empty_like = guarded_empty, guarded_empty_like
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, empty_like
    for storage, size in storages:
        outside = torch.cat([storage[:GUARD_BYTES], storage[GUARD_BYTES + size :]])
        assert bool((outside == PATTERN).all()), "a kernel wrote outside a tensor"
