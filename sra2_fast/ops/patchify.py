"""Images to tokens and back, in the order of the SiT output layer.

Token n = (H // p row) * (W / p) + (W // p column); inside a token element (i, j, c) sits at (i * p + j) * C + c. A
video's tokens count frames first, then rows, then columns, and so do the elements of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def patchify(image: torch.Tensor, patch_size: int | Sequence[int]) -> torch.Tensor:
    """(B, C, H, W) -> (B, N, P) with N = (H / p)(W / p) and P = p * p * C; likewise (B, C, F, H, W).

    patch_size: of every dimension, or one number a dimension, such as (1, 2, 2) for video.
    """
    b, c, *sizes = image.shape
    patch = [patch_size] * len(sizes) if isinstance(patch_size, int) else list(patch_size)
    grid = [size // p for size, p in zip(sizes, patch, strict=True)]
    cut = [length for pair in zip(grid, patch, strict=True) for length in pair]
    of_grid, of_patch = range(2, 2 + len(cut), 2), range(3, 3 + len(cut), 2)
    tokens = image.reshape(b, c, *cut).permute(0, *of_grid, *of_patch, 1)
    return tokens.reshape(b, math.prod(grid), math.prod(patch) * c)


def unpatchify(tokens: torch.Tensor, patch_size: int, height: int, width: int) -> torch.Tensor:
    """(B, N, P) -> (B, C, H, W): the inverse of `patchify`."""
    b, _, size = tokens.shape
    p = patch_size
    c = size // (p * p)
    image = tokens.reshape(b, height // p, width // p, p, p, c).permute(0, 5, 1, 3, 2, 4)
    return image.reshape(b, c, height, width)
