"""The endless shuffle: which sample stands at global position p, as a function of (seed, p) alone.

Epoch e is a permutation keyed by (seed, e); position p is entry p mod n of epoch p div n. With `block_size`, samples
that lie together on disk stay near each other: the blocks are shuffled, then the samples within windows of a few
blocks, so that reads touch one window at a time and each of its blocks is read once, in full.
"""

from __future__ import annotations

import numpy as np

from ..randomness import Stream, generator

WINDOW_BLOCKS = 64


class EndlessShuffle:
    """Samples 0..num_samples-1, each once an epoch.

    Only one epoch's order is kept (8 bytes a sample), so `take` is meant for positions that grow.
    """

    def __init__(self, num_samples: int, seed: int, block_size: int | None = None) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.block_size = block_size
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """(num_samples,) int64: the samples of `epoch` in their order."""
        draws = generator(Stream.SHUFFLE, self.seed, epoch)
        if self.block_size is None:
            return draws.permutation(self.num_samples)
        num_blocks = -(-self.num_samples // self.block_size)
        starts = draws.permutation(num_blocks) * self.block_size
        order = (starts[:, None] + np.arange(self.block_size)).reshape(-1)
        order = order[order < self.num_samples]
        for start in range(0, self.num_samples, self.window_size):
            draws.shuffle(order[start : start + self.window_size])
        return order

    @property
    def window_size(self) -> int:
        """Samples in one window of the block shuffle; a whole epoch without blocks."""
        return self.num_samples if self.block_size is None else self.block_size * WINDOW_BLOCKS

    def take(self, first: int, count: int) -> np.ndarray:
        """(count,) int64: the samples at global positions first .. first + count - 1."""
        parts = []
        while count > 0:
            epoch, offset = divmod(first, self.num_samples)
            if epoch != self._epoch:
                self._order, self._epoch = self.epoch_order(epoch), epoch
            part = self._order[offset : offset + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def window(self, position: int) -> tuple[int, np.ndarray]:
        """The window that holds global position `position`: the position after it, and its samples."""
        epoch, offset = divmod(position, self.num_samples)
        inside = offset // self.window_size * self.window_size
        count = min(self.window_size, self.num_samples - inside)
        first = epoch * self.num_samples + inside
        return first + count, self.take(first, count)
