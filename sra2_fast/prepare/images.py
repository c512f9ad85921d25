"""Folders of images, one subfolder a class: listing, cropping, and reading them in the background."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ..errors import InputError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg")
# What Pillow raises for damaged files: OSError for most, the others from inside its format readers.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)


class ImageList(NamedTuple):
    """All images below a folder, sorted by class, then by path."""

    folder: Path
    files: list[str]  # relative to `folder`, with forward slashes; the first part is the class
    labels: np.ndarray  # (n,) int64
    class_names: list[str]  # sorted; a label is an index into it


def list_images(folder: Path) -> ImageList:
    """The PNG and JPEG files in the class subfolders of `folder`, at any depth; hidden names are passed over.

    Raises InputError: no such folder, no class subfolders, images beside them, or a class without images.
    """
    if not folder.is_dir():
        raise InputError(f"prepare: --images {folder} is no folder; give one with a subfolder for every class")
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    class_names = sorted(entry.name for entry in entries if entry.is_dir())
    loose = sorted(entry.name for entry in entries if not entry.is_dir() and _is_image(entry.name))
    if loose:
        raise InputError(
            f"prepare: {folder / loose[0]} is in no class subfolder, like {len(loose) - 1} others; move it into one"
        )
    if not class_names:
        raise InputError(f"prepare: --images {folder} is empty; it must hold a subfolder of images for every class")
    files, labels = [], []
    for label, name in enumerate(class_names):
        found = sorted(_images_below(folder, name))
        if not found:
            raise InputError(f"prepare: class folder {folder / name} holds no PNG or JPEG; add some or remove it")
        files += found
        labels += [label] * len(found)
    return ImageList(folder, files, np.array(labels, dtype=np.int64), class_names)


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """(size, size, 3) uint8: the central square, resized as ADM does (arXiv 2105.05233, also SiT and REPA).

    The image is halved with a box filter while its shorter side is at least twice `size`, then brought to `size` on the
    shorter side with a bicubic filter, then cut in the middle.
    """
    from PIL import Image

    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    ratio = size / min(image.size)
    image = image.resize((round(image.width * ratio), round(image.height * ratio)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


class Chunk(NamedTuple):
    """Images that are encoded together."""

    positions: np.ndarray  # (n,) positions in the list of the readable ones
    pixels: torch.Tensor  # (n, 3, size, size) uint8
    unreadable: list[str]  # "file (reason)" of the others


class ImageChunks(Dataset):
    """Item i is the images at chunks[i], read and cropped; a DataLoader reads them in worker processes."""

    def __init__(self, images: ImageList, chunks: list[np.ndarray], size: int) -> None:
        self.images = images
        self.chunks = chunks
        self.size = size

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, item: int) -> Chunk:
        positions, pixels, unreadable = [], [], []
        for position in self.chunks[item]:
            file = self.images.files[position]
            try:
                pixels.append(self._read(self.images.folder / file).transpose(2, 0, 1))
                positions.append(position)
            except UNREADABLE as error:
                unreadable.append(f"{file} ({' '.join(str(error).split()) or type(error).__name__})")
        # np.stack keeps the channels-last layout of its parts, which pickling in a worker loses; and the layout picks
        # the convolution's algorithm. One layout always, or the latents' last bits depend on the number of workers.
        # A tensor, because it travels through shared memory: an array goes through a pipe, where a worker whose main
        # process was killed waits for ever.
        stacked = torch.empty((len(pixels), 3, self.size, self.size), dtype=torch.uint8)
        for row, image in zip(stacked.numpy(), pixels, strict=True):
            row[...] = image
        return Chunk(np.array(positions, dtype=np.int64), stacked, unreadable)

    def _read(self, path: Path) -> np.ndarray:
        from PIL import Image

        try:
            with Image.open(path) as image:
                return center_crop(image, self.size)
        except Image.DecompressionBombError as error:
            raise OSError(str(error)) from error


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _images_below(folder: Path, class_name: str) -> list[str]:
    found = []
    for parent, folders, files in os.walk(folder / class_name, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(parent).relative_to(folder).as_posix()
        found += [f"{relative}/{file}" for file in files if _is_image(file)]
    return found
