"""Cropping: central, exact where nothing is resized, a square of three channels whatever comes."""

from __future__ import annotations

import numpy as np
import pytest

from sra2_fast.prepare.convert import to_rgb
from sra2_fast.prepare.crop import center_crop

Image = pytest.importorskip("PIL.Image")


def test_the_crop_is_central_and_exact_without_resizing() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 71, 3), dtype=np.uint8)
    assert (center_crop(Image.fromarray(pixels), 40) == pixels[:, 15:55]).all()
    assert (center_crop(Image.fromarray(pixels.transpose(1, 0, 2)), 40) == pixels.transpose(1, 0, 2)[15:55]).all()


def test_large_images_are_halved_with_a_box_filter_first() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    boxes = pixels.reshape(40, 2, 40, 2, 3).mean(axis=(1, 3))
    # Pillow filters rows, then columns, and rounds to a whole grey level each time.
    assert np.abs(center_crop(Image.fromarray(pixels), 40) - boxes).max() <= 1


@pytest.mark.parametrize(("width", "height", "mode"), [(33, 100, "RGBA"), (200, 31, "L"), (65, 64, "P"), (7, 9, "1")])
def test_every_size_and_mode_becomes_a_square_of_three_channels(width: int, height: int, mode: str) -> None:
    rgb, _ = to_rgb(Image.new("RGB", (width, height), (255, 255, 255)).convert(mode))
    square = center_crop(rgb, 32)
    assert square.shape == (32, 32, 3) and square.dtype == np.uint8 and (square == 255).all()
