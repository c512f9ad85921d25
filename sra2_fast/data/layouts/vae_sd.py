"""The layout of REPA and SRA, and of REPA-E and SR-DiT after it: one .npy a sample, labels in dataset.json.

    vae-sd/dataset.json                                {"labels": [["00000/img-mean-std-00000000.npy", 207], ...]}
    vae-sd/00000/img-mean-std-00000000.npy             (2C, H, W) or (1, 2C, H, W) = [mean, std], not scaled
    vae-in/00000/img-latents-00000000.npy              (C, H, W): sampled, not scaled (SR-DiT)

The folder itself, under any name, and its parent (which holds images/ beside it) are both accepted. "labels": null,
which REPA's own tools write for pictures without classes, is no labels. The layout records no normalisation: four
channels are taken to be Stable Diffusion's, 32 sampled ones E2E-INVAE's; REPA-E's NAME-latents-stats.pt is read where
it lies beside the folder or in it, and anything else has to be told.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from ...schemas import Damaged, read_json
from ..normalisation import (
    E2E_INVAE_CHANNELS,
    E2E_INVAE_SCALE,
    SD_CHANNELS,
    SD_SCALING_FACTOR,
    Numbers,
    normalise,
    normalise_as_recorded,
)
from .npy_files import SUFFIX, NpyFolderSource

FOLDERS = ("vae-sd", "vae-in")
LABELS_FILE = "dataset.json"
MEAN_STD, SAMPLED = "img-mean-std-", "img-latents-"
STATS_SUFFIX = "-latents-stats.pt"
LOOKED_AT = 64  # names in a folder, to tell what it holds


def is_vae_sd(path: Path) -> bool:
    """Whether `path` is such a folder, or holds one."""
    return bool(_folders(path)) or (path / LABELS_FILE).is_file()


class VaeSdSource(NpyFolderSource):
    """A vae-sd/ folder. File names and labels are held in memory; every sample is a file, read when asked for."""

    def __init__(
        self,
        path: Path,
        latent_scale: Numbers | None = None,
        latent_shift: Numbers | None = None,
        ignore_labels: bool = False,
    ) -> None:
        """z = (value - latent_shift) * latent_scale; ignore_labels: dataset.json is not even read."""
        folder = _the_folder(path)
        found = _sample_files(folder)
        if not found:
            raise InputError(f"data: {folder} holds no {MEAN_STD}*{SUFFIX}; give the vae-sd folder or its parent")
        kinds = {MEAN_STD if name.rpartition("/")[2].startswith(MEAN_STD) else SAMPLED for name in found}
        if len(kinds) > 1:
            raise InputError(f"data: {folder} holds both {MEAN_STD}*{SUFFIX} and {SAMPLED}*{SUFFIX}; keep one kind")
        labels = None if ignore_labels else _read_labels(folder / LABELS_FILE)
        self.notes: list[str] = []
        if labels is None and not ignore_labels:
            self.notes.append(f"{folder / LABELS_FILE} has no labels: all samples are of one class, label 0")
        if labels is not None:
            _check_complete(folder, found, labels)
        files = sorted(found)
        numbers = None if labels is None else np.array([labels[file] for file in files], dtype=np.int64)
        self._open(folder, files, numbers, has_posterior=MEAN_STD in kinds)
        self._normalise(latent_scale, latent_shift)

    def _normalise(self, scale: Numbers | None, shift: Numbers | None) -> None:
        stats = _statistics_file(self.folder)
        if stats is not None:
            normalise_as_recorded(self, stats, (scale, shift), "latents_bias", scale="latents_scale")
        else:
            normalise(self, self._assumed_scale() if scale is None else scale, shift)

    def _assumed_scale(self) -> float:
        channels = self.shape[0]
        if self.has_posterior and channels == SD_CHANNELS:
            of, scale = "Stable Diffusion's", SD_SCALING_FACTOR
        elif not self.has_posterior and channels == E2E_INVAE_CHANNELS:
            of, scale = "E2E-INVAE's, as SR-DiT has them", E2E_INVAE_SCALE
        else:
            raise InputError(
                f"data: {self.name} holds latents of {channels} channels and no normalisation; give --latent-scale "
                f"(and --latent-shift): z = (value - shift) * scale, one number or {channels}"
            )
        self.notes.append(
            f"{self.name} records no normalisation: taken to be {of}, z = value * {scale}; "
            "for latents of another autoencoder give --latent-scale and --latent-shift"
        )
        return scale


def _folders(path: Path) -> list[Path]:
    """The folders of samples that `path` is or holds."""
    if path.name in FOLDERS or _begins_with_samples(path):
        return [path]
    below = sorted(one for one in path.iterdir() if one.is_dir())
    return [one for one in below if one.name in FOLDERS or _begins_with_samples(one)]


def _the_folder(path: Path) -> Path:
    """The one folder of samples that `path` is or holds; itself where there is none. Raises InputError for two."""
    found = _folders(path)
    if len(found) > 1:
        names = " and ".join(str(one) for one in found)
        raise InputError(f"data: {path} holds {names}; give the one to train on")
    return found[0] if found else path


def _begins_with_samples(folder: Path) -> bool:
    """Whether the first names in `folder`, or in a numbered folder in it, are those of samples: a quick look."""
    with os.scandir(folder) as entries:
        first = list(itertools.islice(entries, LOOKED_AT))
    if any(_is_sample(entry.name) for entry in first):
        return True
    numbered = next((entry.path for entry in first if entry.name.isdecimal() and entry.is_dir()), None)
    if numbered is None:
        return False
    with os.scandir(numbered) as entries:
        return any(_is_sample(entry.name) for entry in itertools.islice(entries, LOOKED_AT))


def _is_sample(name: str) -> bool:
    return name.startswith((MEAN_STD, SAMPLED)) and name.endswith(SUFFIX)


def _sample_files(folder: Path) -> set[str]:
    """The names of all samples, relative to `folder`, with forward slashes."""
    found: set[str] = set()
    for parent, _, files in os.walk(folder):
        relative = os.path.relpath(parent, folder).replace(os.sep, "/")
        prefix = "" if relative == "." else f"{relative}/"
        found.update(f"{prefix}{file}" for file in files if _is_sample(file))
    return found


def _statistics_file(folder: Path) -> Path | None:
    """REPA-E's NAME-latents-stats.pt for this folder, where there is one."""
    inside = sorted(folder.glob(f"*{STATS_SUFFIX}"))
    beside = folder.with_name(f"{folder.name}{STATS_SUFFIX}")
    return inside[0] if inside else beside if beside.is_file() else None


