"""The optimizer of the public training scripts, behind the few words that a `TrainStep` asks of one."""

from __future__ import annotations

import copy

import torch
from torch import nn

from sra2_fast.recipe import EMA_DECAY, LR, MAX_GRAD_NORM


class PublicOptimizer(torch.optim.AdamW):
    """`clip_grad_norm_`, `torch.optim.AdamW`, and a loop over all parameters for the EMA, as SiT, REPA and SRA do.

    average: the EMA copy of `model`; its decay stands in the parameter groups, where a schedule may set it.
    grad_norm: 0-d, of the last step before clipping.
    """

    def __init__(self, model: nn.Module) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        super().__init__([{"params": trained, "ema_decay": EMA_DECAY}], lr=LR, weight_decay=0.0)
        self.model, self.average = model, copy.deepcopy(model).requires_grad_(False)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Clip, update, average."""
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        super().step()
        decay = self.param_groups[0]["ema_decay"]
        with torch.no_grad():
            for average, param in zip(self.average.parameters(), self.model.parameters(), strict=True):
                average.mul_(decay).add_(param, alpha=1 - decay)
