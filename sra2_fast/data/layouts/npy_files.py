"""A training set of one .npy a sample: how such a file is read, and what the layouts of such files share.

A whole file is one read, and a header that was seen before (all samples of a set have the same) is not parsed again:
several times as fast as `np.load` while the files are in the page cache.
"""

from __future__ import annotations

import functools
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...errors import InputError
from ..source import LatentSource, digest

SUFFIX = ".npy"
MAGIC = b"\x93NUMPY"
# The latter from inside numpy, for headers that nobody wrote.
UNREADABLE = (OSError, ValueError, EOFError, OverflowError, TypeError, SyntaxError, RecursionError, MemoryError)


def read_npy(path: str | Path) -> np.ndarray:
    """The array in `path`, read-only; float16 to float64 and integers.

    Raises InputError naming the file where it is missing, cut off, no .npy, or holds Python objects.
    """
    try:
        with open(path, "rb", buffering=0, opener=_without_waiting) as file:
            data = file.read()
        if data[:6] != MAGIC:
            raise ValueError("it is no .npy file")
        # Version 1 has two bytes for the length of the header, later ones four.
        start = 10 + int.from_bytes(data[8:10], "little") if data[6] == 1 else 12 + int.from_bytes(data[8:12], "little")
        dtype, shape, is_fortran = _parse_header(data[:start])
        flat = np.frombuffer(data, dtype, count=math.prod(shape), offset=start)
        return flat.reshape(shape, order="F" if is_fortran else "C")
    except UNREADABLE as error:
        raise InputError(f"data: {path} cannot be read ({one_line(error)}); encode this image again") from error


def _without_waiting(path: str, flags: int) -> int:
    """As open() would; a FIFO would wait for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


@functools.lru_cache(maxsize=64)
def _parse_header(head: bytes) -> tuple[np.dtype, tuple[int, ...], bool]:
    file = io.BytesIO(head)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    if any(size < 0 for size in shape):
        raise ValueError(f"it holds an array of shape {shape}")
    if dtype.kind not in "fiu":
        raise ValueError(
            "it holds a pickle, which is never opened" if dtype.hasobject else f"it holds {dtype}, no numbers"
        )
    return dtype, shape, is_fortran


def read_floats(path: str | Path) -> np.ndarray:
    """(C, H, W) from a file of (C, H, W) or (1, C, H, W), in the type it is stored in: float16, float32 or float64."""
    values = read_npy(path)
    if values.dtype.kind != "f":
        raise InputError(f"data: {path} must hold float16 or float32 latents, got {values.dtype}; encode it again")
    if values.ndim == 4 and values.shape[0] == 1:
        values = values[0]
    if values.ndim != 3:
        raise InputError(f"data: {path} must be one latent, (C, H, W) or (1, C, H, W), got {values.shape}")
    return values


class NpyFolderSource(LatentSource):
    """Samples that are files of one folder, known by their names; held in memory are names and labels alone.

    A subclass calls `_open` with the names and labels and sets the normalisation. `stored_scale`: (C,) that the
    stored numbers were multiplied with already; `read` takes it out again, so that its values are the autoencoder's.
    """

    folder: Path
    stored_scale: np.ndarray | None = None

    def _open(self, folder: Path, files: Sequence[str], labels: np.ndarray | None, has_posterior: bool) -> None:
        """folder, files: where the samples are. labels: (n,) int64, or None for none. Sets all but the normalisation.

        Raises InputError where the first file is unreadable or has an odd number of channels as [mean, std].
        """
        self.folder, self.name = folder, str(folder)
        self._files = list(files)
        self.num_samples = len(self._files)
        self.has_labels = labels is not None
        self._labels = np.zeros(self.num_samples, dtype=np.int64) if labels is None else labels
        self.num_classes = int(self._labels.max()) + 1
        self.has_posterior = has_posterior
        channels, height, width = read_floats(self._path(0)).shape
        if has_posterior and channels % 2:
            raise InputError(f"data: {self.describe(0)} must hold [mean, std], got {channels} channels")
        self.shape = (channels // 2 if has_posterior else channels, height, width)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """indices: (n,) -> values (n, 2C or C, H, W) float32, labels (n,) int64."""
        channels, height, width = self.shape
        values = np.empty((len(indices), channels * (1 + self.has_posterior), height, width), dtype=np.float32)
        for row, index in zip(values, indices, strict=True):
            stored = read_floats(self._path(index))
            if stored.shape != row.shape:
                raise InputError(
                    f"data: {self.describe(int(index))} must be {row.shape}, got {stored.shape}, for {self._files[0]} "
                    "is of that shape; keep latents of one shape"
                )
            row[...] = stored
        if self.stored_scale is not None:
            values /= self.stored_scale[:, None, None]
        return values, self._labels[indices]

    @property
    def files(self) -> list[str]:
        """The names of the samples, in order, relative to `folder`."""
        return self._files

    def describe(self, index: int) -> str:
        return str(self.folder / self._files[index])

    def fingerprint(self) -> str:
        """Of all file names and labels, and of the values of a sample of the files."""
        return digest(super().fingerprint(), "\n".join(self._files), self._labels)

    def _path(self, index: int) -> str:
        return f"{self.folder}/{self._files[index]}"


def in_order(names: list[str]) -> list[str]:
    """Names sorted as numbers where all are (2 before 10), else as text; without the suffix."""
    stems = [name.removesuffix(SUFFIX) for name in names]
    return sorted(stems, key=int) if all(stem.isdecimal() for stem in stems) else sorted(stems)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
