"""The training objective: flow matching, plus the alignment of an early block's tokens (SRA 2, REPA or SRA)."""

from __future__ import annotations

from ..models import LossOutput
from .sra2_loss import SRA2Loss, unwrapped

__all__ = ["LossOutput", "SRA2Loss", "unwrapped"]
