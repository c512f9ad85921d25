"""What a block is conditioned on: c = embedding of the time + embedding of the label (arXiv 2212.09748, Sec. 3.2)."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

FREQUENCIES = 256
MAX_PERIOD = 10000


class Conditioning(NamedTuple):
    """c, and what the adaLN heads of all layers make of it, for U pairs of time and label."""

    c: Tensor  # (U, D)
    modulations: list[Tensor | None]  # (U, M_i) of every block and the final layer; None: it computes its own from c

    def of(self, rows: Tensor) -> Conditioning:
        """Row i for an image of pair rows[i]. rows: (B,) int64."""
        return Conditioning(self.c[rows], [None if one is None else one[rows] for one in self.modulations])

    def first(self, count: int) -> Conditioning:
        """The first `count` rows, without a copy."""
        return Conditioning(self.c[:count], [None if one is None else one[:count] for one in self.modulations])


class TimestepEmbedder(nn.Module):
    """Time (B,) -> (B, D): 256 features, cosines then sines, through a two-layer SiLU MLP."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    @staticmethod
    def features(t: Tensor) -> Tensor:
        """[cos(t w), sin(t w)] in float32, (B, 256), with w_k = 10000^(-k / 128)."""
        half = FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * steps / half)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, t: Tensor) -> Tensor:
        features, weight = self.features(t), cast(nn.Linear, self.mlp[0]).weight
        # A quantised layer has whole numbers for weights, or a method of that name, and takes float32.
        is_float = isinstance(weight, Tensor) and weight.is_floating_point()
        return self.mlp(features.to(weight.dtype) if is_float else features)


class LabelEmbedder(nn.Module):
    """Label (B,) -> (B, D); with dropout_prob > 0 one more row, number num_classes, means "no label"."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def token_drop(self, labels: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        """Replace labels by the null label: where force_drop_ids says so, None by chance."""
        if force_drop_ids is None:
            dropped = torch.rand(labels.shape[0], device=labels.device) < self.dropout_prob
        else:
            dropped = force_drop_ids.bool()
        return torch.where(dropped, self.num_classes, labels)

    def drop(self, labels: Tensor, train: bool | None = None, force_drop_ids: Tensor | None = None) -> Tensor:
        """`token_drop` where force_drop_ids is given, by chance while training; train None: while this module is."""
        if force_drop_ids is None and not (self.dropout_prob > 0 and (self.training if train is None else train)):
            return labels
        return self.token_drop(labels, force_drop_ids)

    def forward(self, labels: Tensor, train: bool | None = None, force_drop_ids: Tensor | None = None) -> Tensor:
        return self.embedding_table(self.drop(labels, train, force_drop_ids))
