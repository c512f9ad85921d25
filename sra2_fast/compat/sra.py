"""SRA's model (arXiv 2505.02831, `SiT-SRA/models/sit.py` of its repository) on our layers: same constructor, same keys
(`ap_head.linear{1,2}`), same `(velocity, tokens, labels)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import recipe
from ..layers.checks import check_inputs, constructor_arguments
from ..models.loss_inputs import SiTOutput
from ..models.registry import registry
from .family import PATCH_SIZES, FamilySiT

STUDENT_BLOCK, XL_STUDENT_BLOCK = 4, 8


class AlignmentHead(nn.Module):
    """D -> 2D -> SiLU -> D on the student's tokens."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(hidden_size, 2 * hidden_size)
        self.act = nn.SiLU()
        self.linear2 = nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D) -> (B, N, D)."""
        return self.linear2(self.act(self.linear1(x)))


class SiT(FamilySiT):
    """A SiT that is its own teacher: it also returns the tokens after block `ad` and the labels it used.

    path_type, use_cfg: kept as attributes, without effect on the model, as in SRA.
    decoder_hidden_size: hidden_size, or the default, which stands for it.
    block_kwargs and the rest: see `FamilySiT`.
    """

    ap_head: AlignmentHead

    def __init__(
        self,
        path_type: str = "edm",
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        decoder_hidden_size: int = 768,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        use_cfg: bool = False,
        **block_kwargs: Any,
    ) -> None:
        arguments = constructor_arguments(locals())
        super().__init__("sra", arguments, block_kwargs)
        self._add_head("ap_head", AlignmentHead(hidden_size))
        self.align_depth = XL_STUDENT_BLOCK if depth == recipe.XL_DEPTH else min(STUDENT_BLOCK, depth)

    @property
    def alignment_head(self) -> nn.Module | None:
        """What the student's tokens go through before they are compared with the teacher's."""
        return self.ap_head

    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, y: Tensor, ad: int = STUDENT_BLOCK, **for_loss: Any
    ) -> tuple[Tensor, Tensor, Tensor] | SiTOutput:
        """x (B, C, H, W), t (B,), y (B,) -> velocity (B, C, H, W), tokens (B, N, D), labels (B,).

        ad: the block whose tokens are returned, through the head while training, as they are in evaluation.
        The labels are those the model saw, some dropped by chance while training: the teacher must see the same.
        for_loss: see `FamilySiT`; the block is then `align_depth`, 4, or 8 in a model of 28 blocks.
        Raises InputError unless ad is a block.
        """
        if for_loss:
            return super().forward(x, t, y, **for_loss)
        check_inputs(self, x, t, y)
        labels = self.y_embedder.drop(y)
        drop_no_more = torch.zeros_like(labels, dtype=torch.bool)
        velocity, hidden = self._velocity_and_tokens(x, t, labels, "ad", ad, drop_no_more)
        return velocity, self.ap_head(hidden) if self.training else hidden, labels


SiT_models = registry(SiT, PATCH_SIZES)
