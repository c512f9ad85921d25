"""The optimizer: clip, AdamW and EMA as one, and the bf16 weights that it keeps for the products."""

from .adamw_ema import AdamWEMA
from .shadow_weights import ShadowWeights

__all__ = ["AdamWEMA", "ShadowWeights"]
