"""Encoder features in safetensors, one file beside every shard of latents: what `sra2-fast prepare --features` writes.

    FOLDER/features-00000-of-00003.safetensors    features (n, N, F) float16, features_flip like it where the latents
                                                  hold flips; the samples are those of latents-00000-of-00003
    FOLDER/features.json                          encoder, sizes, checksums, and of which latents they are

A file is written whole or not at all, features.json last. It is sealed (schemas.py), and knows the latents by their
checksums: features beside other latents are refused.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import InputError
from ...files import write_whole
from ...schemas import Damaged, FeatureEntry, FeatureIndex, as_type, must_be_whole, read_json, sealed
from ..features import FeatureSource
from ..source import LatentSource, digest
from .npy_files import one_line
from .shards import SHARD_PATTERN, VERIFY_AT_OPEN_BYTES, Shard, ShardSource

INDEX_FILE = "features.json"
FORMAT, VERSION = "sra2_fast features", 1
NAMES = ("features", "features_flip")
ABOUT = "about"  # the one entry of a file's metadata: the library writes several in a random order
AGAIN = "run the same sra2-fast prepare --features again"


def feature_file(latents_file: str) -> str:
    """The name of the features of a shard of latents."""
    return latents_file.replace(SHARD_PATTERN.split("*")[0], "features-", 1)


def has_feature_shards(folder: Path) -> bool:
    return (folder / INDEX_FILE).is_file()


def latents_digest(shards: list[Shard]) -> str:
    """Which latents features belong to."""
    return digest(*(f"{shard.samples} {shard.checksum}" for shard in shards))


def write_feature_file(folder: Path, name: str, key: str, features: np.ndarray, flipped: np.ndarray | None) -> None:
    """features, flipped: (n, N, F) float16. key: says what they were made from."""
    from safetensors.numpy import save

    tensors = {NAMES[0]: features, **({} if flipped is None else {NAMES[1]: flipped})}
    about = {"key": key, "checksum": _checksum(*tensors.values())}
    write_whole(folder / name, save(tensors, metadata={ABOUT: json.dumps(about)}))


def finished_feature_file(folder: Path, name: str, key: str) -> FeatureEntry | None:
    """The line of the index for `name` if it is there, was made from `key` and is undamaged; None otherwise."""
    from safetensors import SafetensorError, safe_open

    path = folder / name
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            about = json.loads((file.metadata() or {})[ABOUT])
            tensors = [file.get_tensor(one) for one in NAMES if one in file.keys()]  # noqa: SIM118
        if about["key"] != key or about["checksum"] != _checksum(*tensors):
            return None
        samples = len(tensors[0])
        return FeatureEntry(file=name, samples=samples, bytes=path.stat().st_size, checksum=about["checksum"])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, IndexError):
        return None


def write_feature_index(folder: Path, shards: list[Shard], entries: list[FeatureEntry], **about: Any) -> None:
    """Write features.json, which makes the features usable. about: encoder, fingerprint, tokens, width, has_flips."""
    index = {
        "format": FORMAT,
        "version": VERSION,
        **about,
        "latents": latents_digest(shards),
        "files": [entry.model_dump() for entry in entries],
    }
    write_whole(folder / INDEX_FILE, json.dumps(sealed(index), indent=1).encode())


class FeatureShards(FeatureSource):
    """The features of a folder of shards, mapped."""

    def __init__(self, folder: Path, source: LatentSource) -> None:
        latents = getattr(source, "labelled", source)
        if not isinstance(latents, ShardSource):
            raise InputError(
                f"data: {folder / INDEX_FILE} goes with shards of latents, not with {source.name}; move it"
            )
        self.folder, self.name = folder, str(folder / INDEX_FILE)
        self.index = _read_index(folder / INDEX_FILE)
        if self.index.latents != latents_digest(latents.shards):
            raise InputError(f"data: {self.name} is of other latents than lie beside it; {AGAIN}")
        self.num_tokens, self.width, self.has_flips = self.index.tokens, self.index.width, self.index.has_flips
        self._starts = np.cumsum([0, *(entry.samples for entry in self.index.files)])
        self._mapped: dict[int, tuple[torch.Tensor, ...]] = {}
        for number in range(len(self.index.files)):
            self._file(number)
        if sum(entry.bytes for entry in self.index.files) <= VERIFY_AT_OPEN_BYTES:
            self.verify()

    def read(self, indices: np.ndarray, flipped: np.ndarray | None = None) -> np.ndarray:
        """indices: (n,) -> (n, N, F) float16; those of the mirrored images where `flipped` (n,) bool."""
        values = torch.empty((len(indices), self.num_tokens, self.width), dtype=torch.float16)
        chosen = np.zeros(len(indices), dtype=bool) if flipped is None else flipped
        file_of = np.searchsorted(self._starts, indices, side="right") - 1
        rows = indices - self._starts[file_of]
        places = zip(values, file_of.tolist(), rows.tolist(), chosen.tolist(), strict=True)
        for value, number, row, is_flipped in places:  # each is copied once
            value.copy_(self._file(number)[is_flipped][row])
        return values.numpy()

    def describe(self, index: int) -> str:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{self.folder / self.index.files[number].file}, sample {index - self._starts[number]}"

    def fingerprint(self) -> str:
        """Of the index alone: every file's checksum."""
        return digest(*(entry.checksum for entry in self.index.files))

    def verify(self) -> None:
        """Compare every file with its checksum in the index. Raises InputError naming the damaged one."""
        for number, entry in enumerate(self.index.files):
            tensors = [tensor.numpy() for tensor in self._file(number)]
            if _checksum(*tensors) != entry.checksum:
                raise InputError(f"data: {self.folder / entry.file} is damaged (its checksum differs); {AGAIN}")

    def _file(self, number: int) -> tuple[torch.Tensor, ...]:
        """(n, N, F) float16 of the images, and of the mirrored ones where there are any, mapped."""
        if number not in self._mapped:
            entry = self.index.files[number]
            self._mapped[number] = self._open(self.folder / entry.file, entry)
        return self._mapped[number]

    def _open(self, path: Path, entry: FeatureEntry) -> tuple[torch.Tensor, ...]:
        from safetensors import SafetensorError, safe_open

        if not path.is_file() or path.stat().st_size != entry.bytes:
            raise InputError(f"data: {path} is missing, truncated or was changed; {AGAIN}")
        names = NAMES[: 1 + self.has_flips]
        try:
            with safe_open(path, framework="pt") as file:
                tensors = [file.get_tensor(name) for name in names]
        except (SafetensorError, OSError) as error:
            raise InputError(f"data: {path} cannot be read ({one_line(error)}); {AGAIN}") from error
        shape = (entry.samples, self.num_tokens, self.width)
        if any(tensor.shape != shape or tensor.dtype != torch.float16 for tensor in tensors):
            raise InputError(f"data: {path} does not belong to {INDEX_FILE}; {AGAIN}")
        return tuple(tensors)

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes: maps would be pickled as whole tensors, so they are opened anew."""
        return {**self.__dict__, "_mapped": {}}


def _read_index(path: Path) -> FeatureIndex:
    try:
        record = read_json(path)
        must_be_whole(record)
        if record.get("format") != FORMAT or record.get("version") != VERSION:
            raise Damaged(f"is {record.get('format')} version {record.get('version')}, not {FORMAT} {VERSION}")
        return as_type(record, FeatureIndex)
    except Damaged as error:
        raise InputError(f"data: {path} {error}; {AGAIN}") from error


def _checksum(*arrays: np.ndarray) -> str:
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return total.hexdigest()
