"""The square that is encoded, cut as ADM, SiT and REPA cut it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

# Of the longer to the shorter side: more of the longer side never reaches the square, but would be resized with it
# (1 x 20,000 pixels to 256 x 5,120,000).
MAX_ASPECT = 16


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """(size, size, 3) uint8: the central square of an RGB image, resized as ADM does (arXiv 2105.05233).

    The image is halved with a box filter while its shorter side is at least twice `size`, then brought to `size` on the
    shorter side with a bicubic filter, then cut in the middle. What is longer than MAX_ASPECT is cut to it first.
    """
    from PIL import Image

    width, height = (min(side, MAX_ASPECT * min(image.size)) for side in image.size)
    image = _middle(image, width, height)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    ratio = size / min(image.size)
    image = image.resize((round(image.width * ratio), round(image.height * ratio)), resample=Image.Resampling.BICUBIC)
    return np.asarray(_middle(image, size, size))


def _middle(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
