"""Latent image to tokens, and where each token sits: the input side of SiT (arXiv 2212.09748, Sec. 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .plain import is_readable, watched


class PatchEmbed(nn.Module):
    """Non-overlapping p x p patches through one linear map, stored as a convolution (key `proj`).

    grid: (rows, columns) of tokens. num_patches, patch_size (p, p): what the public models' own code reads.
    """

    def __init__(self, grid: tuple[int, int], patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.num_patches = grid[0] * grid[1]
        self.patch_size = (patch_size, patch_size)
        self.proj = watched(nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, N, D), tokens row by row."""
        if not is_readable(self.proj, nn.Conv2d):
            return self.proj(x).flatten(2).transpose(1, 2).contiguous()
        b, c, height, width = x.shape
        p = self.patch_size[0]
        rows, columns = height // p, width // p
        patches = x.reshape(b, c, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, c * p * p)
        # Not self.proj(x): a convolution leaves D strided, and every token would have to be moved, not every latent.
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def sincos_positions(hidden_size: int, grid: tuple[int, int], over: tuple[int, int] | None = None) -> Tensor:
    """Fixed 2-D sine-cosine table (rows * columns, D) float32: the column's half first, then the row's.

    Each half is [sin(p w_k), cos(p w_k)] with w_k = 10000^(-k / (D / 4)); computed in float64.
    grid: (rows, columns) of tokens, at positions p = 0, 1, ... of each.
    over: (rows, columns) of another grid, whose extent these tokens are spread over: p = 0, r, 2 r, ... with r the
        other grid's rows (columns) over this one's. That is how a model trained on that grid sees another size with
        every position inside of what it knows.
    """
    quarter = hidden_size // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    halves = []
    for count, extent in zip(grid, over or grid, strict=True):
        angles = (torch.arange(count, dtype=torch.float64) * extent / count)[:, None] * frequencies
        halves.append(torch.cat([angles.sin(), angles.cos()], dim=1))  # (count, D / 2)
    rows, columns = halves
    return torch.cat([columns.repeat(grid[0], 1), rows.repeat_interleave(grid[1], dim=0)], dim=1).float()
