"""y = LN(x)(1 + scale_b) + shift_b and its gradients, as equations in plain torch (arXiv 2212.09748, Sec. 3.2, adaLN).

Per row x of D elements, m its mean, s^2 its (biased) variance:

    r = (s^2 + eps)^(-1/2),   h = (x - m) r,   y = h (1 + scale) + shift

With g = dy (1 + scale) = dL/dh, and <.> the mean over the D elements:

    dh_i/dx_j = r (delta_ij - 1/D) - h_i h_j r / D        because dm/dx_j = 1/D and dr/dx_j = -r^2 h_j / D
    dx = r (g - <g> - h <g h>)
    dshift_b = sum over the N rows of sample b of dy,   dscale_b = sum of dy h

The eps only enters r: <h h> is s^2 r^2 < 1, and the formula for dx holds as it stands.
"""

from __future__ import annotations

import torch
from torch import Tensor


def normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(h, r) of rows x (.., D)."""
    centred = x - x.mean(-1, keepdim=True)
    r = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
    return centred * r, r


def forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """y: (B, N, D), of x (B, N, D) and shift, scale (B, D), in the type of its arguments."""
    h, _ = normalize(x, eps)
    return h * (1 + scale[:, None]) + shift[:, None]


def backward(dy: Tensor, x: Tensor, scale: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """(dx (B, N, D), dshift (B, D), dscale (B, D)) for dy (B, N, D)."""
    h, r = normalize(x, eps)
    g = dy * (1 + scale[:, None])
    dx = r * (g - g.mean(-1, keepdim=True) - h * (g * h).mean(-1, keepdim=True))
    return dx, dy.sum(1), (dy * h).sum(1)
