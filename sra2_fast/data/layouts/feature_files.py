"""Encoder features as REPA lays out its latents: a .npy a sample in `features/`, beside vae-sd/ or vae-in/.

    features/00000/img-features-00000000.npy    (N, F) or (1, N, F), float16 or float32

A name ends in the number of the latent it belongs to (img-mean-std-00000000.npy); what stands before it is free.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from ...errors import InputError
from ..features import FeatureSource
from ..source import LatentSource, digest
from .npy_files import SUFFIX, NpyFolderSource, read_npy
from .vae_sd import FOLDERS

FOLDER = "features"
SAMPLED_FOR_FINGERPRINT = 64


def find_feature_files(path: Path) -> Path | None:
    """The folder of features in `path`, or beside it where `path` is the folder of latents itself."""
    candidates = [path / FOLDER, *([path.parent / FOLDER] if path.name in FOLDERS else [])]
    return next((folder for folder in candidates if folder.is_dir()), None)


class FeatureFiles(FeatureSource):
    """A folder features/. Names are held in memory; every sample is a file, read when asked for."""

    def __init__(self, folder: Path, source: LatentSource) -> None:
        self.folder, self.name = folder, str(folder)
        latents = getattr(source, "labelled", source)
        if not isinstance(latents, NpyFolderSource):
            raise InputError(f"data: {folder} is for latents that are a file each, not for {source.name}; move it")
        found: dict[int, str] = {}
        for parent, _, names in os.walk(folder):
            for name in names:
                number = _number(name)
                if number is None:
                    continue
                file = os.path.join(os.path.relpath(parent, folder), name)
                if number in found:
                    raise InputError(f"data: {folder} has two files of sample {number}, {found[number]} and {file}")
                found[number] = file
        self._files: list[str] = []
        for name in latents.files:
            number = _number(name)
            if number is None or number not in found:
                raise InputError(
                    f"data: {folder} has no features of {latents.folder / name} (a .npy whose name ends in its "
                    "number); compute them"
                )
            self._files.append(found[number])
        first = self._load(0)
        self.num_tokens, self.width = first.shape
        self.dtype = np.float16 if first.dtype == np.float16 else np.float32

    def read(self, indices: np.ndarray, flipped: np.ndarray | None = None) -> np.ndarray:
        """indices: (n,) -> (n, N, F), float16 where the first file is, else float32."""
        values = np.empty((len(indices), self.num_tokens, self.width), dtype=self.dtype)
        for row, index in zip(values, indices, strict=True):
            stored = self._load(int(index))
            if stored.shape != row.shape:
                raise InputError(
                    f"data: {self.describe(int(index))} must be {row.shape}, got {stored.shape}; compute them again"
                )
            row[...] = stored
        return values

    def describe(self, index: int) -> str:
        return str(self.folder / self._files[index])

    def fingerprint(self) -> str:
        """Of all names, and of the values of a sample of the files."""
        count = min(SAMPLED_FOR_FINGERPRINT, len(self._files))
        chosen = np.linspace(0, len(self._files) - 1, count).astype(np.int64)
        return digest("\n".join(self._files), self.read(chosen))

    def _load(self, index: int) -> np.ndarray:
        stored = read_npy(self.folder / self._files[index])
        if stored.ndim == 3 and stored.shape[0] == 1:
            stored = stored[0]
        if stored.ndim != 2 or stored.dtype.kind != "f":
            raise InputError(
                f"data: {self.describe(index)} must be (N, F) floats, got {stored.shape} {stored.dtype}; "
                "compute them again"
            )
        return stored


def _number(name: str) -> int | None:
    found = re.search(rf"(\d+){re.escape(SUFFIX)}$", name)
    return int(found[1]) if found else None
