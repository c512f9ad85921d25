"""Samplers: from noise to latents along the learned velocity."""

from __future__ import annotations

from .samplers import sample_ode, sample_sde

__all__ = ["sample_ode", "sample_sde"]
