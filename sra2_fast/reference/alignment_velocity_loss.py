"""The two losses of a training step and their gradients, as equations in plain torch.

With z the latent, e the noise, both patchified to tokens (.)_n of P elements (B N of them), W, b the last projection:

    L_v = mean over elements (v - v*)^2,   v* = a'(t) z + s'(t) e               dL_v/dv = 2 (v - v*) / (B N P)
    p_n = W h_n + b                                                             with dp = dL_a/dp:
    dL_a/dh = dp W,   dL_a/dW = dp^T h  (summed over all tokens),   dL_a/db = sum over tokens of dp

and, d = p - z elementwise, |.| the norm of a token, m = max(|p|, eps), q = p / m, y = z / max(|z|, eps):

    cosine     L_a = - mean over tokens <q, y>        dp = -(y - [|p| >= eps] <q, y> q) / (m B N)
    smooth_l1  L_a = mean of d^2 / (2 beta) where |d| <= beta, |d| - beta / 2 elsewhere
                                                      dp = clamp(d / beta, -1, 1) / (B N P)
    mse        L_a = mean of d^2                      dp = 2 d / (B N P)
    l1         L_a = mean of |d|                      dp = sign(d) / (B N P), zero at zero

The cosine's: dq/dp = (I - q q^T) / |p| above eps, and I / eps below, where m does not depend on p. So a token of zeros
has the finite gradient -y / (eps B N). No token at all (B = 0) makes both means NaN, as PyTorch's are.
Paths: linear a' = -1, s' = 1; cosine a' = -(pi/2) sin(pi t / 2), s' = (pi/2) cos(pi t / 2) (arXiv 2401.08740, Sec. 2).
Sources: arXiv 2601.17830 for the alignment, `torch.nn.functional.normalize` for eps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def patch_tokens(image: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, N, P): token (H / p row, W / p column), element (i, j, c) at (i p + j) C + c."""
    b, c, h, w = image.shape
    p = patch_size
    tokens = image.new_empty(b, h // p, w // p, p, p, c)
    for i in range(p):
        for j in range(p):
            tokens[:, :, :, i, j] = image[:, :, i::p, j::p].movedim(1, -1)
    return tokens.view(b, (h // p) * (w // p), p * p * c)


def velocity_target(latents: Tensor, noise: Tensor, t: Tensor, path: str) -> Tensor:
    """v* = a'(t) z + s'(t) e; latents, noise: (B, C, H, W), t: (B,)."""
    if path == "linear":
        return noise - latents
    assert path == "cosine"
    angle = (math.pi / 2 * t)[:, None, None, None]
    return math.pi / 2 * (angle.cos() * noise - angle.sin() * latents)


def alignment(p: Tensor, z: Tensor, align: str, beta: float, eps: float) -> tuple[Tensor, Tensor]:
    """(L_a, dp) of tokens p against z, both (B, N, P)."""
    d = p - z
    if align == "cosine":
        norm = p.norm(dim=-1, keepdim=True)
        m = norm.clamp(min=eps)
        q, y = p / m, z / z.norm(dim=-1, keepdim=True).clamp(min=eps)
        cosine = (q * y).sum(-1, keepdim=True)
        tokens = p.shape[0] * p.shape[1]
        return -cosine.mean(), -(y - torch.where(norm >= eps, cosine, 0.0) * q) / (m * tokens)
    if align == "smooth_l1":
        losses = torch.where(d.abs() <= beta, d.square() / (2 * beta), d.abs() - beta / 2)
        return losses.mean(), (d / beta).clamp(-1, 1) / max(d.numel(), 1)
    if align == "mse":
        return d.square().mean(), 2 * d / max(d.numel(), 1)
    assert align == "l1"
    return d.abs().mean(), d.sign() / max(d.numel(), 1)


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    velocity_tokens: Tensor,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    patch_size: int,
    path: str = "linear",
    align: str = "cosine",
    beta: float = 0.05,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(L_v, L_a, dL_v/dv, dL_a/dp); everything in one floating type, on any device.

    hidden: (B, N, K), weight: (P, K), bias: (P,), velocity_tokens: (B, N, P), latents, noise: (B, C, H, W), t: (B,).
    """
    target = patch_tokens(velocity_target(latents, noise, t, path), patch_size)
    difference = velocity_tokens - target
    dvelocity = 2 * difference / max(difference.numel(), 1)
    p = hidden @ weight.T + bias
    align_loss, dp = alignment(p, patch_tokens(latents, patch_size), align, beta, eps)
    return difference.square().mean(), align_loss, dvelocity, dp


def backward(
    dvelocity_loss: Tensor, dalign_loss: Tensor, dvelocity: Tensor, dp: Tensor, hidden: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias, dvelocity_tokens) from the gradients of the two losses and what `forward` kept."""
    dp = dalign_loss * dp
    dweight = torch.einsum("bnp,bnk->pk", dp, hidden)
    return dp @ weight, dweight, dp.sum((0, 1)), dvelocity_loss * dvelocity
