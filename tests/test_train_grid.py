"""Sample grids: what stands above the columns."""

from __future__ import annotations

import numpy as np
import torch

from sra2_fast.pictures import HEADER, MARGIN, header, tile
from sra2_fast.train.grid import SampleGrid

WIDTH = 3 * (64 + 2 * MARGIN)


def test_every_column_carries_the_name_of_its_class() -> None:
    """Nothing said which column was which class."""
    strip = header(["cat", "dog", "a name that is far too long for its column"], WIDTH)
    assert strip.shape == (HEADER, WIDTH, 3) and strip.dtype == np.uint8
    columns = np.split(strip, 3, axis=1)
    assert all(column.max() > 128 for column in columns), "a name is missing"
    assert not np.array_equal(columns[0], columns[1])
    assert all(column[:, :MARGIN].max() == 0 and column[:, -MARGIN:].max() == 0 for column in columns), (
        "a name runs over"
    )
    assert header(["\u4e2d\u6587", "\u00e9t\u00e9"], WIDTH).max() > 128  # what the font lacks is no error


def test_the_last_row_of_a_picture_may_be_short() -> None:
    images = np.full((5, 64, 64, 3), 255, np.uint8)
    picture = tile(images, 3)
    side = 64 + 2 * MARGIN
    assert picture.shape == (2 * side, 3 * side, 3)
    assert picture[side + MARGIN, 2 * side - MARGIN - 1].min() == 255
    assert picture[side + MARGIN : -MARGIN, 2 * side + MARGIN : -MARGIN].max() == 0


def grid(num_classes: int, class_names: list[str] | None) -> SampleGrid:
    return SampleGrid(
        shape=(1, 8, 8),
        num_classes=num_classes,
        class_names=class_names,
        seed=0,
        decode=lambda z: np.zeros((len(z), 8, 8, 3), dtype=np.uint8),
        steps=2,
        cfg_scale=1.0,
    )


def test_the_names_are_those_of_the_classes_drawn() -> None:
    names = [f"class {c}" for c in range(20)]
    assert grid(20, names).names == [names[c] for c in range(0, 20, 2)]
    assert grid(3, None).names == ["0", "1", "2"]
    picture = grid(3, ["a", "b", "c"]).picture(torch.zeros(12, 1, 8, 8))
    assert picture.shape == (HEADER + 4 * (64 + 2 * MARGIN), WIDTH, 3)
    np.testing.assert_array_equal(picture[:HEADER], header(["a", "b", "c"], WIDTH))
