"""REPA-E's cached latents in HDF5, read as they are.

    e2e-vavae.h5              datasets 00000/img-mean-std-00000000.npy: (2C, H, W) = [mean, std], not scaled, and
                              dataset.json: {"labels": [["00000/img-mean-std-00000000.npy", 207], ...]}
    e2e-vavae_h5.json         the names again; not read
    e2e-vavae-latents-stats.pt    {"latents_bias", "latents_scale"}, where it is copied here from beside the autoencoder

The file itself and its folder (which holds images.h5 beside it) are both accepted. Without the statistics every channel
is brought to mean 0 and standard deviation 1 as measured, which is what REPA-E's batch norm does.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from ..normalisation import Numbers, normalise_as_recorded_or_measured
from ..source import LatentSource, digest
from .npy_files import SUFFIX, one_line
from .vae_sd import LABELS_FILE, STATS_SUFFIX, labels_of

ENDING, IMAGES = ".h5", "images.h5"
AGAIN = "run REPA-E's cache_latents.py again"


def is_repa_e(path: Path) -> bool:
    """Whether `path` is an HDF5 file, or a folder with one of latents."""
    return bool(_files(path))


class RepaESource(LatentSource):
    """One HDF5 file of latents; it is opened once a process. Names and labels are held in memory."""

    has_posterior = True

    def __init__(
        self,
        path: Path,
        latent_scale: Numbers | None = None,
        latent_shift: Numbers | None = None,
        ignore_labels: bool = False,
    ) -> None:
        """latent_scale, latent_shift: where there are no statistics; ignore_labels: only the names are taken."""
        found = _files(path)
        if len(found) > 1:
            raise InputError(f"data: {path} holds {' and '.join(one.name for one in found)}; give the file to train on")
        (self.path,) = found
        self.name = str(self.path)
        self._opened: tuple[int, Any] | None = None
        labels = self._read_labels()
        self._keys = sorted(key for key in labels if key.endswith(SUFFIX))
        if not self._keys:
            raise InputError(f"data: {self.path} holds no latents by its {LABELS_FILE}; {AGAIN}")
        self.num_samples = len(self._keys)
        self.has_labels = not ignore_labels
        numbers = [0 if ignore_labels else labels[key] for key in self._keys]
        self._labels = np.array(numbers, dtype=np.int64)
        self.num_classes = int(self._labels.max()) + 1
        channels, height, width = self._stored(0).shape
        if channels % 2:
            raise InputError(f"data: {self.describe(0)} must hold [mean, std], got {channels} channels")
        self.shape = (channels // 2, height, width)
        self.notes = []
        stats = self.path.with_name(self.path.stem + STATS_SUFFIX)
        told, missing = (latent_scale, latent_shift), f"{stats} is missing (it lies beside REPA-E's autoencoder)"
        normalise_as_recorded_or_measured(self, stats, told, missing, "latents_bias", scale="latents_scale")

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """indices: (n,) -> [mean, std] (n, 2C, H, W) float32, labels (n,) int64."""
        channels, height, width = self.shape
        values = np.empty((len(indices), 2 * channels, height, width), dtype=np.float32)
        for row, index in zip(values, indices, strict=True):
            stored = self._stored(int(index))
            if stored.shape != row.shape:
                raise InputError(f"data: {self.describe(int(index))} must be {row.shape}, got {stored.shape}; {AGAIN}")
            row[...] = stored
        return values, self._labels[indices]

    def describe(self, index: int) -> str:
        return f"{self.path}, {self._keys[index]}"

    def fingerprint(self) -> str:
        """Of all names and labels, and of the values of a sample."""
        return digest(super().fingerprint(), "\n".join(self._keys), self._labels)

    def _read_labels(self) -> dict[str, int]:
        try:
            entries = json.loads(np.asarray(self._file()[LABELS_FILE]).tobytes().rstrip(b"\0"))["labels"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"data: {self.path} has no {LABELS_FILE} that can be read ({one_line(error)}); {AGAIN}"
            ) from error
        labels = labels_of(entries, f"{self.path}, {LABELS_FILE}")
        if labels is None:
            raise InputError(f"data: {self.path}: the labels of {LABELS_FILE} are null; {AGAIN}")
        return labels

    def _stored(self, index: int) -> np.ndarray:
        try:
            stored = np.asarray(self._file()[self._keys[index]])
        except (OSError, KeyError, ValueError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"data: {self.describe(index)} cannot be read ({one_line(error)}); {AGAIN}") from error
        if stored.ndim != 3 or stored.dtype.kind != "f":
            raise InputError(
                f"data: {self.describe(index)} must be (2C, H, W) floats, got {stored.shape} {stored.dtype}; {AGAIN}"
            )
        return stored

    def _file(self) -> Any:
        """The open file of this process: HDF5's own state does not survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                import h5py
            except ImportError as error:
                raise InputError(f"data: {self.path} needs h5py; pip install h5py") from error
            try:
                self._opened = (os.getpid(), h5py.File(self.path, "r"))
            except OSError as error:
                raise InputError(f"data: {self.path} cannot be opened ({one_line(error)}); {AGAIN}") from error
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes, which open the file themselves."""
        return {**self.__dict__, "_opened": None}


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix == ENDING else []
    return sorted(file for file in path.glob(f"*{ENDING}") if file.name != IMAGES)
