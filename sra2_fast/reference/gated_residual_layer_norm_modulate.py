"""x' = x + gate_b branch, y = LN(x')(1 + scale_b) + shift_b and their gradients, as equations in plain torch.

Both outputs are used: x' is the residual stream, y what the next branch reads. With dx' the gradient that arrives at
x' directly and `layer_norm_modulate`'s dx for what comes through y, the stream's total gradient is

    d = dx' + r (g - <g> - h <g h>)

and, x' being a sum and a product,

    dx = d,   dbranch = gate_b d,   dgate_b = sum over the N rows of sample b of branch d

dshift and dscale are those of `layer_norm_modulate` at x'.
"""

from __future__ import annotations

from torch import Tensor

from . import layer_norm_modulate


def forward(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(x', y), both (B, N, D), of x, branch (B, N, D) and gate, shift, scale (B, D), in the type of its arguments."""
    x_new = x + gate[:, None] * branch
    return x_new, layer_norm_modulate.forward(x_new, shift, scale, eps)


def backward(
    dx_new: Tensor | None, dy: Tensor, x_new: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dbranch, dgate, dshift, dscale); dx_new None: no gradient arrives at x' directly."""
    d, dshift, dscale = layer_norm_modulate.backward(dy, x_new, scale, eps)
    if dx_new is not None:
        d = d + dx_new
    return d, gate[:, None] * d, (branch * d).sum(1), dshift, dscale
