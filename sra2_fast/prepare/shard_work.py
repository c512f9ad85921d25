"""A shard in the making: what it is made of, and how an interrupted one goes on.

A shard is encoded in batches that depend on its job alone. Every PART_SECONDS, and when Ctrl-C comes, the batches since
the last time are written as a part; the next run begins after them. A whole shard replaces its parts, and is the same
bytes however they were cut.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.layouts.shards import Shard, read_shard, write_shard

PART_SECONDS = 30.0
SUFFIX = ".safetensors"


class ShardJob(NamedTuple):
    """A shard to be made."""

    number: int
    name: str
    positions: np.ndarray  # (n,) in the list of images
    key: str  # a hash of all that the shard depends on, but for the contents of its images


@dataclass(frozen=True)
class Piece:
    """What became of consecutive batches of a shard."""

    batches: int
    moments: np.ndarray  # (n, 2C, h, w) float32
    flips: np.ndarray | None  # like moments, of the mirrored images; None where they are not wanted
    labels: np.ndarray  # (n,) int64
    unreadable: list[str]  # images that were left out, with reasons
    marks: list[str]  # of every image file, in order, the unreadable ones too (reading.mark_texts)
    converted: dict[str, int]  # convert.KINDS -> how many images

    def write(self, out: Path, name: str, key: str) -> Shard:
        record = {"batches": self.batches, "marks": self.marks, "converted": self.converted}
        return write_shard(out, name, self.moments, self.labels, key, self.unreadable, record, self.flips)


class ShardWork:
    """A job and the pieces that are done; those of an earlier run come from its parts."""

    def __init__(self, out: Path, job: ShardJob, parts: Iterable[Piece] = ()) -> None:
        self.out, self.job = out, job
        self._pieces = list(parts)
        self._num_parts = len(self._pieces)  # the first pieces, which are on disk
        self._saved_at = 0.0

    @property
    def images_done(self) -> int:
        return sum(len(piece.marks) for piece in self._pieces)

    def begin(self, batch_size: int) -> list[np.ndarray]:
        """The batches to be added, as positions; the clock of the parts starts here."""
        self._saved_at = time.monotonic()
        return self.missing(batch_size)

    def missing(self, batch_size: int) -> list[np.ndarray]:
        """The positions of every batch that is not done."""
        positions = self.job.positions
        return [positions[start : start + batch_size] for start in range(self.images_done, len(positions), batch_size)]

    def add(self, piece: Piece) -> None:
        self._pieces.append(piece)
        if time.monotonic() - self._saved_at >= PART_SECONDS:
            self.save()

    def save(self) -> None:
        """Write what is not on disk yet as a part."""
        unsaved = self._pieces[self._num_parts :]
        if unsaved:
            part = _join(unsaved)
            part.write(self.out, _part_name(self.job, self._pieces[: self._num_parts]), self.job.key)
            self._pieces[self._num_parts :] = [part]
            self._num_parts += 1
        self._saved_at = time.monotonic()

    def finish(self) -> Shard:
        """Write the shard and remove its parts."""
        shard = _join(self._pieces).write(self.out, self.job.name, self.job.key)
        for part in self.out.glob(f"{_stem(self.job)}.part-*"):
            part.unlink()
        return shard


def read_parts(out: Path, job: ShardJob) -> list[Piece]:
    """The parts of an unfinished shard, in order, up to the first that is missing or damaged."""
    pieces: list[Piece] = []
    while (found := read_shard(out, _part_name(job, pieces), job.key)) is not None:
        part, moments, labels, flips = found
        about = {"labels": labels, "unreadable": part.unreadable, **part.record}
        try:
            pieces.append(Piece(moments=moments, flips=flips, **about))
        except TypeError:  # other entries than ours
            break
    return pieces


def total(converted: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Counts of several pieces or shards together."""
    counts: Counter[str] = Counter()
    for part in converted:
        counts.update(part)
    return dict(counts)


def _join(pieces: list[Piece]) -> Piece:
    flips = [piece.flips for piece in pieces if piece.flips is not None]
    return Piece(
        sum(piece.batches for piece in pieces),
        np.concatenate([piece.moments for piece in pieces]),
        np.concatenate(flips) if flips else None,
        np.concatenate([piece.labels for piece in pieces]),
        [name for piece in pieces for name in piece.unreadable],
        [mark for piece in pieces for mark in piece.marks],
        total(piece.converted for piece in pieces),
    )


def _part_name(job: ShardJob, before: list[Piece]) -> str:
    return f"{_stem(job)}.part-{sum(piece.batches for piece in before):05d}{SUFFIX}"


def _stem(job: ShardJob) -> str:
    return job.name.removesuffix(SUFFIX)
