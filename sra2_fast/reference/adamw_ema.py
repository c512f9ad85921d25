"""One step of clipped AdamW and of the exponential moving average, as equations on single tensors.

With g the gradient of this step, n the global norm over ALL parameters and k the number of steps counting this one:

    g'  = g min(1, max_grad_norm / (n + 1e-6))                    as torch.nn.utils.clip_grad_norm_
    m'  = beta1 m + (1 - beta1) g'
    s'  = beta2 s + (1 - beta2) g'^2
    p'  = p (1 - lr weight_decay) - lr (m' / (1 - beta1^k)) / (sqrt(s' / (1 - beta2^k)) + eps)
    e'  = ema_decay e + (1 - ema_decay) p'

Source: Loshchilov and Hutter, arXiv 1711.05101, Algorithm 2 (with the schedule multiplier inside lr, as
torch.optim.AdamW has it). A norm that is not finite leaves everything as it was: the step does not count.
There is nothing to differentiate here; the definition is forward only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AdamWEMASettings(NamedTuple):
    """The numbers of one step, in the order of the operator's arguments. ema_decay None: no average; max_grad_norm
    None: no clip. A tensor is 0-d and on the device."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    ema_decay: float | Tensor | None
    max_grad_norm: float | None


def global_norm(grads: Sequence[Tensor]) -> Tensor:
    """n = sqrt(sum over all tensors and elements of g^2), 0-d, in the type of the gradients."""
    return torch.stack([g.square().sum() for g in grads]).sum().sqrt()


def clip_coefficient(norm: Tensor, max_grad_norm: float | None) -> Tensor:
    """min(1, max_grad_norm / (n + 1e-6)), 0-d; one where nothing is clipped."""
    if max_grad_norm is None:
        return torch.ones_like(norm)
    return (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)


def adamw_ema(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor | None,
    step: int,
    *,
    norm: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decay: float | None,
    max_grad_norm: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The new (param, exp_avg, exp_avg_sq, ema) of one parameter; nothing is changed in place.

    param, grad, exp_avg, exp_avg_sq, ema: any one shape and floating type; ema may be None.
    step: number of updates of this parameter, this one included.
    norm: 0-d, `global_norm` over the gradients of all parameters.
    """
    if not torch.isfinite(norm):
        return param, exp_avg, exp_avg_sq, ema
    clipped = grad * clip_coefficient(norm, max_grad_norm)
    exp_avg = beta1 * exp_avg + (1 - beta1) * clipped
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * clipped.square()
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt() + eps
    param = param * (1 - lr * weight_decay) - lr * (exp_avg / (1 - beta1**step)) / denominator
    if ema is not None:
        assert ema_decay is not None
        ema = ema_decay * ema + (1 - ema_decay) * param
    return param, exp_avg, exp_avg_sq, ema
