"""Images to shards of latents: the loop of `sra2-fast prepare`, and what a shard is made from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..data.files import write_whole
from ..data.layouts.shards import Shard, shard_name, write_shard
from ..data.loader import ignore_interrupts
from ..errors import InputError
from ..randomness import Stream, generator
from ..vae.autoencoder import downsample_factor, encode, normalisation
from .images import Chunk, ImageChunks, ImageList

UNREADABLE_FILE = "unreadable.txt"
MAX_NAMED = 3


class ShardJob(NamedTuple):
    """A shard to be made."""

    number: int
    name: str
    positions: np.ndarray  # (n,) in the list of images
    key: str  # a hash of all that the shard depends on


@dataclass(frozen=True)
class EncodeOptions:
    """What decides the bytes of the shards; kept in prepare.json and index.json."""

    images: str
    vae: str
    image_size: int
    batch_size: int
    precision: str
    shard_size: int


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
    jobs: list[ShardJob],
    *,
    num_workers: int,
    skip_unreadable: bool,
) -> Iterator[tuple[ShardJob, Shard]]:
    """Encode and write `jobs` one after the other, with a progress bar over all images.

    A shard is encoded in batches that depend on its job alone. At the first unreadable image encoding stops, the rest
    is only read, and an InputError names them all; with `skip_unreadable` they are left out of their shards.
    """
    size = options.batch_size
    chunks = [job.positions[start : start + size] for job in jobs for start in range(0, len(job.positions), size)]
    loader = DataLoader(
        ImageChunks(images, chunks, options.image_size),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=min(num_workers, len(chunks)),
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator().manual_seed(0),  # leaves torch's global generator as it was
    )
    total, todo = len(images.files), sum(len(job.positions) for job in jobs)
    refused: list[str] = []
    with tqdm(total=total, initial=total - todo, unit="image", desc="encoding", disable=not jobs) as bar:
        read = iter(loader)
        for job in jobs:
            parts = []
            for _ in range(0, len(job.positions), size):
                chunk = next(read)
                if chunk.unreadable and not skip_unreadable:
                    refused += chunk.unreadable
                    bar.set_description("only checking")
                encoded = None if refused else _encode(vae, chunk, images, options.precision)
                parts.append((chunk, encoded))
                bar.update(len(chunk.positions) + len(chunk.unreadable))
            if not refused:
                yield job, _write(out, job, images, parts)
    if refused:
        write_whole(out / UNREADABLE_FILE, "".join(f"{name}\n" for name in refused).encode())
        raise InputError(
            f"prepare: {len(refused)} of {total} images cannot be read: {name_some(refused)} (all are listed in "
            f"{out / UNREADABLE_FILE}); repair or remove them, or leave them out with --skip-unreadable"
        )


def name_some(names: list[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def latent_shape(vae: torch.nn.Module, image_size: int) -> tuple[int, int, int]:
    """(C, H, W) of the latents of square images. Raises InputError where the autoencoder cannot divide them."""
    factor = downsample_factor(vae)
    if image_size < 1 or image_size % factor:
        raise InputError(f"prepare: --image-size must be a multiple of {factor} for this autoencoder, got {image_size}")
    return normalisation(vae).channels, image_size // factor, image_size // factor


def _encode(vae: torch.nn.Module, chunk: Chunk, images: ImageList, precision: str) -> np.ndarray:
    """(n, 2C, H, W) float32 moments of the readable images of `chunk`."""
    if not len(chunk.positions):
        channels, height, width = latent_shape(vae, chunk.pixels.shape[-1])
        return np.empty((0, 2 * channels, height, width), dtype=np.float32)
    moments = encode(vae, chunk.pixels, precision)
    finite = np.isfinite(moments).all(axis=(1, 2, 3))
    if not finite.all():
        bad = [images.files[position] for position in chunk.positions[~finite]]
        raise InputError(f"prepare: NaN or infinity in the latents of {name_some(bad)}; use --precision fp32")
    return moments


def _write(out: Path, job: ShardJob, images: ImageList, parts: list[tuple[Chunk, Any]]) -> Shard:
    moments = np.concatenate([encoded for _, encoded in parts])
    labels = images.labels[np.concatenate([chunk.positions for chunk, _ in parts])]
    unreadable = [name for chunk, _ in parts for name in chunk.unreadable]
    return write_shard(out, job.name, moments, labels, job.key, unreadable)


def _key(images: ImageList, positions: np.ndarray, options: EncodeOptions) -> str:
    """A hash of the options and of every image's name, label and size (which stands for its contents)."""
    digest = hashlib.sha256(json.dumps(vars(options), sort_keys=True).encode())
    for position in positions:
        file = images.files[position]
        digest.update(f"{file}\0{images.labels[position]}\0{os.path.getsize(images.folder / file)}\n".encode())
    return digest.hexdigest()


def _as_it_is(chunk: Any) -> Any:
    return chunk
