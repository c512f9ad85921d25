"""Addresses and chunks of many tensors as small device tensors, so that one launch can walk all of them.

The chunks depend on the sizes alone and are made once. The addresses, 14 kB for SiT-XL's 350 tensors, are kept while
they stay the same, which they do from step to step for parameters and optimizer state and mostly for gradients; new
ones cost a fraction of a millisecond of the host and one copy from pinned memory that nothing waits for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

CHUNK = 4096
KEPT_TABLES = 16
ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class ChunkTable:
    """How tensors are cut into chunks of CHUNK elements.

    numels: (tensors,) int64. chunk_tensor, chunk_number: (chunks,) int32, the tensor a chunk belongs to and its place
    there. chunks: how many.
    """

    numels: torch.Tensor
    chunk_tensor: torch.Tensor
    chunk_number: torch.Tensor
    chunks: int


@dataclass(frozen=True)
class AddressTable:
    """addresses: (lists, tensors) int64; is_aligned: every one is a multiple of 16; pinned: what it is copied from."""

    addresses: torch.Tensor
    is_aligned: bool
    pinned: torch.Tensor


_chunk_tables: dict[tuple[object, ...], ChunkTable] = {}
_address_tables: OrderedDict[tuple[object, ...], AddressTable] = OrderedDict()
_captured: list[object] = []
_spare_pinned: dict[torch.Size, torch.Tensor] = {}


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def chunk_table(tensors: Sequence[torch.Tensor]) -> ChunkTable:
    """The chunks of a list of tensors. The first call for these sizes waits for its copy, unless it is captured."""
    device = tensors[0].device
    numels = tuple(tensor.numel() for tensor in tensors)
    key = (device, numels)
    if key in _chunk_tables:
        return _chunk_tables[key]
    counts = torch.tensor(numels, dtype=torch.int64)
    chunks_each = (counts + CHUNK - 1) // CHUNK
    first_chunk = chunks_each.cumsum(0) - chunks_each
    chunk_tensor = torch.repeat_interleave(torch.arange(len(numels)), chunks_each)
    chunk_number = torch.arange(len(chunk_tensor)) - first_chunk[chunk_tensor]
    host = (counts, chunk_tensor.int(), chunk_number.int())
    if _is_capturing(device):
        # A replay copies again, so the staging memory must live, and until the first replay the table is empty: nobody
        # else may find it.
        pinned = [tensor.pin_memory() for tensor in host]
        on_device = [tensor.to(device, non_blocking=True) for tensor in pinned]
        _captured.append((on_device, pinned))
        return ChunkTable(on_device[0], on_device[1], on_device[2], len(chunk_tensor))
    on_device = [tensor.to(device) for tensor in host]
    return _chunk_tables.setdefault(key, ChunkTable(on_device[0], on_device[1], on_device[2], len(chunk_tensor)))


def address_table(lists: Sequence[Sequence[torch.Tensor]]) -> AddressTable:
    """The addresses of lists of equally many tensors on one device, valid on the current stream."""
    device = lists[0][0].device
    addresses = tuple(tuple(tensor.data_ptr() for tensor in tensors) for tensors in lists)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream, addresses)
    is_capturing = _is_capturing(device)
    table = None if is_capturing else _address_tables.get(key)
    if table is None:
        host = torch.tensor(addresses, dtype=torch.int64)
        if device.type == "cuda":
            host = _pinned(host, is_capturing)
        is_aligned = all(address % ALIGNMENT_BYTES == 0 for row in addresses for address in row)
        table = AddressTable(host.to(device, non_blocking=True), is_aligned, host)
    if is_capturing:  # as in chunk_table
        _captured.append(table)
        return table
    _address_tables[key] = table
    _address_tables.move_to_end(key)
    if len(_address_tables) > KEPT_TABLES:
        _address_tables.popitem(last=False)
    return table


def _pinned(values: torch.Tensor, is_capturing: bool) -> torch.Tensor:
    """A copy in pinned memory. A capture takes memory set aside by the step before it: it must not allocate any."""
    spare = _spare_pinned.pop(values.shape, None) if is_capturing else None
    if spare is not None:
        return spare.copy_(values)
    if not is_capturing and values.shape not in _spare_pinned:
        _spare_pinned[values.shape] = torch.empty_like(values, pin_memory=True)
    return values.pin_memory()
