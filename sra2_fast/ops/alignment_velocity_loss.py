"""The last projection, the alignment of its tokens with the clean latent, and the flow-matching MSE."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import must_be
from .interpolant import interpolant
from .patchify import patchify

ALIGNMENTS = ("cosine", "smooth_l1", "mse", "l1")


def alignment_loss(
    projection: torch.Tensor, target: torch.Tensor, align: str, beta: float = 0.05, eps: float = 1e-6
) -> torch.Tensor:
    """The distance of projection and target tokens, a float32 mean (DESIGN section 1; arXiv 2601.17830).

    projection, target: (B, N, P) - compared in float32 (float64 stays).
    align: cosine (negative, per token), smooth_l1 (with beta), mse or l1 (means over elements).
    eps: a norm below it counts as it, so a zero token gives a finite value and gradient.
    """
    if projection.dtype != torch.float64:
        projection, target = projection.float(), target.float()
    if align == "cosine":
        cosine = F.normalize(projection, dim=-1, eps=eps) * F.normalize(target, dim=-1, eps=eps)
        return -cosine.sum(-1).mean()
    if align == "smooth_l1":
        return F.smooth_l1_loss(projection, target, beta=beta)
    if align == "mse":
        return F.mse_loss(projection, target)
    if align == "l1":
        return F.l1_loss(projection, target)
    raise must_be("alignment_velocity_loss", "align", " or ".join(ALIGNMENTS), repr(align))


def velocity_loss(
    velocity_tokens: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    patch_size: int,
    path: str = "linear",
) -> torch.Tensor:
    """Mean over all elements of (v - (a' z + s' e))^2, in float32 (float64 stays)."""
    target = patchify(interpolant(path, t.to(latents.dtype)).velocity(latents, noise), patch_size)
    if velocity_tokens.dtype != torch.float64:
        velocity_tokens = velocity_tokens.float()
    return F.mse_loss(velocity_tokens, target.to(velocity_tokens.dtype))


def eager(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    velocity_tokens: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    *,
    patch_size: int,
    path: str = "linear",
    align: str = "cosine",
    beta: float = 0.05,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The public style: `F.linear`, `F.normalize` or `F.smooth_l1_loss`, `F.mse_loss`; returns (velocity, align)."""
    velocity = velocity_loss(velocity_tokens, latents, noise, t, patch_size, path)
    projection = F.linear(hidden, weight, bias)
    return velocity, alignment_loss(projection, patchify(latents, patch_size), align, beta, eps)


alignment_velocity_loss = eager
