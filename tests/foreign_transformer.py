"""A small stand-in for a transformer that is not ours, and an aligner on it; shared by the tests of Aligner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sra2_fast import Aligner
from sra2_fast.ops.patchify import patchify

GRID = {"latent_channels": 4, "patch_size": 2, "grid": (4, 4)}


class Transformer(nn.Module):
    """A stand-in for a public transformer: tokens in a stream, a text stream beside it, a tuple between blocks."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear = nn.Linear(width, width)

        def forward(self, text: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
            return text, tokens + torch.tanh(self.linear(tokens))

    def __init__(self, width: int = 12, recompute: bool | None = None) -> None:
        super().__init__()
        self.hidden_size = width
        self.embed, self.out = nn.Linear(16, width), nn.Linear(width, 16)
        self.blocks = nn.ModuleList(Transformer.Block(width) for _ in range(3))
        self.recompute = recompute  # use_reentrant, or None for no checkpoints

    def forward(self, x: Tensor, text_tokens: int = 5) -> Tensor:
        tokens = self.embed(patchify(x, 2))
        text = tokens.new_zeros(len(x), text_tokens, tokens.shape[-1])
        for block in self.blocks:
            if self.recompute is None:
                text, tokens = block(text, tokens)
            else:
                text, tokens = checkpoint(block, text, tokens, use_reentrant=self.recompute)
        return self.out(tokens)


def transformer(**changes: Any) -> Transformer:
    torch.manual_seed(1)
    return Transformer(**changes)


def aligner_of(model: nn.Module, layer: str = "blocks.1", **changes: Any) -> Aligner:
    torch.manual_seed(2)
    return Aligner(model, layer, **{**GRID, **changes})
