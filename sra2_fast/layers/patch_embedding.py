"""Latent image to tokens, and where each token sits: the input side of SiT (arXiv 2212.09748, Sec. 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .plain import is_readable, watched


class PatchEmbed(nn.Module):
    """Non-overlapping p x p patches through one linear map, stored as a convolution (key `proj`).

    num_patches, patch_size (p, p): what the public models' own code reads.
    """

    def __init__(self, input_size: int, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.num_patches = (input_size // patch_size) ** 2
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


def sincos_positions(hidden_size: int, grid_size: int) -> Tensor:
    """Fixed 2-D sine-cosine table (grid_size^2, D) float32: the column's half first, then the row's.

    Each half is [sin(p w_k), cos(p w_k)] with w_k = 10000^(-k / (D / 4)); computed in float64.
    """
    quarter = hidden_size // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies
    table = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid_size, D / 2)
    columns = table.repeat(grid_size, 1)
    rows = table.repeat_interleave(grid_size, dim=0)
    return torch.cat([columns, rows], dim=1).float()
