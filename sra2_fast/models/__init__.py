"""The SiT model and the registry of its public sizes."""

from __future__ import annotations

from .compiled import compile_blocks
from .loss_inputs import LossOutput
from .registry import SiT_models, model_sizes
from .sit import SiT

__all__ = ["LossOutput", "SiT", "SiT_models", "compile_blocks", "model_sizes"]
