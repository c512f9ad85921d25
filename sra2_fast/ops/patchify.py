"""Images to tokens and back, in the order of the SiT output layer.

Token n = (H // p row) * (W / p) + (W // p column); inside a token element (i, j, c) sits at (i * p + j) * C + c.
"""

from __future__ import annotations

import torch


def patchify(image: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B, C, H, W) -> (B, N, P) with N = (H / p)(W / p) and P = p * p * C."""
    b, c, h, w = image.shape
    p = patch_size
    tokens = image.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1)
    return tokens.reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(tokens: torch.Tensor, patch_size: int, height: int, width: int) -> torch.Tensor:
    """(B, N, P) -> (B, C, H, W): the inverse of `patchify`."""
    b, _, size = tokens.shape
    p = patch_size
    c = size // (p * p)
    image = tokens.reshape(b, height // p, width // p, p, p, c).permute(0, 5, 1, 3, 2, 4)
    return image.reshape(b, c, height, width)
