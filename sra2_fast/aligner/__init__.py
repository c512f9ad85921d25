"""SRA 2 for transformers that are not ours."""

from __future__ import annotations

from .aligner import Aligner

__all__ = ["Aligner"]
