"""Clip, AdamW and EMA over a list of parameters, in place and without asking the host anything.

`eager_*` is the public style made of PyTorch's own operators: clip_grad_norm_, AdamW(foreach), a loop over the averaged
tensors. `apex` has NVIDIA apex's kernel in the middle instead. `global_norm` and `adamw_ema_step` are one read of the
gradients and one pass over everything: csrc/adamw_ema* (C++), kernels/adamw_ema.py (Triton). The bookkeeping (state,
groups, step counts) is `sra2_fast.optim.AdamWEMA`'s; the equations are in reference/adamw_ema.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .. import backends
from ..errors import must_be
from .checks import IS_FUSED

_IS_FUSED = {**IS_FUSED, "cuda": backends.cuda_kernels() == "triton"}
_STEP = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] emas,"
    " Tensor steps, Tensor norm, float lr, float beta1, float beta2, float eps, float weight_decay, float ema_decay,"
    " float max_grad_norm) -> ()"
)


def is_fused(device: torch.device) -> bool:
    """Whether there are kernels for this device."""
    return _IS_FUSED.get(device.type, False)


def global_norm(grads: list[Tensor]) -> Tensor:
    """n = sqrt(sum of g^2 over all tensors), 0-d float32 on their device; one read, no host synchronisation.

    grads: float32, dense in memory, at least one. Squares are added in float32 over fixed chunks and these in float64
    (on the CPU): deterministic for any number of threads.
    """
    if not grads:
        raise must_be("adamw_ema", "grads", "at least one tensor", "none")
    return torch.ops.sra2_fast.adamw_ema_norm(grads)


def adamw_ema_step(
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
    max_grad_norm: float | None,
    norm: Tensor,
) -> None:
    """Clip by `norm`, AdamW, EMA: one pass over memory, all in place; nothing changes where norm is not finite.

    params, grads, exp_avgs, exp_avg_sqs, emas: float32 on one device, the strides of each parameter throughout; emas
        None: nothing is averaged. grads stay as they are.
    steps: (len(params),) float32, same device - updates of each parameter, this one included.
    norm: 0-d float32, same device - `global_norm` over all groups. max_grad_norm: None does not clip.
    """
    torch.ops.sra2_fast.adamw_ema_step(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        emas or [],
        steps,
        norm,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        1.0 if ema_decay is None else ema_decay,
        float("inf") if max_grad_norm is None else max_grad_norm,
    )


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


def why_not_apex() -> str | None:
    """None where apex's capturable multi-tensor Adam can be called, else the reason in words."""
    if not backends.has_apex():
        return "apex.optimizers does not import (PyPI's apex is another package)"
    try:
        amp = importlib.import_module("amp_C")
    except ImportError as error:
        return f"its CUDA extension does not import: {error}"
    return None if hasattr(amp, "multi_tensor_adam_capturable") else "it is older than its capturable FusedAdam"


def apex(
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
    max_grad_norm: float | None,
    norm: Tensor,
    is_finite: Tensor,
) -> None:
    """`adamw_ema_step` with the kernel under apex's FusedAdam (capturable: it takes its skip flag on the device).

    The clip goes in as the kernel's gradient scale. One step count serves all parameters of the call, the first one's,
    as in FusedAdam. The averages are a loop, as apex has none.
    """
    adam = importlib.import_module("amp_C").multi_tensor_adam_capturable
    applier = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
    clip = torch.ones_like(norm) if max_grad_norm is None else (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    rate = torch.full((1,), lr, device=norm.device)
    is_adamw = has_bias_correction = 1
    applier(
        adam,
        (~is_finite).int().reshape(1),
        [grads, params, exp_avgs, exp_avg_sqs],
        rate,
        beta1,
        beta2,
        eps,
        steps[:1].int(),
        is_adamw,
        has_bias_correction,
        weight_decay,
        clip.reshape(1),
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


_library = torch.library.Library("sra2_fast", "FRAGMENT")
_library.define("adamw_ema_norm(Tensor[] grads) -> Tensor")
_library.define("adamw_ema_step" + _STEP)


@torch.library.register_fake("sra2_fast::adamw_ema_norm", lib=_library)
def _norm_fake(grads):
    return grads[0].new_empty((), dtype=torch.float32)


@torch.library.register_fake("sra2_fast::adamw_ema_step", lib=_library)
def _step_fake(*arguments):
    return None


def _norm_triton(grads):
    from ..kernels import adamw_ema as kernels

    return kernels.global_norm(grads)


def _step_triton(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    emas,
    steps,
    norm,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    ema_decay,
    max_grad_norm,
):
    from ..kernels import adamw_ema as kernels

    settings = SimpleNamespace(
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        ema_decay=ema_decay,
        max_grad_norm=None if max_grad_norm == float("inf") else max_grad_norm,
    )
    kernels.adamw_ema_step(params, grads, exp_avgs, exp_avg_sqs, emas, steps, norm, settings)


if backends.cuda_kernels() == "triton":
    _library.impl("adamw_ema_norm", _norm_triton, "CUDA")
    _library.impl("adamw_ema_step", _step_triton, "CUDA")
