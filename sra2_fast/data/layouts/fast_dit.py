"""fast-DiT's layout, read as it is: a sample a file, its label in another of the same name.

    imagenet256_features/17.npy    (1, C, H, W) float32: sampled from the posterior and scaled already
    imagenet256_labels/17.npy      (1,) int64

Any NAME_features and NAME_labels are read; their parent and the features folder itself are both accepted. Numbers
order the samples. Labels are held in memory, so opening reads all of their files once.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ...errors import InputError
from ...progress import progress_bar
from ..normalisation import SD_CHANNELS, SD_SCALING_FACTOR, Numbers, normalise
from .npy_files import SUFFIX, NpyFolderSource, in_order, read_npy

FEATURES, LABELS = "_features", "_labels"


def is_fast_dit(path: Path) -> bool:
    """Whether `path` holds a NAME_features with a NAME_labels beside it, or is one."""
    return bool(_feature_folders(path))


def scale_of_scaled(source: NpyFolderSource, latent_scale: Numbers | None, latent_shift: Numbers | None) -> None:
    """Set the normalisation of latents that are said to be scaled already, unless one is given for raw ones.

    Four channels are taken to be scaled by Stable Diffusion's factor, which decoding needs; z is what is stored.
    """
    if latent_scale is not None or latent_shift is not None:
        normalise(source, 1.0 if latent_scale is None else latent_scale, latent_shift)
        return
    is_sd = source.shape[0] == SD_CHANNELS
    normalise(source, SD_SCALING_FACTOR if is_sd else 1.0)
    source.stored_scale = source.scale
    by = f", by Stable Diffusion's {SD_SCALING_FACTOR}" if is_sd else ""
    source.notes = [
        *source.notes,
        f"{source.name} records no normalisation: taken to be sampled and scaled already{by}; "
        "for raw latents give --latent-scale",
    ]


class FastDiTSource(NpyFolderSource):
    """imagenet256_features/ and imagenet256_labels/."""

    def __init__(
        self,
        path: Path,
        latent_scale: Numbers | None = None,
        latent_shift: Numbers | None = None,
        ignore_labels: bool = False,
    ) -> None:
        """latent_scale, latent_shift: for latents that were not scaled; ignore_labels: their files are not read."""
        found = _feature_folders(path)
        if len(found) > 1:
            raise InputError(f"data: {path} holds {' and '.join(map(str, found))}; give the one to train on")
        (features,) = found
        stems = in_order([name for name in os.listdir(features) if name.endswith(SUFFIX)])
        if not stems:
            raise InputError(f"data: {features} holds no *{SUFFIX}; run fast-DiT's extract_features.py again")
        labels = None if ignore_labels else _read_labels(_labels_folder(features), features, stems)
        self._open(features, [f"{stem}{SUFFIX}" for stem in stems], labels, has_posterior=False)
        scale_of_scaled(self, latent_scale, latent_shift)


def _feature_folders(path: Path) -> list[Path]:
    candidates = [path] if path.name.endswith(FEATURES) else sorted(path.glob(f"*{FEATURES}"))
    return [one for one in candidates if one.is_dir() and _labels_folder(one).is_dir()]


def _labels_folder(features: Path) -> Path:
    return features.with_name(features.name.removesuffix(FEATURES) + LABELS)


def _read_labels(folder: Path, features: Path, stems: list[str]) -> np.ndarray:
    """(n,) int64, in the order of `stems`. Raises InputError naming a file without its other half, or a bad label."""
    there = {name.removesuffix(SUFFIX) for name in os.listdir(folder) if name.endswith(SUFFIX)}
    for missing, kept, lacking in (
        (set(stems) - there, features, folder),
        (there - set(stems), folder, features),
    ):
        if missing:
            name = f"{min(missing)}{SUFFIX}"
            raise InputError(
                f"data: {lacking / name} is missing, {kept / name} is there ({len(missing)} such files); run "
                "fast-DiT's extract_features.py again"
            )
    labels = np.empty(len(stems), dtype=np.int64)
    for row, stem in enumerate(progress_bar(iterable=stems, desc="labels", unit="file", delay=2.0, leave=False)):
        label = read_npy(f"{folder}/{stem}{SUFFIX}")
        if label.size != 1 or label.dtype.kind not in "iu" or not 0 <= label.item() < 2**31:
            shown = label.ravel()[:1].tolist() if label.size == 1 else label.shape
            file = folder / f"{stem}{SUFFIX}"
            raise InputError(f"data: label out of range: {file} must be one integer from 0, got {shown}; write it anew")
        labels[row] = label.item()
    return labels
