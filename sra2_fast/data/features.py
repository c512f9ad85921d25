"""Encoder features beside latents: what `train --target features` (REPA) aligns with, read from disk.

A FeatureSource belongs to one LatentSource: its sample i is of the same image. Two forms are known:

    shards     features-00000-of-00003.safetensors and features.json in the folder of the latents (prepare --features)
    features/  a .npy a sample beside vae-sd/ or vae-in/ (layouts/feature_files.py)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    from .source import LatentSource

MAX_NAMED = 3


class FeatureSource(ABC):
    """Features of the images of a LatentSource.

    name: for messages. num_tokens, width: N and F of (N, F) features. has_flips: those of the mirrored images too.
    """

    name: str
    num_tokens: int
    width: int
    has_flips: bool = False

    @abstractmethod
    def read(self, indices: np.ndarray, flipped: np.ndarray | None = None) -> np.ndarray:
        """indices: (n,) int64; flipped: (n,) bool, only where `has_flips` -> (n, N, F) float16 or float32."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """Where the features of sample `index` lie."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest that differs when the features do."""

    def check_finite(self, features: np.ndarray, indices: np.ndarray) -> None:
        """Raise an InputError that names the samples with a NaN or an infinity among `features` (n, N, F)."""
        bad = ~np.isfinite(features).all(axis=(1, 2))
        if bad.any():
            named = ", ".join(self.describe(int(index)) for index in indices[bad][:MAX_NAMED])
            raise InputError(f"data: NaN or infinity in the features of {named}; compute them again")


def open_features(path: Path, source: LatentSource) -> FeatureSource:
    """The features that lie beside `source`, opened from `path`. Raises InputError where there are none that fit."""
    from .layouts.feature_files import FeatureFiles, find_feature_files
    from .layouts.feature_shards import FeatureShards, has_feature_shards

    folder = find_feature_files(path)
    if has_feature_shards(path):
        features: FeatureSource = FeatureShards(path, source)
    elif folder is not None:
        features = FeatureFiles(folder, source)
    else:
        raise InputError(
            f"data: {path} holds no features; compute them with sra2-fast prepare --features ENCODER, or put a folder "
            "features/ of .npy files beside vae-sd/"
        )
    if source.has_flips and not features.has_flips:
        raise InputError(
            f"data: {features.name} holds no features of mirrored images, the latents do; run sra2-fast prepare "
            "--features again"
        )
    return features
