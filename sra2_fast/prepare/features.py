"""`prepare --features`: the patch tokens of an encoder, of the very images whose latents lie in the shards.

One file of features beside every shard of latents, the same samples in the same order, mirrored images too where the
latents hold them. A file knows from which encoder and which shard it was made: a stopped run goes on with the first
that is missing, and latents that were made anew get new features.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..data.layouts.feature_shards import (
    INDEX_FILE,
    feature_file,
    finished_feature_file,
    write_feature_file,
    write_feature_index,
)
from ..data.layouts.shards import Shard
from ..data.loader import ignore_interrupts
from ..errors import InputError
from ..progress import progress_bar
from .encode import EncodeOptions
from .encoders import FeatureEncoder
from .listing import ImageList
from .reading import Chunk, ImageChunks, mark_texts
from .shard_work import ShardJob

PIXELS_A_TOKEN = 16  # of a side, as REPA has it: 16 x 16 tokens of 256 x 256 pixels


def feature_grid(image_size: int) -> int:
    """Tokens along a side. Raises InputError where the image size is no multiple of PIXELS_A_TOKEN."""
    if image_size % PIXELS_A_TOKEN:
        raise InputError(
            f"prepare: --features needs --image-size to be a multiple of {PIXELS_A_TOKEN}, got {image_size}"
        )
    return image_size // PIXELS_A_TOKEN


def write_features(
    out: Path,
    images: ImageList,
    jobs: list[ShardJob],
    shards: list[Shard],
    encoder: FeatureEncoder,
    options: EncodeOptions,
    num_workers: int,
) -> bool:
    """Write what is missing beside the finished `shards` of `jobs`, then features.json. False where nothing was.

    Raises InputError naming an image that is another one by now; KeyboardInterrupt leaves whole files only.
    """
    keys = [_key(encoder, options, shard) for shard in shards]
    names = [feature_file(shard.file) for shard in shards]
    done = {name: finished_feature_file(out, name, key) for name, key in zip(names, keys, strict=True)}
    todo = [place for place, name in enumerate(names) if done[name] is None]
    if not todo and (out / INDEX_FILE).is_file():
        write_index = False
    else:
        write_index = True
        (out / INDEX_FILE).unlink(missing_ok=True)
    chunks = {place: _chunks(jobs[place].positions, options.batch_size) for place in todo}
    flat = [chunk for place in todo for chunk in chunks[place]]
    loader = DataLoader(
        ImageChunks(images, flat, options.image_size, options.crop),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=min(num_workers, len(flat)),
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator().manual_seed(0),
    )
    total = sum(len(chunk) for chunk in flat)
    with progress_bar(total=total, unit="image", desc="features", disable=not flat) as bar:
        read = iter(loader)
        for place in todo:
            parts = []
            for _ in chunks[place]:
                chunk = next(read)
                parts.append(_encode(encoder, chunk, options.flip))
                bar.update(len(chunk.marks))
                _check_same(images, chunk, shards[place], start=sum(part[2] for part in parts[:-1]))
            features, flipped = (
                np.concatenate([part[side] for part in parts]) if parts else _nothing(encoder) for side in (0, 1)
            )
            write_feature_file(out, names[place], keys[place], features, flipped if options.flip else None)
            done[names[place]] = finished_feature_file(out, names[place], keys[place])
    if write_index:
        entries = [entry for name in names if (entry := done[name]) is not None]
        assert len(entries) == len(names)
        write_feature_index(
            out,
            shards,
            entries,
            encoder=encoder.name,
            fingerprint=encoder.fingerprint,
            tokens=encoder.grid**2,
            width=encoder.width,
            has_flips=options.flip,
        )
    return write_index


def _chunks(positions: np.ndarray, size: int) -> list[np.ndarray]:
    return [positions[start : start + size] for start in range(0, len(positions), size)]


def _encode(encoder: FeatureEncoder, chunk: Chunk, flip: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """Features of the images of a chunk, of the mirrored ones, and how many files it was read from."""
    if not len(chunk.positions):
        return _nothing(encoder), _nothing(encoder), len(chunk.marks)
    features = encoder(chunk.pixels).numpy()
    flipped = encoder(chunk.pixels.flip(-1)).numpy() if flip else _nothing(encoder)
    return features, flipped, len(chunk.marks)


def _nothing(encoder: FeatureEncoder) -> np.ndarray:
    return np.empty((0, encoder.grid**2, encoder.width), dtype=np.float16)


def _check_same(images: ImageList, chunk: Chunk, shard: Shard, start: int) -> None:
    """Raise an InputError unless every file of the chunk is the one the latents were made from."""
    for offset, mark in enumerate(mark_texts(chunk.marks)):
        if shard.record["marks"][start + offset] != mark:
            raise InputError(
                f"prepare: images of {shard.file} were changed while their features were computed; run the same "
                "command again"
            )


def _as_it_is(chunk: Any) -> Any:
    return chunk


def _key(encoder: FeatureEncoder, options: EncodeOptions, shard: Shard) -> str:
    text = f"{encoder.fingerprint} {options.image_size} {options.crop} {options.flip} {shard.checksum}"
    return hashlib.sha256(text.encode()).hexdigest()
