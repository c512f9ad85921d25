"""The SiT model and the registry of its public sizes."""

from __future__ import annotations

from .sit import SiT, SiT_models

__all__ = ["SiT", "SiT_models"]
