"""The project's own format: latents in safetensors shards, one index, read through memory maps.

    FOLDER/latents-00000-of-00003.safetensors   moments (n, 2C, H, W) float32 = [mean, std], labels (n,) int64,
                                                moments_flip like moments, of the mirrored images, where wanted;
                                                latents (n, C, H, W), latents_flip instead, of sampled latents
    FOLDER/index.json                           counts, shapes, normalisation, classes, the autoencoder, checksums

What convert-data writes may be float16 or bfloat16 too. A shard is written whole or not at all, the index last: without
one a folder is not finished. `checksum` is the SHA-256 of the shard's arrays, kept in the index and in the shard's own
metadata, so that a shard proves itself; index and metadata are sealed (schemas.py). Opening compares sizes and what
shards say of themselves, and the checksums where that takes about a second; `verify` compares all.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from ...files import write_whole
from ...schemas import Count, Damaged, Index, as_type, must_be_whole, read_json, sealed
from ..precision import CODE_OF_BITS, PRECISION_OF_CODE, PRECISIONS, to_float32, to_stored
from ..source import LatentSource, digest

INDEX_FILE = "index.json"
SHARD_PATTERN = "latents-*-of-*.safetensors"
FORMAT = "sra2_fast latents"
VERSION = 2  # 1 knows moments in float32, with labels and without flips, and is still written for those
BLOCK_SIZE = 256  # samples: 8 MB of SD-VAE moments, enough for a disk to read at full speed
VERIFY_AT_OPEN_BYTES = 1 << 28
LONGEST_HEADER = 1 << 26
AGAIN = "run the same sra2-fast prepare (or convert-data) again"


@dataclass(frozen=True)
class Shard:
    """One shard's line in the index."""

    file: str
    samples: int
    bytes: int
    checksum: str
    unreadable: list[str] = field(default_factory=list)  # images of its share that were left out
    record: dict[str, Any] = field(default_factory=dict)  # what its maker asks for later; in the shard only


def shard_name(number: int, count: int) -> str:
    """`number` counts from 0, and so does the name; `count` is the number of shards."""
    return f"latents-{number:05d}-of-{count:05d}.safetensors"


def checksum(moments: np.ndarray, labels: np.ndarray, flips: np.ndarray | None = None) -> str:
    """SHA-256, in hexadecimal, of the bytes of `moments`, then of `labels`, then of `flips` where there are any."""
    digest = hashlib.sha256()
    for array in (moments, labels) if flips is None else (moments, labels, flips):
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def write_shard(
    folder: Path,
    name: str,
    moments: np.ndarray,
    labels: np.ndarray,
    key: str,
    unreadable: Iterable[str] = (),
    record: dict[str, Any] | None = None,
    flips: np.ndarray | None = None,
    *,
    has_posterior: bool = True,
    precision: str = "float32",
) -> Shard:
    """Write one shard, whole or not at all.

    moments: (n, 2C, H, W) float32, or without `has_posterior` sampled latents (n, C, H, W). labels: (n,) int64.
    key: says what the shard was made from; `finished_shard` asks for the same again.
    record: JSON that `finished_shard` gives back.
    flips: like moments, of the images flipped from left to right. All shards of a data set have them, or none.
    precision: what moments and flips are stored in, one of PRECISIONS. The same in all shards of a data set.
    """
    moments, labels = to_stored(moments, precision), np.ascontiguousarray(labels, np.int64)
    unreadable, record = list(unreadable), record or {}
    name_of = _tensor_names(has_posterior)
    tensors = {name_of[False]: moments, "labels": labels}
    if flips is not None:
        flips = tensors[name_of[True]] = to_stored(flips, precision)
    check = checksum(moments, labels, flips)
    metadata = {"key": key, "checksum": check, "unreadable": json.dumps(unreadable), "record": json.dumps(record)}
    header, payload = _serialise(tensors, sealed(metadata))
    write_whole(folder / name, header, payload)
    return Shard(name, len(labels), len(header) + len(payload), check, unreadable, record)


def _tensor_names(has_posterior: bool) -> tuple[str, str]:
    """Of the images' tensor, and of the mirrored images'."""
    return ("moments", "moments_flip") if has_posterior else ("latents", "latents_flip")


