"""Training batches: what step s sees is a function of (seed, s) and the data, of nothing else.

Step s of a run takes the global positions s * B .. (s + 1) * B - 1 of the endless shuffle; B is the global batch, and
rank r of W takes the r-th of W equal runs of it. A DataLoader hands out whole steps, so neither the number of workers
nor that of processes changes a number, and a run resumes at any step without replay.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import InputError, TemporaryFailure, must_be
from ..randomness import Stream, normal, uniform
from .shuffle import EndlessShuffle
from .source import LatentSource


class Batch(NamedTuple):
    """One rank's share of a step, on the CPU; every uniform is in the open interval (0, 1)."""

    latents: torch.Tensor  # (B, C, H, W) float32, normalised z
    labels: torch.Tensor  # (B,) int64
    noise: torch.Tensor  # (B, C, H, W) float32
    time_uniform: torch.Tensor  # (B,) float32
    label_uniform: torch.Tensor  # (B,) float32; drop the label where it is < class_dropout_prob
    teacher_uniform: torch.Tensor  # (B,) float32
    token_uniform: torch.Tensor  # (B,) float32; says which tokens are aligned, where not all of them are
    images: torch.Tensor | None = None  # (B, 3, H, W) uint8, where an encoder runs on them in every step
    features: torch.Tensor | None = None  # (B, N, F) float16 or float32, of an encoder, where the source has them

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The function applied to every tensor there is."""
        return Batch(*(None if one is None else function(one) for one in self))  # type: ignore[arg-type]

    def split(self, size: int | None) -> list[Batch]:
        """Consecutive parts of at most `size` samples; itself where size is None."""
        if size is None or size >= len(self.labels):
            return [self]
        starts = range(0, len(self.labels), size)
        return [self.map(lambda one, start=start: one[start : start + size]) for start in starts]  # type: ignore[misc]


class ReadAhead:
    """Tells a source what is read soon: the window of the shuffle that begins, and the one after it.

    One ahead, so that the disk brings the next window while this one is read; every window is announced once.
    """

    def __init__(self, source: LatentSource, shuffle: EndlessShuffle) -> None:
        self.source, self.shuffle = source, shuffle
        self._current = range(0)
        self._announced = 0  # positions before it, from the current window on

    def __call__(self, position: int) -> None:
        """The sample at global position `position` is read next."""
        if self.source.block_size is None or position in self._current:
            return
        end, samples = self.shuffle.window(position)
        if not self._current.stop <= position < self._announced:  # the first one, and after a jump
            self.source.will_need(samples)
        self._current = range(position, end)
        self._announced, ahead = self.shuffle.window(end)
        self.source.will_need(ahead)


class _Steps(Dataset):
    """Item s is the batch of step s. An InputError is returned, not raised: torch would wrap it in a traceback."""

    def __init__(self, source: LatentSource, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        share = batch_size // world_size
        self.in_batch = np.arange(rank * share, (rank + 1) * share)
        self.shuffle = EndlessShuffle(source.num_samples, seed, source.block_size)
        self.read_ahead = ReadAhead(source, self.shuffle)

    def __getitem__(self, step: int) -> Batch | InputError:
        try:
            return self.batch(step)
        except InputError as error:
            return error

    def batch(self, step: int) -> Batch:
        source, in_batch = self.source, self.in_batch
        first = step * self.batch_size + int(in_batch[0])
        self.read_ahead(first)
        indices = self.shuffle.take(first, len(in_batch))
        flipped = None
        if source.has_flips:
            flipped = uniform(Stream.FLIP, self.seed, step, in_batch) < 0.5
            values, labels = source.read_flipped(indices, flipped)
        else:
            values, labels = source.read(indices)
        source.check_finite(values, indices)
        eps = normal(Stream.POSTERIOR, self.seed, step, in_batch, source.shape) if source.has_posterior else None
        arrays = (
            source.latents(values, eps),
            labels,
            normal(Stream.NOISE, self.seed, step, in_batch, source.shape),
            uniform(Stream.TIME, self.seed, step, in_batch),
            uniform(Stream.LABEL, self.seed, step, in_batch),
            uniform(Stream.TEACHER, self.seed, step, in_batch),
            uniform(Stream.TOKENS, self.seed, step, in_batch),
        )
        batch = Batch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))
        if source.features is None:
            return batch
        features = source.features.read(indices, flipped)
        source.features.check_finite(features, indices)
        return batch._replace(features=torch.from_numpy(features))


class BatchLoader(DataLoader):
    """A DataLoader of Batch whose errors arrive when the next batch is asked for, and nowhere else.

    An InputError of a worker process arrives as it was raised, and a worker that was killed as a TemporaryFailure.
    torch itself raises the latter from a handler of SIGCHLD: in the middle of a training step, or of a save.
    """

    def __iter__(self) -> Generator[Batch, None, None]:  # type: ignore[override]
        batches = super().__iter__()
        workers = getattr(batches, "_workers", ())
        with contextlib.ExitStack() as held:
            if workers:
                held.enter_context(_no_sigchld_handler())
                # Now, and not when the object goes: at the end of the process they would be sent a SIGTERM, which they
                # ignore, and waited for.
                held.callback(batches._shutdown_workers)  # type: ignore[attr-defined]
            while True:
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except (RuntimeError, OSError, EOFError) as error:  # what is left of a worker's pipes and messages
                    dead = [worker for worker in workers if not worker.is_alive()]
                    if not dead:
                        raise
                    raise _lost(dead[0].exitcode) from error
                if isinstance(batch, InputError):
                    raise batch
                yield batch


@contextlib.contextmanager
def _no_sigchld_handler() -> Iterator[None]:
    """Without torch's handler, which next() does not need: it looks after its workers every five seconds."""
    try:
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except ValueError:  # not the main thread, where torch sets no handler either
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGCHLD, before)


def _lost(exit_code: int | None) -> TemporaryFailure:
    how = f"ended with {exit_code}"
    if exit_code is not None and exit_code < 0:
        how = f"was ended by {signal.Signals(-exit_code).name}"
        how += ", by the system if memory ran out" if exit_code == -signal.SIGKILL else ""
    return TemporaryFailure(
        f"data: a loading process {how}; run the same command again, with fewer --workers where memory is short"
    )


def make_loader(
    source: LatentSource,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_steps: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> BatchLoader:
    """The batches of steps start_step .. start_step + num_steps - 1, in order.

    batch_size: the global batch; each rank gets batch_size / world_size samples of it.
    num_workers: processes that read ahead; 0 reads in this one. Changes no number.
    Raises InputError for a batch size that world_size does not divide; iteration raises it for bad data, naming it.
    """
    if batch_size < 1 or batch_size % world_size:
        raise must_be("data", "batch_size", f"a positive multiple of the {world_size} processes", batch_size)
    if num_workers < 0:
        raise must_be("data", "num_workers", "0 or more", num_workers)
    return BatchLoader(
        _Steps(source, batch_size, seed, rank, world_size),
        batch_size=None,
        sampler=range(start_step, start_step + num_steps),
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=ignore_interrupts,
        # DataLoader seeds its workers from a generator: ours, so that torch's global one is left as it was.
        generator=torch.Generator().manual_seed(0),
        prefetch_factor=4 if num_workers else None,
    )


def ignore_interrupts(worker: int) -> None:
    """For worker processes: signals reach the whole group, and the main process decides when its workers end.

    A terminal sends SIGINT so, and Slurm SIGTERM. torch ends a worker by a message, not by a signal.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
