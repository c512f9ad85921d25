"""x' = x + gate_b branch, y = LN(x') (1 + scale_b) + shift_b: from one branch of a block to the next."""

from __future__ import annotations

import torch

from .layer_norm_modulate import eager as _layer_norm_modulate


def eager(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The public style: gate, add, `F.layer_norm`, modulate."""
    x = x + gate.unsqueeze(1) * branch
    return x, _layer_norm_modulate(x, shift, scale, eps)


gated_residual_layer_norm_modulate = eager