def _serialise(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> tuple[bytes, memoryview]:
    """Header and payload of a safetensors file. The library writes metadata in a random order; ours is always the same,
    so that equal data sets are equal files."""
    from safetensors.numpy import save

    data = save(tensors)
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    for entry in entries.values():
        entry["dtype"] = CODE_OF_BITS.get(entry["dtype"], entry["dtype"])
    header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # keeps the payload aligned
    return len(header).to_bytes(8, "little") + header, memoryview(data)[start:]


def finished_shard(folder: Path, name: str, key: str) -> Shard | None:
    """The shard `name` if it is there, was made from `key` and is undamaged; None otherwise."""
    found = read_shard(folder, name, key)
    return found and found[0]


def read_shard(folder: Path, name: str, key: str) -> tuple[Shard, np.ndarray, np.ndarray, np.ndarray | None] | None:
    """The same with its moments, labels and flips, mapped."""
    path = folder / name
    if not path.is_file():
        return None
    try:
        opened = _ShardFile(path)
        found, moments, labels, flips = opened.metadata, opened.moments(), opened.labels(), opened.flips()
        must_be_whole(found)
        if found["key"] != key or found["checksum"] != checksum(moments, labels, flips):
            return None
        unreadable = as_type(json.loads(found["unreadable"]), list[str])
        record = as_type(json.loads(found.get("record", "{}")), dict[str, Any])
    except (InputError, KeyError, ValueError, TypeError, RecursionError):
        return None
    return Shard(name, opened.samples, opened.bytes, found["checksum"], unreadable, record), moments, labels, flips


def write_index(
    folder: Path,
    shards: list[Shard],
    *,
    has_flips: bool = False,
    has_posterior: bool = True,
    has_labels: bool = True,
    precision: str = "float32",
    **about: Any,
) -> None:
    """Write index.json, which makes the folder a finished data set.

    has_flips, has_posterior, precision: as the shards were written. has_labels: False where every label is 0 for lack
    of any.
    about: shape (C, H, W), num_classes, class_names, shift, scale, vae, and anything worth recording.
    """
    given = {"has_flips": has_flips, "has_posterior": has_posterior, "has_labels": has_labels, "precision": precision}
    unusual = {key: value for key, value in given.items() if value != Index.model_fields[key].default}
    index = {
        "format": FORMAT,
        "version": VERSION if unusual else 1,
        **unusual,
        "num_samples": sum(shard.samples for shard in shards),
        **about,
    }
    index["shards"] = [{key: value for key, value in vars(shard).items() if key != "record"} for shard in shards]
    write_whole(folder / INDEX_FILE, json.dumps(sealed(index), indent=1).encode())


def is_shards(folder: Path) -> bool:
    """Whether `folder` holds this format, finished or not."""
    return (folder / INDEX_FILE).is_file() or any(folder.glob(SHARD_PATTERN))


class ShardSource(LatentSource):
    """A finished folder of shards. Nothing is loaded but the labels (8 bytes a sample); moments are mapped."""

    block_size = BLOCK_SIZE

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = str(folder)
        index = as_index(folder, read_index(folder))
        self.shape, self.num_classes, self.class_names = index.shape, index.num_classes, index.class_names
        self.has_flips, self.has_posterior, self.has_labels = index.has_flips, index.has_posterior, index.has_labels
        self.precision = index.precision
        if index.vae is not None:
            self.vae, self.vae_fingerprint = index.vae.name, index.vae.fingerprint
        self.shift = np.asarray(index.shift, dtype=np.float32)
        self.scale = np.asarray(index.scale, dtype=np.float32)
        self.shards = [Shard(one.file, one.samples, one.bytes, one.checksum, one.unreadable) for one in index.shards]
        self._files: dict[int, _ShardFile] = {}
        self._starts = np.cumsum([0, *(shard.samples for shard in self.shards)])
        self.num_samples = int(self._starts[-1])
        if self.num_samples == 0:
            raise InputError(f"data: {folder} holds no samples; {AGAIN}")
        self._labels = np.concatenate([self._file(number).labels() for number in range(len(self.shards))])
        self._check_labels()
        if sum(shard.bytes for shard in self.shards) <= VERIFY_AT_OPEN_BYTES:
            self.verify()

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """indices: (n,) -> [mean, std] (n, 2C, H, W) float32, or sampled latents (n, C, H, W), and labels (n,) int64;
        copies, not views of the maps."""
        return self.read_flipped(indices, np.zeros(len(indices), dtype=bool))

    def read_flipped(self, indices: np.ndarray, flipped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same, with the moments of the mirrored images where `flipped` (n,) bool."""
        values = np.empty((len(indices), *self._stored_shape), dtype=np.float32)
        shard_of = self._shard_of(indices)
        rows = indices - self._starts[shard_of]
        # Row by row, each copied once: indexing with all rows of a shard copies twice, in fresh memory (6x slower).
        places = zip(values, shard_of.tolist(), rows.tolist(), flipped.tolist(), strict=True)
        for value, number, row, is_flipped in places:
            value[...] = to_float32(self._file(number).stored[is_flipped][row])
        return values, self._labels[indices]

    def describe(self, index: int) -> str:
        number = self._shard_of(index)
        return f"{self.folder / self.shards[number].file}, sample {index - self._starts[number]}"

    def fingerprint(self) -> str:
        """Of the index alone: every shard's checksum and the normalisation; only labels and moments decide it."""
        return digest(self.outline(), *(f"{shard.samples} {shard.checksum}" for shard in self.shards))

    def will_need(self, indices: np.ndarray) -> None:
        """Ask the system to read the blocks of these samples ahead, each in one run."""
        if not hasattr(os, "posix_fadvise"):
            return
        for block in np.unique(indices // BLOCK_SIZE):
            first, end = block * BLOCK_SIZE, min((block + 1) * BLOCK_SIZE, self.num_samples)
            for number in range(self._shard_of(first), self._shard_of(end - 1) + 1):
                start, samples = self._starts[number], self.shards[number].samples
                if samples:
                    self._file(number).read_ahead(max(first - start, 0), min(end - start, samples))

    def verify(self) -> None:
        """Compare every shard with its checksum in the index. Raises InputError naming the damaged one."""
        for number, shard in enumerate(self.shards):
            opened = self._file(number)
            if checksum(opened.moments(), opened.labels(), opened.flips()) != shard.checksum:
                raise InputError(
                    f"data: {self.folder / shard.file} is damaged (its checksum differs from {INDEX_FILE}); "
                    f"{AGAIN}, which makes only this shard anew"
                )

    @property
    def _stored_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.shape
        return (2 * channels if self.has_posterior else channels, height, width)

    def _shard_of(self, index: Any) -> Any:
        """The number of the shard that holds sample `index`; elementwise for an array."""
        return np.searchsorted(self._starts, index, side="right") - 1

    def _file(self, number: int) -> _ShardFile:
        if number not in self._files:
            shard = self.shards[number]
            opened = _ShardFile(self.folder / shard.file, shard.bytes)
            is_of_shape = opened.moments().shape[1:] == self._stored_shape and opened.precision == self.precision
            is_of_shape = is_of_shape and opened.has_posterior == self.has_posterior
            is_flipped = (opened.flips() is not None) == self.has_flips
            if opened.samples != shard.samples or not is_of_shape or not is_flipped:
                raise InputError(f"data: {opened.path} does not belong to {INDEX_FILE}; {AGAIN}")
            if opened.metadata.get("checksum", shard.checksum) != shard.checksum:
                raise InputError(f"data: {opened.path} holds other latents than {INDEX_FILE} says; {AGAIN}")
            self._files[number] = opened
        return self._files[number]

    def _check_labels(self) -> None:
        bad = np.flatnonzero((self._labels < 0) | (self._labels >= self.num_classes))
        if bad.size:
            raise InputError(
                f"data: label out of range: {self.describe(int(bad[0]))} has label {self._labels[bad[0]]}, "
                f"{INDEX_FILE} says {self.num_classes} classes; {AGAIN}"
            )

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes: memory maps would be pickled as whole arrays, so they are opened anew."""
        return {**self.__dict__, "_files": {}}


class _ShardFile:
    """One shard through memory maps; only the header is read here."""

    def __init__(self, path: Path, expected_bytes: int | None = None) -> None:
        self.path = path
        try:
            self.bytes = path.stat().st_size
            if not os.path.isfile(path):
                raise OSError("no regular file")
            with open(path, "rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(header_bytes)) if header_bytes < min(self.bytes, LONGEST_HEADER) else {}
        except FileNotFoundError as error:
            raise InputError(f"data: {path} is missing; {AGAIN}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"data: {path} cannot be read ({error}); {AGAIN}") from error
        if expected_bytes not in (None, self.bytes):
            raise InputError(
                f"data: {path} is truncated or was changed: {self.bytes} bytes instead of {expected_bytes}; {AGAIN}"
            )
        try:
            self.metadata = as_type(header.pop("__metadata__", {}), dict[str, str])
            self.has_posterior = "latents" not in header
            name, name_of_flips = _tensor_names(self.has_posterior)
            self.precision = PRECISION_OF_CODE.get(header[name]["dtype"], "float32")
            code, dtype = PRECISIONS[self.precision]
            self._moments = self._map(header[name], code, dtype, 8 + header_bytes)
            self._labels = self._map(header["labels"], "I64", np.int64, 8 + header_bytes)
            if self._moments.ndim != 4 or self._labels.shape != self._moments.shape[:1]:
                raise ValueError("shapes of moments and labels disagree")
            self._flips = None
            if name_of_flips in header:
                self._flips = self._map(header[name_of_flips], code, dtype, 8 + header_bytes)
                if self._flips.shape != self._moments.shape:
                    raise ValueError(f"shapes of {name} and {name_of_flips} disagree")
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"data: {path} is truncated or no shard of latents ({error}); {AGAIN}") from error
        self.samples = len(self._labels)
        # Of the images and of the mirrored ones, as plain arrays: a row of a memmap costs more than its copy.
        self.stored = tuple(np.asarray(one) for one in (self._moments, self._flips) if one is not None)

    def moments(self) -> np.ndarray:
        """(n, 2C, H, W), or sampled latents (n, C, H, W), mapped; as PRECISIONS says, bfloat16 as its bits."""
        return self._moments

    def labels(self) -> np.ndarray:
        """(n,) int64, mapped."""
        return self._labels

    def flips(self) -> np.ndarray | None:
        """Like moments, of the mirrored images; None where the shard has none."""
        return self._flips

    def read_ahead(self, first: int, last: int) -> None:
        """Hint that the moments first .. last - 1, and their flips, are read soon; the range is not empty, since
        posix_fadvise takes a length of 0 for "to the end of the file"."""
        row = self._moments[:1].nbytes
        with open(self.path, "rb") as file:
            for stored in (self._moments, self._flips):
                if stored is not None:
                    offset = int(getattr(stored, "offset", 0) + first * row)
                    os.posix_fadvise(file.fileno(), offset, int((last - first) * row), os.POSIX_FADV_WILLNEED)

    def _map(self, entry: dict[str, Any], code: str, dtype: type, payload: int) -> np.ndarray:
        first, last = as_type(entry["data_offsets"], tuple[Count, Count])
        shape = tuple(as_type(entry["shape"], list[Count]))
        if entry["dtype"] != code or last - first != np.dtype(dtype).itemsize * math.prod(shape):
            raise ValueError(f"expected {code}, got {entry['dtype']} of shape {shape}")
        if payload + last > self.bytes:
            raise ValueError(f"{self.bytes} bytes instead of {payload + last}")
        if first == last:  # an empty shard cannot be mapped
            return np.empty(shape, dtype=dtype)
        return np.memmap(self.path, dtype=dtype, mode="r", offset=payload + first, shape=shape)


def read_index(folder: Path) -> dict[str, Any]:
    """The contents of index.json. Raises InputError where there is none or it is of another kind, Damaged."""
    path = folder / INDEX_FILE
    if not os.path.lexists(path):
        raise InputError(f"data: {folder} has no {INDEX_FILE}, so it is not finished; {AGAIN}")
    try:
        index = read_json(path)
        must_be_whole(index)
    except Damaged as error:
        raise Damaged(f"data: {path} {error}; {AGAIN}") from error
    if index.get("format") != FORMAT:
        raise InputError(f"data: {path} is not an index of {FORMAT}; give another folder")
    if index.get("version") not in range(1, VERSION + 1):
        raise InputError(
            f"data: {path} has version {index.get('version')}; this version reads 1 to {VERSION}, a newer one that one"
        )
    return index


def as_index(folder: Path, index: dict[str, Any]) -> Index:
    """The same, every value checked. Raises Damaged."""
    try:
        return as_type(index, Index)
    except Damaged as error:
        raise Damaged(f"data: {folder / INDEX_FILE} {error}; {AGAIN}") from error


def discard_damaged_index(folder: Path) -> None:
    """Remove an index that is not what was written: the folder is unfinished then, and its shards prove themselves."""
    if not (folder / INDEX_FILE).is_file():
        return
    try:
        as_index(folder, read_index(folder))
    except Damaged as error:
        print(f"{str(error).removeprefix('data: ').rpartition(';')[0]}; it is made anew")
        (folder / INDEX_FILE).unlink()
