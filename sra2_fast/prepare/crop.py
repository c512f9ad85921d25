"""The square that is encoded, cut as ADM, SiT and REPA cut it: from the middle, or from a random place."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..randomness import Stream, generator

if TYPE_CHECKING:
    from PIL import Image

# Of the longer to the shorter side: more of the longer side never reaches the square, but would be resized with it
# (1 x 20,000 pixels to 256 x 5,120,000).
MAX_ASPECT = 16
LEAST_SHARE = 0.8  # of the shorter side, in a random crop; ADM's `min_crop_frac`

Crop = Callable[["Image.Image", int], np.ndarray]


def crop_of(kind: str, file: str) -> Crop:
    """How the image `file` is cut; kind: "center" or "random".

    What is random depends on the name alone, so it is the same in every run, whatever other images there are.
    """
    if kind == "center":
        return center_crop
    index = int.from_bytes(hashlib.sha256(file.encode()).digest()[:8], "little")
    return partial(random_crop, draws=generator(Stream.CROP, seed=0, index=index))


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """(size, size, 3) uint8: the central square of an RGB image, resized as ADM does (arXiv 2105.05233).

    The image is halved with a box filter while its shorter side is at least twice `size`, then brought to `size` on the
    shorter side with a bicubic filter, then cut in the middle. What is longer than MAX_ASPECT is cut to it first.
    """
    image = _resized(image, size)
    return np.asarray(_cut(image, (image.width - size) // 2, (image.height - size) // 2, size, size))


def random_crop(image: Image.Image, size: int, draws: np.random.Generator) -> np.ndarray:
    """(size, size, 3) uint8: a square at a random place, of LEAST_SHARE to all of the shorter side.

    As ADM's random_crop_arr: the shorter side is brought, as above, to a uniform integer from size to
    size / LEAST_SHARE, and the place is uniform in what is left.
    """
    image = _resized(image, int(draws.integers(size, math.ceil(size / LEAST_SHARE), endpoint=True)))
    left = int(draws.integers(image.width - size, endpoint=True))
    top = int(draws.integers(image.height - size, endpoint=True))
    return np.asarray(_cut(image, left, top, size, size))


def _resized(image: Image.Image, shorter: int) -> Image.Image:
    """The image with a shorter side of `shorter` pixels."""
    from PIL import Image

    width, height = (min(side, MAX_ASPECT * min(image.size)) for side in image.size)
    image = _cut(image, (image.width - width) // 2, (image.height - height) // 2, width, height)
    while min(image.size) >= 2 * shorter:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    ratio = shorter / min(image.size)
    return image.resize((round(image.width * ratio), round(image.height * ratio)), resample=Image.Resampling.BICUBIC)


def _cut(image: Image.Image, left: int, top: int, width: int, height: int) -> Image.Image:
    return image.crop((left, top, left + width, top + height))
