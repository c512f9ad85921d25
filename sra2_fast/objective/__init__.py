"""The training objective: flow matching, plus the alignment of an early block's tokens (SRA 2, REPA or SRA)."""

from __future__ import annotations

from .sra2_loss import SRA2Loss
from .terms import LossOutput

__all__ = ["LossOutput", "SRA2Loss"]
