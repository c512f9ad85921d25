"""`sra2-fast prepare --verify N`: a few latents decoded beside the images that they were made from.

What would go wrong in silence is seen here: latents of another image or of another crop, mirrored ones that are not, an
autoencoder that lost its weights, pixels in a wrong range.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..data.layouts.shards import INDEX_FILE, ShardSource, read_shard
from ..errors import InputError
from ..pictures import header, tile, write_png
from ..progress import progress_bar
from ..vae.autoencoder import decode, fingerprint, load_vae
from .convert import UNREADABLE
from .crop import crop_of
from .earlier import PLAN_FILE, begun_with, listing_of
from .encode import EncodeOptions, shard_jobs
from .listing import ImageList, list_images
from .reading import mark_of, read_square, reason

PICTURE_FILE = "verify.png"
WHITE = 255.0


class Pair(NamedTuple):
    """An image, the latent that is stored of it, and what that is decoded to."""

    file: str
    image: np.ndarray  # (size, size, 3) uint8
    decoded: np.ndarray  # the same

    @property
    def psnr(self) -> float:
        """10 log10(255^2 / mean squared error) [dB], over all pixels and colours."""
        error = np.square(self.image.astype(np.float64) - self.decoded).mean()
        return float("inf") if error == 0 else float(10 * np.log10(WHITE**2 / error))


def decode_some(out: Path, count: int, *, images: str | None, vae: str | None, device: str) -> str:
    """Write DIR/verify.png: `count` samples, evenly spaced, each image beside what its latent is decoded to.

    Behind them stands the same of the mirror image where that is stored. Returns a line that says how near they are.

    images, vae: where they are now, if not where they were.
    Raises InputError where they are not those that the latents were made with, or an image cannot be read.
    """
    source = ShardSource(out)
    options, listing = begun_with(out)
    listed = _images(out, options, images, listing)
    autoencoder = load_vae(vae or options.vae, device)
    if fingerprint(autoencoder) != options.vae_fingerprint:
        raise InputError(
            f"prepare: --vae {vae or options.vae} has other weights than {out} was made with; give --vae with those"
        )
    rows = []
    indices = source.evenly_spaced(count)
    files = _files_of(out, source, listed, options, indices)
    for index, file in zip(
        indices, progress_bar(iterable=files, unit="image", desc="decoding", delay=2.0), strict=True
    ):
        square = _square(listed, file, options)
        row = []
        for flipped in (False, True) if source.has_flips else (False,):
            values, _ = source.read_flipped(np.array([index]), np.array([flipped]))
            mean = torch.from_numpy(values[:, : source.shape[0]])
            decoded = decode(autoencoder, mean)[0].permute(1, 2, 0).numpy()
            row.append(Pair(file, square[:, ::-1] if flipped else square, decoded))
        rows.append(row)
    _draw(rows, out / PICTURE_FILE)
    pairs = [pair for row in rows for pair in row]
    worst = min(pairs, key=lambda pair: pair.psnr)
    average = float(np.mean([pair.psnr for pair in pairs]))
    return (
        f"decoded {len(rows)} of them: PSNR {average:.1f} dB on average, {worst.psnr:.1f} dB at the least "
        f"({worst.file}); see {out / PICTURE_FILE}"
    )


def _images(out: Path, options: EncodeOptions, elsewhere: str | None, listing: str) -> ImageList:
    path = Path(elsewhere or options.images)
    table = Path(options.labels) if options.labels else None
    images = list_images(path, labels=table, ignore_labels=options.ignore_labels)
    if listing_of(images) != listing:
        raise InputError(f"prepare: {path} holds other images than {out} was made from; give --images with those")
    return images


def _files_of(
    out: Path, source: ShardSource, images: ImageList, options: EncodeOptions, indices: np.ndarray
) -> list[str]:
    """The image file of every sample, if it still is what the sample was made from."""
    starts = np.cumsum([0, *(shard.samples for shard in source.shards)])
    jobs = shard_jobs(images, options)
    files = []
    for number, shard in enumerate(source.shards):
        wanted = indices[(indices >= starts[number]) & (indices < starts[number + 1])] - starts[number]
        if not len(wanted):
            continue
        found = read_shard(out, shard.file, jobs[number].key) if number < len(jobs) else None
        if found is None:
            raise InputError(
                f"prepare: {out / shard.file} was made from other images, labels or options than {PLAN_FILE} names; "
                "run the same sra2-fast prepare again"
            )
        marks = found[0].record["marks"]
        names = [images.files[position] for position in jobs[number].positions]
        kept = [place for place, name in enumerate(names) if not _is_named(name, shard.unreadable)]
        for row in wanted:
            name, mark = names[kept[row]], marks[kept[row]]
            if mark_of(images.store, name) != mark:
                raise InputError(
                    f"prepare: {images.store.path / name} was changed since {out / INDEX_FILE} was written; "
                    "give --images with what it was"
                )
            files.append(name)
    return files


def _is_named(name: str, unreadable: list[str]) -> bool:
    return any(entry.startswith(f"{name} (") for entry in unreadable)


def _square(images: ImageList, file: str, options: EncodeOptions) -> np.ndarray:
    try:
        return read_square(images.store.read(file), options.image_size, crop_of(options.crop, file))[0]
    except UNREADABLE as error:
        raise InputError(f"prepare: {images.store.path / file} cannot be read ({reason(error)}); repair it") from error


def _draw(rows: list[list[Pair]], path: Path) -> None:
    names = []
    for column, of in enumerate(("image", "mirrored")[: len(rows[0])]):
        average = np.mean([row[column].psnr for row in rows])
        names += [of, f"{average:.1f} dB"]
    squares = np.stack([square for row in rows for pair in row for square in (pair.image, pair.decoded)])
    picture = tile(squares, 2 * len(rows[0]))
    write_png(np.concatenate([header(names, picture.shape[1]), picture]), path)
