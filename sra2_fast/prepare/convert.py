"""Any picture that Pillow opens, as eight-bit RGB, upright and opaque; and in which ways it had to be changed.

What loses nothing is not worth a word: grey levels, palettes and black and white become RGB as they are. Colour
profiles are not applied. Of 16-bit colour Pillow itself keeps the higher byte.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

SIXTEEN_BIT = "16-bit"
OWN_RANGE = "32-bit by its own range"
CMYK = "CMYK"
ON_WHITE = "with alpha on white"
TURNED = "turned by EXIF"
FIRST_FRAME = "first of several frames"
KINDS = (SIXTEEN_BIT, OWN_RANGE, CMYK, ON_WHITE, TURNED, FIRST_FRAME)

BACKGROUND = "white"
ANIMATED_FORMATS = ("GIF", "TIFF", "WEBP", "PNG")  # the other frames of a JPEG (MPO) are previews
ORIENTATION, BITS_PER_SAMPLE = 0x0112, 258
# EXIF's orientation: the names of the transpositions in Image.Transpose that undo it
UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
# What Pillow raises for damaged files: OSError for most, the others from inside its format readers.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)


def to_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """The first frame as an RGB image, and its KINDS of conversion. Raises one of UNREADABLE."""
    from PIL import Image

    kinds = [FIRST_FRAME] if _has_frames(image) else []
    said = _orientation(image)
    image.load()  # turns TIFF files itself
    still = _orientation(image)
    if said in UPRIGHT or still in UPRIGHT:
        kinds.append(TURNED)
    depth_kind, image = _to_eight_bits(image)
    kinds += depth_kind
    if image.mode == "CMYK":
        kinds.append(CMYK)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            kinds.append(ON_WHITE)
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    image = image.convert("RGB")
    return image.transpose(Image.Transpose[UPRIGHT[still]]) if still in UPRIGHT else image, kinds


def summary(counts: dict[str, int]) -> str:
    """`converted: 12 16-bit, 7 turned by EXIF`; empty where nothing was."""
    named = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts.get(kind))
    return f"converted: {named}" if named else ""


def _to_eight_bits(image: Image.Image) -> tuple[list[str], Image.Image]:
    """A deep grey image as one of mode L (or LA); others as they are. Pillow's own conversion cuts off at 255."""
    from PIL import Image

    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return [], image
    levels = np.asarray(image)
    if image.mode.startswith("I;16") or image.format == "PNG":  # early Pillow opens 16-bit PNG as I
        bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]
        white = 2**bits - 1
        grey, kind = (levels.astype(np.int64) * 510 + white) // (2 * white), SIXTEEN_BIT
    else:
        if not np.isfinite(levels).all():
            raise ValueError("it holds values that are no finite numbers")
        least, most = np.float64(levels.min()), np.float64(levels.max())
        grey, kind = np.rint((levels - least) * (255 / (most - least or 1.0))), OWN_RANGE
    eight = Image.fromarray(grey.astype(np.uint8))
    if "transparency" in image.info:  # one of the levels means transparent
        opaque = Image.fromarray(np.where(levels == image.info["transparency"], 0, 255).astype(np.uint8))
        eight = Image.merge("LA", (eight, opaque))
    return [kind], eight


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ORIENTATION)
    except UNREADABLE:  # damaged EXIF is no reason to lose the picture
        return None


def _has_frames(image: Image.Image) -> bool:
    try:
        return image.format in ANIMATED_FORMATS and getattr(image, "n_frames", 1) > 1
    except UNREADABLE:  # in a later frame
        return True