def _read_labels(path: Path) -> dict[str, int] | None:
    """File name -> label; None for "labels": null. Raises InputError where there is no such file."""
    if not os.path.lexists(path):
        raise InputError(
            f"data: {path} is missing; it holds the labels of the samples beside it (--ignore-labels does without)"
        )
    try:
        return labels_of(read_json(path)["labels"], str(path))
    except Damaged as error:
        raise InputError(f"data: {path} {error}; write it again") from error
    except (KeyError, TypeError) as error:
        raise InputError(f"data: {path} cannot be read ({error!r}); write it again") from error


def labels_of(entries: Any, where: str) -> dict[str, int] | None:
    """File name -> label of the "labels" of a dataset.json; None for null.

    Raises InputError, naming `where`, for anything but null or a list of [name, label >= 0].
    """
    if entries is None:
        return None
    if not isinstance(entries, list) or not entries:
        raise InputError(
            f"data: {where}: labels must be null or a list of [file, label]; --ignore-labels does without them"
        )
    labels: dict[str, int] = {}
    for entry in entries:
        name, label = entry if isinstance(entry, list) and len(entry) == 2 else (None, -1)
        if not isinstance(name, str) or not _is_label(label):
            raise InputError(f"data: {where}: label out of range: {entry!r} must be [file, integer from 0]")
        name = name.replace("\\", "/")
        if labels.setdefault(name, label) != label:
            raise InputError(f"data: {where}: {name} has two labels, {labels[name]} and {label}; leave one")
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
