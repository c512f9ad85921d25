"""Image files to squares of pixels, in the background, each with a mark of the very bytes it was made from."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ..errors import InputError
from ..progress import progress_bar
from .convert import UNREADABLE, to_rgb
from .crop import Crop, center_crop, crop_of
from .listing import FORMATS, ImageList
from .stores import Store

MARK_BYTES = 40  # 8 of the file's size, 32 of the SHA-256 of its bytes
NO_MARK = "unreadable"
STANDARD_ERROR = 2


class Chunk(NamedTuple):
    """Images that are encoded together."""

    positions: np.ndarray  # (n,) positions in the list of the readable ones
    pixels: torch.Tensor  # (n, 3, size, size) uint8
    unreadable: list[str]  # "file (reason)" of the others
    marks: torch.Tensor  # (n + unreadable, MARK_BYTES) uint8, of all files in their order; `mark_texts`
    converted: dict[str, int]  # convert.KINDS -> how many images


class ImageChunks(Dataset):
    """Item i is the images at chunks[i], read and cropped; a DataLoader reads them in worker processes."""

    def __init__(self, images: ImageList, chunks: list[np.ndarray], size: int, crop: str = "center") -> None:
        self.images = images
        self.chunks = chunks
        self.size = size
        self.crop = crop

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, item: int) -> Chunk:
        positions, pixels, unreadable = [], [], []
        marks = torch.zeros((len(self.chunks[item]), MARK_BYTES), dtype=torch.uint8)
        converted: Counter[str] = Counter()
        for row, position in zip(marks.numpy(), self.chunks[item], strict=True):
            file = self.images.files[position]
            try:
                data = self.images.store.read(file)
                row[...] = _mark(data)
                square, kinds = read_square(data, self.size, crop_of(self.crop, file))
            except UNREADABLE as error:
                unreadable.append(f"{file} ({reason(error)})")
                continue
            positions.append(position)
            pixels.append(square.transpose(2, 0, 1))
            converted.update(kinds)
        # np.stack keeps the channels-last layout of its parts, which pickling in a worker loses; and the layout picks
        # the convolution's algorithm. One layout always, or the latents' last bits depend on the number of workers.
        # A tensor, because it travels through shared memory: an array goes through a pipe, where a worker whose main
        # process was killed waits for ever.
        stacked = torch.empty((len(pixels), 3, self.size, self.size), dtype=torch.uint8)
        for image, square in zip(stacked.numpy(), pixels, strict=True):
            image[...] = square
        return Chunk(np.array(positions, dtype=np.int64), stacked, unreadable, marks, dict(converted))


def read_square(data: bytes, size: int, crop: Crop = center_crop) -> tuple[np.ndarray, list[str]]:
    """The bytes of an image file -> (size, size, 3) uint8, and how it was converted. Raises one of UNREADABLE."""
    from PIL import Image

    with warnings.catch_warnings(), _without_libtiff(data):
        warnings.simplefilter("ignore")  # they would cut the progress bar to pieces
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                rgb, kinds = to_rgb(image)
                return crop(rgb, size), kinds
        except Image.DecompressionBombError as error:
            raise OSError(str(error)) from error


def check_classes(images: ImageList, size: int) -> None:
    """Raise an InputError for a class of which no image can be read: the model would have no sample of it."""
    order = np.argsort(images.labels, kind="stable")
    present, starts = np.unique(images.labels[order], return_index=True)
    groups = zip(present, np.split(order, starts[1:]), strict=True)
    for label, group in progress_bar(
        iterable=groups, total=len(present), unit="class", desc="checking classes", delay=2.0, leave=False
    ):
        files = [images.files[position] for position in group]
        why = _why_none(images.store, files, size)
        if why is not None:
            raise InputError(
                f"prepare: none of the {len(files)} images in {images.class_called(label)} can be read ({why}); "
                "repair them or remove the class"
            )


def _why_none(store: Store, files: list[str], size: int) -> str | None:
    """What is wrong with the first of the files; None if any of them can be read."""
    why = None
    for file in files:
        try:
            read_square(store.read(file), size)
        except UNREADABLE as error:
            why = why or f"{file}: {reason(error)}"
        else:
            return None
    return why


def mark_texts(marks: torch.Tensor) -> list[str]:
    """(n, MARK_BYTES) uint8 -> "size:SHA-256" of each, NO_MARK where the file could not even be opened."""
    rows = [row.tobytes() for row in marks.numpy()]
    return [f"{int.from_bytes(row[:8], 'little')}:{row[8:].hex()}" if any(row) else NO_MARK for row in rows]


def mark_of(store: Store, file: str) -> str:
    """The text of a file's mark, read now."""
    try:
        data = store.read(file)
    except OSError:
        return NO_MARK
    return mark_texts(torch.from_numpy(_mark(data))[None])[0]


def has_size_of(store: Store, file: str, mark: str) -> bool:
    """Whether the file has the size that its mark says: a quick look before its bytes are read."""
    try:
        return mark.startswith(f"{store.size(file)}:")
    except OSError:
        return mark == NO_MARK


def reason(error: BaseException) -> str:
    """On one line; Pillow names an object in memory, which helps nobody."""
    line = " ".join(str(error).split())
    return "cannot identify image file" if line.startswith("cannot identify") else line or type(error).__name__


def _mark(data: bytes) -> np.ndarray:
    return np.frombuffer(len(data).to_bytes(8, "little") + hashlib.sha256(data).digest(), dtype=np.uint8).copy()


@contextlib.contextmanager
def _without_libtiff(data: bytes) -> Iterator[None]:
    """libtiff writes its complaints about a file to the standard error of the process, past Python."""
    if data[:2] not in (b"II", b"MM"):
        yield
        return
    kept = os.dup(STANDARD_ERROR)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, STANDARD_ERROR)
        yield
    finally:
        os.dup2(kept, STANDARD_ERROR)
        os.close(kept)
        os.close(nowhere)
