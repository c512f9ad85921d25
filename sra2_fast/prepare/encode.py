"""Images to shards of latents: the loop of `sra2-fast prepare`, and what a shard is made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..data.layouts.shards import Shard, shard_name
from ..data.loader import ignore_interrupts
from ..errors import InputError
from ..files import write_whole
from ..progress import progress_bar
from ..randomness import Stream, generator
from ..vae.autoencoder import downsample_factor, normalisation, start_encoding
from .listing import ImageList, name_some
from .pipeline import Pipeline
from .reading import Chunk, ImageChunks, mark_texts
from .shard_work import Piece, ShardJob, ShardWork

UNREADABLE_FILE = "unreadable.txt"
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left, {rate_noinv_fmt}]"


@dataclass(frozen=True)
class EncodeOptions:
    """What decides the bytes of the shards, and where it came from; kept in prepare.json and index.json."""

    images: str
    vae: str
    vae_fingerprint: str  # of its weights; the name is a record only
    image_size: int
    batch_size: int
    precision: str
    shard_size: int
    crop: str = "center"
    flip: bool = False  # the mirrored images are encoded too
    labels: str | None = None  # a table of them; a record only, like images
    ignore_labels: bool = False
    latent_scale: str | None = None  # as given; they change what the index says, and no shard
    latent_shift: str | None = None


def shard_jobs(images: ImageList, options: EncodeOptions) -> list[ShardJob]:
    """All shards, in order. The images are shuffled once, always in the same way."""
    order = generator(Stream.PREPARE, seed=0).permutation(len(images.files))
    size = options.shard_size
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    return [
        ShardJob(number, shard_name(number, len(parts)), part, _key(images, part, options))
        for number, part in enumerate(parts)
    ]


def encode_shards(
    out: Path,
    images: ImageList,
    vae: torch.nn.Module,
    options: EncodeOptions,
    works: list[ShardWork],
    *,
    num_workers: int,
    skip_unreadable: bool,
) -> Iterator[tuple[ShardJob, Shard]]:
    """Finish `works` one after the other, with a progress bar over all images.

    At the first unreadable image encoding stops, the rest is only read, and an InputError names them all; with
    `skip_unreadable` they are left out of their shards. Ctrl-C leaves what is encoded on disk.
    """
    size = options.batch_size
    chunks = [batch for work in works for batch in work.missing(size)]
    loader = DataLoader(
        ImageChunks(images, chunks, options.image_size, options.crop),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=min(num_workers, len(chunks)),
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator().manual_seed(0),  # leaves torch's global generator as it was
    )
    total, todo = len(images.files), sum(len(chunk) for chunk in chunks)
    refused: list[str] = []
    bar = progress_bar(
        total=total, initial=total - todo, unit=" images", desc="encoding", disable=not chunks, bar_format=BAR
    )
    with bar, Pipeline(lambda piece: bar.update(len(piece.marks))) as pipeline:
        read = iter(loader)
        try:
            for work in works:
                for _ in work.begin(size):
                    chunk = next(read)
                    if chunk.unreadable and not skip_unreadable:
                        pipeline.save()
                        refused += chunk.unreadable
                        bar.set_description("only checking")
                    if refused:
                        bar.update(len(chunk.marks))
                    else:
                        yield from pipeline.add(work, len(chunk.marks), partial(_start, vae, chunk, images, options))
                if not refused:
                    yield from pipeline.close(work)
            yield from pipeline.drain()
        except KeyboardInterrupt:
            pipeline.save()
            raise
    if refused:
        write_whole(out / UNREADABLE_FILE, "".join(f"{name}\n" for name in refused).encode())
        raise InputError(
            f"prepare: {len(refused)} of {total} images cannot be read: {name_some(refused)} (all are listed in "
            f"{out / UNREADABLE_FILE}); repair or remove them, or leave them out with --skip-unreadable"
        )


def latent_shape(vae: torch.nn.Module, image_size: int) -> tuple[int, int, int]:
    """(C, H, W) of the latents of square images. Raises InputError where the autoencoder cannot divide them."""
    factor = downsample_factor(vae)
    if image_size < 1 or image_size % factor:
        raise InputError(f"prepare: --image-size must be a multiple of {factor} for this autoencoder, got {image_size}")
    return normalisation(vae).channels, image_size // factor, image_size // factor


def _start(vae: torch.nn.Module, chunk: Chunk, images: ImageList, options: EncodeOptions) -> Callable[[], Piece]:
    """Start encoding the readable images of `chunk`, and the mirrored ones; what is returned waits for the piece."""
    started = [
        _start_encoding(vae, pixels, options.precision)
        for pixels in ((chunk.pixels, chunk.pixels.flip(-1)) if options.flip else (chunk.pixels,))
    ]

    def piece() -> Piece:
        moments, *flips = (_finite(results(), chunk, images) for results in started)
        return Piece(
            batches=1,
            moments=moments,
            flips=flips[0] if flips else None,
            labels=images.labels[chunk.positions],
            unreadable=chunk.unreadable,
            marks=mark_texts(chunk.marks),
            converted=chunk.converted,
        )

    return piece


def _start_encoding(vae: torch.nn.Module, pixels: torch.Tensor, precision: str) -> Callable[[], np.ndarray]:
    if len(pixels):
        return start_encoding(vae, pixels, precision)
    channels, height, width = latent_shape(vae, pixels.shape[-1])
    return lambda: np.empty((0, 2 * channels, height, width), dtype=np.float32)


def _finite(moments: np.ndarray, chunk: Chunk, images: ImageList) -> np.ndarray:
    finite = np.isfinite(moments).all(axis=(1, 2, 3))
    if not finite.all():
        bad = [images.files[position] for position in chunk.positions[~finite]]
        raise InputError(f"prepare: NaN or infinity in the latents of {name_some(bad)}; use --precision fp32")
    return moments


def _key(images: ImageList, positions: np.ndarray, options: EncodeOptions) -> str:
    """A hash of the options and of every image's name and label; their contents have marks of their own."""
    decisive: list[Any] = [options.vae_fingerprint, options.image_size, options.batch_size, options.precision]
    if options.crop != "center" or options.flip:  # else the key is that of before there was a choice
        decisive += [options.crop, options.flip]
    digest = hashlib.sha256(json.dumps(decisive).encode())
    for position in positions:
        digest.update(f"{images.files[position]}\0{images.labels[position]}\n".encode())
    return digest.hexdigest()


def _as_it_is(chunk: Any) -> Any:
    return chunk
