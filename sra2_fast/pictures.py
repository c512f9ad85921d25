"""Pictures for people to look at: images side by side, names above the columns, PNG files."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .errors import InputError
from .files import write_whole

IMAGE_PIXELS = 64  # smaller images are enlarged, pixel by pixel, to at least this side
MARGIN = 2
HEADER = 16  # pixels for the names of the classes


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """(n, H, W, 3) uint8 -> one picture, `columns` images a row, small ones enlarged to the nearest neighbour.

    Where `columns` does not divide n, the last row is filled up with black.
    """
    images = np.pad(images, ((0, -len(images) % columns), (0, 0), (0, 0), (0, 0)))
    factor = -(-IMAGE_PIXELS // images.shape[1])
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    images = np.pad(images, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), constant_values=96)
    count, height, width, _ = images.shape
    rows = count // columns
    return images.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def header(names: Sequence[str], width: int) -> np.ndarray:
    """(HEADER, width, 3) uint8: the names in white, each centred over its column and cut where it is too long."""
    from PIL import Image, ImageDraw

    strip = Image.new("RGB", (width, HEADER))
    draw = ImageDraw.Draw(strip)
    column = width / len(names)
    for place, name in enumerate(names):
        text = name.encode("latin-1", "replace").decode("latin-1")  # what Pillow's own font has
        while len(text) > 1 and draw.textlength(text) > column - 2 * MARGIN:
            text = text[:-1]
        draw.text(((place + 0.5) * column, HEADER / 2), text, fill="white", anchor="mm")
    return np.asarray(strip)


def can_write_png() -> bool:
    """Whether pillow is installed."""
    return importlib.util.find_spec("PIL") is not None


def png_bytes(picture: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as the bytes of a PNG file."""
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, format="PNG")
    return encoded.getvalue()


def write_png(picture: np.ndarray, path: Path) -> None:
    """Write the picture, whole or not at all; InputError when the disk does not take it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}); free some space") from error
    write_whole(path, png_bytes(picture), op="picture")
