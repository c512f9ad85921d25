"""Samples of a source in a given order, read by worker processes: for what goes through a whole data set once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ..errors import InputError
from .source import LatentSource


class Chunk(NamedTuple):
    """Samples that were read together."""

    values: torch.Tensor  # (n, 2C or C, H, W) float32, as `LatentSource.read` gives them
    labels: torch.Tensor  # (n,) int64
    flips: torch.Tensor | None  # like values, of the mirrored images, where the source has them


class Chunks(Dataset):
    """Item i is the samples chunks[i]. An InputError is returned, for BatchLoader to raise."""

    def __init__(self, source: LatentSource, chunks: list[np.ndarray]) -> None:
        self.source, self.chunks = source, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, item: int) -> Chunk | InputError:
        source, samples = self.source, self.chunks[item]
        try:
            values, labels = source.read(samples)
            source.check_finite(values, samples)
            flips = None
            if source.has_flips:
                flips, _ = source.read_flipped(samples, np.ones(len(samples), dtype=bool))
                source.check_finite(flips, samples)
        except InputError as error:
            return error
        parts = (values, labels, flips)
        return Chunk(*(None if part is None else torch.from_numpy(part) for part in parts))  # type: ignore[arg-type]
