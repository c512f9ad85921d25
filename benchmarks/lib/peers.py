"""Other people's kernels as benchmark variants: loaded where they import, listed as unmeasured where they do not.

Nothing here is a dependency. NVIDIA apex (not PyPI's `apex`, another package), Liger-Kernel and flash-attn are the best
known libraries for these ops; a bench asks for its peer and gets None, with the reason kept for the report.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch

PEER_MODULES = {"apex": "apex.optimizers", "liger": "liger_kernel.ops.layer_norm", "flash-attn": "flash_attn"}


def load(name: str) -> ModuleType | None:
    """The module of peer `name`, or None where it does not import."""
    return _try_import(name)[0]


def report() -> dict[str, str]:
    """peer -> `measured`, or `unmeasured: WHY`."""
    told = {}
    for name in PEER_MODULES:
        module, why = _try_import(name)
        told[name] = "measured" if module is not None else f"unmeasured: {why}"
    return told


def _try_import(name: str) -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module(PEER_MODULES[name])
        if name == "apex" and not hasattr(module, "FusedAdam"):
            return None, "the installed `apex` is not NVIDIA's"
        return module, ""
    except (
        ImportError,
        OSError,
        RuntimeError,
        AttributeError,
    ) as error:  # built for another torch, it fails in many ways
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def liger_layer_norm_modulate() -> Callable[..., torch.Tensor] | None:
    """Liger's LayerNorm followed by modulate: (x, shift, scale, eps) -> y; None where Liger does not import.

    Liger has no modulated norm, so weight 1 and bias 0 go in and the modulation stays with PyTorch.
    """
    module = load("liger")
    if module is None:
        return None

    def layer_norm_modulate(
        x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float = 1e-6
    ) -> torch.Tensor:
        weight, bias = torch.ones_like(x[0, 0]), torch.zeros_like(x[0, 0])
        normed = module.LigerLayerNormFunction.apply(x, weight, bias, eps)
        return normed * (1 + scale[:, None]) + shift[:, None]

    return layer_norm_modulate


def liger_gated_residual_layer_norm_modulate() -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """The residual in PyTorch, then Liger's norm: (x, branch, gate, shift, scale, eps) -> (x_new, y), or None."""
    norm = liger_layer_norm_modulate()
    if norm is None:
        return None

    def gated_residual_layer_norm_modulate(
        x: torch.Tensor,
        branch: torch.Tensor,
        gate: torch.Tensor,
        shift: torch.Tensor,
        scale: torch.Tensor,
        eps: float = 1e-6,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_new = x + gate[:, None] * branch
        return x_new, norm(x_new, shift, scale, eps)

    return gated_residual_layer_norm_modulate
