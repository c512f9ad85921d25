"""LightningDiT's layout, read as it is: safetensors of sampled latents, of the mirrored images too, and statistics.

    latents_rank00_shard000.safetensors    latents, latents_flip (n, C, H, W), labels (n,) int64
    latents_stats.pt                       {"mean", "std"}: (1, C, 1, 1), so that z = (value - mean) / std

Names are free. Tensors are float32, float16 or bfloat16, mapped and never loaded whole. Files without latents_flip
have no mirrored images. The samples lie sorted by class, so they are shuffled one by one, as LightningDiT does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import InputError
from ..normalisation import Numbers, normalise_as_recorded_or_measured
from ..source import LatentSource, digest
from .npy_files import one_line
from .shards import SHARD_PATTERN

LATENTS, FLIPPED, LABELS = "latents", "latents_flip", "labels"
STATS_FILE = "latents_stats.pt"
DTYPES = {"F32", "F16", "BF16"}
AGAIN = "run LightningDiT's extract_features.py again or copy it again"


def is_lightningdit(path: Path) -> bool:
    """Whether `path` holds safetensors files with `latents`, or their statistics."""
    files = _files(path)
    return bool(files) and ((path / STATS_FILE).is_file() or LATENTS in _header(files[0]))


class LightningDiTSource(LatentSource):
    """A folder of such files. Only labels are held in memory."""

    def __init__(
        self,
        path: Path,
        latent_scale: Numbers | None = None,
        latent_shift: Numbers | None = None,
        ignore_labels: bool = False,
    ) -> None:
        """latent_scale, latent_shift: where there is no latents_stats.pt; ignore_labels: labels are not read."""
        self.folder, self.name = path, str(path)
        self._paths = _files(path)
        headers = [_header(file) for file in self._paths]
        first = headers[0]
        for file, header in zip(self._paths, headers, strict=True):
            _check_header(file, header, first, self._paths[0], has_labels=not ignore_labels)
        channels, height, width = first[LATENTS][1][1:]
        self.shape = (channels, height, width)
        self.has_flips = FLIPPED in first
        self.has_labels = not ignore_labels
        self._starts = np.cumsum([0, *(header[LATENTS][1][0] for header in headers)])
        self.num_samples = int(self._starts[-1])
        if self.num_samples == 0:
            raise InputError(f"data: {path} holds no samples; {AGAIN}")
        self._open_files: dict[int, tuple[torch.Tensor, ...]] = {}
        self._labels = np.zeros(self.num_samples, dtype=np.int64)
        if not ignore_labels:
            self._labels = np.concatenate([_tensors(file, LABELS)[LABELS].numpy() for file in self._paths])
            self._check_labels()
        self.num_classes = int(self._labels.max()) + 1
        self.notes = []
        stats, told = path / STATS_FILE, (latent_scale, latent_shift)
        normalise_as_recorded_or_measured(self, stats, told, f"{stats} is missing", "mean", std="std")

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """indices: (n,) -> values (n, C, H, W) float32, labels (n,) int64."""
        return self.read_flipped(indices, np.zeros(len(indices), dtype=bool))

    def read_flipped(self, indices: np.ndarray, flipped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same, with the latents of the mirrored images where `flipped` (n,) bool."""
        values = torch.empty((len(indices), *self.shape))
        file_of = np.searchsorted(self._starts, indices, side="right") - 1
        rows = indices - self._starts[file_of]
        places = zip(values, file_of.tolist(), rows.tolist(), flipped.tolist(), strict=True)
        for value, number, row, is_flipped in places:  # each is copied once
            value.copy_(self._file(number)[is_flipped][row])
        return values.numpy(), self._labels[indices]

    def describe(self, index: int) -> str:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{self._paths[number]}, sample {index - self._starts[number]}"

    def fingerprint(self) -> str:
        """Of all labels, and of a sample of the values."""
        return digest(super().fingerprint(), self._labels)

    def _check_labels(self) -> None:
        bad = np.flatnonzero((self._labels < 0) | (self._labels >= 2**31))
        if bad.size:
            raise InputError(
                f"data: label out of range: {self.describe(int(bad[0]))} has label {self._labels[bad[0]]}, it must be "
                f"an integer from 0; {AGAIN}"
            )

    def _file(self, number: int) -> tuple[torch.Tensor, ...]:
        """(n, C, H, W) of the images, and of the mirrored ones where there are any, mapped."""
        if number not in self._open_files:
            names = (LATENTS, FLIPPED)[: 1 + self.has_flips]
            found = _tensors(self._paths[number], *names)
            self._open_files[number] = tuple(found[name] for name in names)
        return self._open_files[number]

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes: maps would be pickled as whole tensors, so they are opened anew."""
        return {**self.__dict__, "_open_files": {}}


def _files(path: Path) -> list[Path]:
    ours = set(path.glob(SHARD_PATTERN))
    return sorted(file for file in path.glob("*.safetensors") if file not in ours)


def _header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Tensor name -> (type, shape); also proves that the file is as long as its header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return {name: (one.get_dtype(), one.get_shape()) for name, one in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"data: {path} cannot be read ({one_line(error)}); {AGAIN}") from error


def _tensors(path: Path, *names: str) -> dict[str, torch.Tensor]:
    """The tensors of these names, mapped."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}


def _check_header(
    path: Path,
    header: dict[str, tuple[str, list[int]]],
    first: dict[str, tuple[str, list[int]]],
    first_path: Path,
    has_labels: bool,
) -> None:
    """Raises InputError naming `path` where it is not of the layout, or not of one kind with the first file."""
    if LATENTS not in header:
        raise InputError(f"data: {path} has no tensor `{LATENTS}`, only {', '.join(header)}; remove it from the folder")
    dtype, shape = header[LATENTS]
    if dtype not in DTYPES or len(shape) != 4:
        raise InputError(
            f"data: {path}: {LATENTS} must be (n, C, H, W) in float32, float16 or bfloat16, got {shape} in {dtype}; "
            f"{AGAIN}"
        )
    if has_labels and LABELS not in header:
        raise InputError(f"data: {path} has no tensor `{LABELS}`; {AGAIN}, or train without with --ignore-labels")
    if has_labels and header[LABELS] != ("I64", shape[:1]):
        kind, length = header[LABELS]
        raise InputError(f"data: {path}: {LABELS} must be [{shape[0]}] in I64, got {length} in {kind}; {AGAIN}")
    if FLIPPED in header and header[FLIPPED] != header[LATENTS]:
        raise InputError(
            f"data: {path}: {FLIPPED} must be {shape} in {dtype} as {LATENTS} is, got {header[FLIPPED][1]} in "
            f"{header[FLIPPED][0]}; {AGAIN}"
        )
    if shape[1:] != first[LATENTS][1][1:] or (FLIPPED in header) != (FLIPPED in first):
        raise InputError(f"data: {path} holds other tensors than {first_path.name} beside it; keep files of one kind")
