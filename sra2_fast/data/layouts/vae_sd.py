"""The layout of REPA and SRA, read as it is: one .npy a sample, labels in dataset.json.

    vae-sd/dataset.json                                {"labels": [["00000/img-mean-std-00000000.npy", 207], ...]}
    vae-sd/00000/img-mean-std-00000000.npy             (2C, H, W) or (1, 2C, H, W) float32 = [mean, std], not scaled

The folder itself and its parent (which holds images/ beside it) are both accepted. "labels": null, which REPA's own
tools write for pictures without classes, is one class. The layout records no normalisation: with four channels it is
taken to be Stable Diffusion's, z = (mean + std * eps) * 0.18215, any other number of channels has to be told.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from ..normalisation import Numbers, per_channel
from ..source import LatentSource, digest

SD_SCALING_FACTOR, SD_CHANNELS = 0.18215, 4
FOLDER = "vae-sd"
LABELS_FILE = "dataset.json"
PREFIX, SUFFIX = "img-mean-std-", ".npy"


def is_vae_sd(path: Path) -> bool:
    """Whether `path` is such a folder, or holds one."""
    return path.name == FOLDER or (path / FOLDER).is_dir() or (path / LABELS_FILE).is_file()


class VaeSdSource(LatentSource):
    """A vae-sd/ folder. File names and labels are held in memory; every sample is a file, read when asked for."""

    has_posterior = True

    def __init__(
        self,
        path: Path,
        latent_scale: Numbers | None = None,
        latent_shift: Numbers | None = None,
        ignore_labels: bool = False,
    ) -> None:
        """z = (value - latent_shift) * latent_scale; ignore_labels: dataset.json is not even read."""
        self.folder = path / FOLDER if (path / FOLDER).is_dir() else path
        self.name = str(self.folder)
        found = _sample_files(self.folder)
        if not found:
            raise InputError(f"data: {self.folder} holds no {PREFIX}*{SUFFIX}; give the vae-sd folder or its parent")
        self.notes: list[str] = []
        labels = None if ignore_labels else _read_labels(self.folder / LABELS_FILE)
        if labels is None:
            if not ignore_labels:
                self.notes.append(f"{self.folder / LABELS_FILE} has no labels: all samples are of one class, label 0")
            labels = dict.fromkeys(found, 0)
        self._files = sorted(labels)
        _check_complete(self.folder, found, labels)
        self._labels = np.array([labels[file] for file in self._files], dtype=np.int64)
        self.num_samples = len(self._files)
        self.num_classes = int(self._labels.max()) + 1
        channels, height, width = self._load(0).shape
        if channels % 2:
            raise InputError(f"data: {self.describe(0)} must hold [mean, std], got {channels} channels")
        self.shape = (channels // 2, height, width)
        scale = self._assumed_scale(channels // 2) if latent_scale is None else latent_scale
        self.scale = per_channel("--latent-scale", scale, channels // 2)
        self.shift = per_channel("--latent-shift", 0.0 if latent_shift is None else latent_shift, channels // 2)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """indices: (n,) -> [mean, std] (n, 2C, H, W) float32, labels (n,) int64."""
        channels, height, width = self.shape
        values = np.empty((len(indices), 2 * channels, height, width), dtype=np.float32)
        for row, index in zip(values, indices, strict=True):
            moments = self._load(int(index))
            if moments.shape != row.shape:
                raise InputError(f"data: {self.describe(int(index))} must be {row.shape}, got {moments.shape}")
            row[...] = moments
        return values, self._labels[indices]

    def describe(self, index: int) -> str:
        return str(self.folder / self._files[index])

    def fingerprint(self) -> str:
        """Of all file names and labels, and of the values of a sample of the files."""
        return digest(super().fingerprint(), "\n".join(self._files), self._labels)

    def _assumed_scale(self, channels: int) -> float:
        if channels != SD_CHANNELS:
            raise InputError(
                f"data: {self.name} holds latents of {channels} channels and no normalisation; give --latent-scale "
                f"(and --latent-shift): z = (value - shift) * scale, one number or {channels}"
            )
        self.notes.append(
            f"{self.name} records no normalisation: taken to be Stable Diffusion's, z = value * {SD_SCALING_FACTOR}; "
            "for latents of another autoencoder give --latent-scale and --latent-shift"
        )
        return SD_SCALING_FACTOR

    def _load(self, index: int) -> np.ndarray:
        try:
            moments = np.load(self.folder / self._files[index], allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(
                f"data: {self.describe(index)} cannot be read ({_one_line(error)}); encode this image again"
            ) from error
        if moments.ndim == 4 and moments.shape[0] == 1:
            moments = moments[0]
        if moments.ndim != 3:
            raise InputError(f"data: {self.describe(index)} must be (2C, H, W), got {moments.shape}")
        return moments


def _sample_files(folder: Path) -> set[str]:
    """The names of all samples, relative to `folder`, with forward slashes."""
    found: set[str] = set()
    for parent, _, files in os.walk(folder):
        relative = os.path.relpath(parent, folder).replace(os.sep, "/")
        prefix = "" if relative == "." else f"{relative}/"
        found.update(f"{prefix}{file}" for file in files if file.startswith(PREFIX) and file.endswith(SUFFIX))
    return found


def _read_labels(path: Path) -> dict[str, int] | None:
    """File name -> label; None for "labels": null.

    Raises InputError for anything but null or a list of [name, label >= 0].
    """
    if not path.is_file():
        raise InputError(
            f"data: {path} is missing; it holds the labels of the samples beside it (--ignore-labels does without)"
        )
    try:
        entries = json.loads(path.read_bytes())["labels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"data: {path} cannot be read ({error!r}); write it again") from error
    if entries is None:
        return None
    if not isinstance(entries, list) or not entries:
        raise InputError(
            f"data: {path}: labels must be null or a list of [file, label]; --ignore-labels does without them"
        )
    labels: dict[str, int] = {}
    for entry in entries:
        name, label = entry if isinstance(entry, list) and len(entry) == 2 else (None, -1)
        if not isinstance(name, str) or not _is_label(label):
            raise InputError(f"data: {path}: label out of range: {entry!r} must be [file, integer from 0]")
        labels[name.replace("\\", "/")] = label
    return labels


def _is_label(label: Any) -> bool:
    return isinstance(label, int) and not isinstance(label, bool) and 0 <= label < 2**31


def _check_complete(folder: Path, found: set[str], labels: dict[str, int]) -> None:
    missing = labels.keys() - found
    if missing:
        raise InputError(
            f"data: {folder / min(missing)} is missing ({len(missing)} of the {len(labels)} files in {LABELS_FILE}); "
            "encode the images again or take them out of it"
        )
    unlabelled = found - labels.keys()
    if unlabelled:
        raise InputError(
            f"data: {folder / min(unlabelled)} has no label in {LABELS_FILE} ({len(unlabelled)} such files); "
            "add them to it or remove them"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
