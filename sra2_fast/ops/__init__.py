"""The fused operations: argument checks, registration with torch, autograd, dispatch by device; one file an op."""

from __future__ import annotations

from .alignment_velocity_loss import alignment_velocity_loss
from .gated_residual_layer_norm_modulate import gated_residual_layer_norm_modulate
from .layer_norm_modulate import layer_norm_modulate

__all__ = ["alignment_velocity_loss", "gated_residual_layer_norm_modulate", "layer_norm_modulate"]
