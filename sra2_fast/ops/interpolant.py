"""x_t = a(t) z + s(t) e: the two paths between a latent z and noise e, and their velocity."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..errors import must_be

PATHS = ("linear", "cosine")


class Interpolant(NamedTuple):
    """a, s and their derivatives da, ds at t, each shaped like t."""

    a: torch.Tensor
    s: torch.Tensor
    da: torch.Tensor
    ds: torch.Tensor

    def mix(self, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """a z + s e, the model's input."""
        return _like(self.a, latents) * latents + _like(self.s, latents) * noise

    def velocity(self, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """a' z + s' e, the regression target."""
        return _like(self.da, latents) * latents + _like(self.ds, latents) * noise


def interpolant(path: str, t: torch.Tensor) -> Interpolant:
    """Coefficients of the path at t; t = 0 is data, t = 1 is noise (arXiv 2401.08740, Sec. 2).

    path: "linear": a = 1 - t, s = t; "cosine": a = cos(pi t / 2), s = sin(pi t / 2).
    t: (B,) float - time in [0, 1].
    """
    if path == "linear":
        one = torch.ones_like(t)
        return Interpolant(1 - t, t, -one, one)
    if path == "cosine":
        angle = t * (math.pi / 2)
        a, s = torch.cos(angle), torch.sin(angle)
        return Interpolant(a, s, s * (-math.pi / 2), a * (math.pi / 2))
    raise must_be("interpolant", "path", " or ".join(PATHS), repr(path))


def _like(coefficient: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    return coefficient.reshape(-1, *[1] * (image.dim() - 1))
