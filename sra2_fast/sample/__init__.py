"""`sra2-fast sample`: images from a run or a checkpoint."""

from __future__ import annotations

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
