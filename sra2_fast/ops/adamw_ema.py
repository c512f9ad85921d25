"""K5: clip, AdamW and EMA over a list of parameters, in place and without asking the host anything.

`eager_*` is the public style made of PyTorch's own operators: clip_grad_norm_, AdamW(foreach), a loop over the averaged
tensors. The bookkeeping (state, groups, step counts) is `sra2_fast.optim.AdamWEMA`'s; the equations are in
`sra2_fast.reference.adamw_ema`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def eager_norm_and_clip(params: Sequence[Tensor], max_grad_norm: float | None) -> Tensor:
    """n, 0-d, over the gradients of `params`, which are scaled in place by min(1, max_grad_norm / (n + 1e-6))."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    if max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(params, max_grad_norm, norm)
    return norm


def eager(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Tensor] | None,
    steps: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decay: float | None,
    is_finite: Tensor,
) -> None:
    """One AdamW step on already clipped gradients, then the EMA, with PyTorch's operators; all in place.

    steps: (len(params),) float32 on the device of the parameters - updates so far; advanced by one here.
    is_finite: 0-d bool, same device - where false, nothing changes.
    On the CPU the flag is read, which waits for nobody. On a GPU torch's foreach AdamW would need the host to skip a
    step, so there the update is torch's fused AdamW, which takes the flag on the device.
    """
    on_cpu = is_finite.device.type == "cpu"
    if on_cpu and not is_finite:
        return
    adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        list(steps.unbind()),
        foreach=on_cpu,
        fused=not on_cpu,
        found_inf=None if on_cpu else (~is_finite).float(),
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
    if emas is not None:
        assert ema_decay is not None
        eager_ema(emas, params, ema_decay, is_finite)


def eager_ema(emas: Sequence[Tensor], params: Sequence[Tensor], ema_decay: float, is_finite: Tensor) -> None:
    """e <- e + (1 - ema_decay) (p - e) tensor by tensor, in place; nothing where `is_finite` (0-d bool) is false."""
    weight: Tensor | float = (1.0 - ema_decay) * is_finite
    if is_finite.device.type == "cpu":
        weight = float(weight)  # a tensor weight is broadcast element by element there
    for ema, param in zip(emas, params, strict=True):
        ema.lerp_(param, weight if isinstance(weight, float) else weight.to(ema.dtype))
