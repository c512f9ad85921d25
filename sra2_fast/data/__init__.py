"""Training data: `open_data` finds out what a path holds, `make_loader` turns it into batches."""

from __future__ import annotations

from .features import FeatureSource
from .loader import Batch, BatchLoader, make_loader
from .open import open_data
from .source import DecodeInfo, LatentSource

__all__ = ["Batch", "BatchLoader", "DecodeInfo", "FeatureSource", "LatentSource", "make_loader", "open_data"]
