"""Other people's kernels as benchmark variants: loaded where they import, listed as unmeasured where they do not.

Nothing here is a dependency. NVIDIA apex (not PyPI's `apex`, another package), Liger-Kernel, cuDNN (through
nvidia-cudnn-frontend) and flash-attn are the best known libraries for these ops; a bench takes those that import, and
the report has the reason for the others.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch

PEER_MODULES = {
    "apex": "apex.optimizers",
    "liger": "liger_kernel.ops.layer_norm",
    "cudnn": "cudnn",
    "flash-attn": "flash_attn",
}
Norm = Callable[..., torch.Tensor]  # (x, shift, scale, eps) -> y


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


def _try_module(module: str) -> ModuleType | None:
    try:
        return importlib.import_module(module)
    except Exception:  # built for another torch, a library fails in many ways
        return None


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


def layer_norm_modulate_peers() -> dict[str, Norm]:
    """{library: layer_norm_modulate through it}; Liger and apex have no modulation, so that stays with PyTorch."""
    found: dict[str, Norm] = {}
    if load("liger") is not None:
        found["liger"] = _liger
    if load("apex") is not None and _try_module("apex.normalization.fused_layer_norm") is not None:
        found["apex"] = _apex
    if load("cudnn") is not None:
        from . import cudnn_norm

        found["cudnn"] = cudnn_norm.layer_norm_modulate
    return found


def _liger(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Its norm has weights: ones and zeros go in."""
    weight, bias = torch.ones_like(x[0, 0]), torch.zeros_like(x[0, 0])
    normed = importlib.import_module(PEER_MODULES["liger"]).LigerLayerNormFunction.apply(x, weight, bias, eps)
    return normed * (1 + scale[:, None]) + shift[:, None]


def _apex(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Out of autocast, which it would let round x."""
    module = importlib.import_module("apex.normalization.fused_layer_norm")
    with torch.autocast(x.device.type, enabled=False):
        normed = module.fused_layer_norm(x, x.shape[-1:], eps)
    return normed * (1 + scale[:, None]) + shift[:, None]


def gated_residual_layer_norm_modulate_peers() -> dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]]:
    """The same of gated_residual_layer_norm_modulate: the residual in PyTorch, then the library's norm."""

    def gated(norm: Norm) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        def call(
            x: torch.Tensor,
            branch: torch.Tensor,
            gate: torch.Tensor,
            shift: torch.Tensor,
            scale: torch.Tensor,
            eps: float = 1e-6,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            x_new = x + gate[:, None] * branch
            return x_new, norm(x_new, shift, scale, eps)

        return call

    return {name: gated(norm) for name, norm in layer_norm_modulate_peers().items()}
