"""Batches on their way into shards, so that the device waits for nothing but the next batch.

While the device encodes a batch the one before it is added to its shard and the next one is read; a whole shard is
hashed and written by a thread. On a GPU a batch is queued before the results of the last one are fetched; on a CPU,
where encoding is done when the call returns, only the writing overlaps. What is made does not depend on any of it.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

from ..data.layouts.shards import Shard
from .shard_work import Piece, ShardJob, ShardWork

AHEAD = 1  # batches queued on the device beside the one whose results are fetched
Finished = Iterator[tuple[ShardJob, Shard]]


class _Batch(NamedTuple):
    """A batch that was started."""

    work: ShardWork
    first: int  # images of its shard before it
    images: int
    results: Callable[[], Piece]


class Pipeline:
    """`add` batches and `close` shards, in order; both give back the shards that are finished meanwhile.

    on_added: called with every piece once it is part of its shard.
    """

    def __init__(self, on_added: Callable[[Piece], object]) -> None:
        self._on_added = on_added
        self._encoding: deque[_Batch] = deque()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._writing: tuple[ShardJob, Future[Shard]] | None = None
        self._open: ShardWork | None = None

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.shutdown()

    def add(self, work: ShardWork, images: int, start: Callable[[], Callable[[], Piece]]) -> Finished:
        """Start the next batch of `work`, of so many images; the call that `start` returns waits for its results."""
        self._open = work
        first = work.images_done + sum(batch.images for batch in self._encoding if batch.work is work)
        self._encoding.append(_Batch(work, first, images, start()))
        while len(self._encoding) > AHEAD:
            self._collect()
        if self._writing is not None and self._writing[1].done():
            yield from self._written()

    def close(self, work: ShardWork) -> Finished:
        """`work` has all its batches: its shard is written, after the one before it."""
        while self._encoding:
            self._collect()
        yield from self._written()
        self._writing = work.job, self._writer.submit(work.finish)
        self._open = None

    def drain(self) -> Finished:
        """All that was added is part of its shard, and all that was closed is written."""
        while self._encoding:
            self._collect()
        yield from self._written()

    def save(self) -> None:
        """Keep what is encoded of the shard that is not closed yet, on disk."""
        with contextlib.ExitStack() as then:
            if self._open is not None:
                then.callback(self._open.save)  # also where a batch that was started does not arrive any more
            while self._encoding:
                self._collect()

    def _collect(self) -> None:
        batch = self._encoding[0]
        if batch.work.images_done == batch.first:  # else Ctrl-C came after it was added, before it was taken off
            piece = batch.results()
            batch.work.add(piece)
            self._on_added(piece)
        self._encoding.popleft()

    def _written(self) -> Finished:
        if self._writing is not None:
            (job, future), self._writing = self._writing, None
            yield job, future.result()
