"""Clip, AdamW and EMA over a list of parameters, in place and without asking the host anything.

`eager_*` is the public style made of PyTorch's own operators: clip_grad_norm_, AdamW(foreach), a loop over the averaged
tensors. `apex` has NVIDIA apex's kernel in the middle instead. `global_norm` and `adamw_ema_step` are one read of the
gradients and one pass over everything: csrc/adamw_ema* (C++), kernels/adamw_ema.py (Triton). The bookkeeping (state,
groups, step counts) is `sra2_fast.optim.AdamWEMA`'s; the equations are in reference/adamw_ema.py.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .. import backends
from ..errors import must_be
from ..reference.adamw_ema import AdamWEMASettings, clip_coefficient
from .registry import launchers, operator

_OP = "adamw_ema"
_FUSED_ON = backends.fused_devices(_OP)
_READ_THE_FLAG_ON = ("cpu",)  # where reading a tensor waits for nobody


@dataclass
class AdamWEMATensors:
    """The tensors of one call: a parameter, its gradient and its state stand at the same place of each list.

    float32 on one device for the kernels, the strides of each parameter throughout; emas None: nothing is averaged.
    grads: all float32, or all bfloat16. shadows: bfloat16, the parameters rounded, written with them; None: none.
    steps: (len(params),) float32, same device - updates of each parameter.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    emas: list[Tensor] | None
    steps: Tensor
    shadows: list[Tensor] | None = None


def is_fused(device: torch.device) -> bool:
    """Whether there are kernels for this device."""
    return device.type in _FUSED_ON


def global_norm(grads: list[Tensor]) -> Tensor:
    """n = sqrt(sum of g^2 over all tensors), 0-d float32 on their device; one read, no host synchronisation.

    grads: float32 or bfloat16, dense in memory, at least one. Squares are added in float32 over fixed chunks and these
    in float64 (on the CPU): deterministic for any number of threads.
    """
    if not grads:
        raise must_be("adamw_ema", "grads", "at least one tensor", "none")
    return _norm(grads)


def adamw_ema_step(tensors: AdamWEMATensors, norm: Tensor, settings: AdamWEMASettings) -> None:
    """Clip by `norm`, AdamW, EMA: one pass over memory, all in place; nothing changes where norm is not finite.

    tensors: steps counts this update; grads stay as they are.
    norm: 0-d float32, same device - `global_norm` over all groups.
    settings: lr or ema_decay may be a 0-d tensor on the device, so that a CUDA graph replays with what it holds.
    """
    t = tensors
    decay = 1.0 if settings.ema_decay is None else settings.ema_decay
    clip = math.inf if settings.max_grad_norm is None else settings.max_grad_norm
    lists = (t.params, t.grads, t.exp_avgs, t.exp_avg_sqs, t.emas or [], t.shadows or [])
    numbers = settings._replace(ema_decay=decay, max_grad_norm=clip)
    rates = _on_device((settings.lr, decay), norm)
    if rates.numel():
        numbers = numbers._replace(lr=0.0, ema_decay=1.0)
    _step(*lists, t.steps, norm, rates, *numbers)
    # The kernels write past autograd: without this it would not notice that a saved weight has changed since.
    for written in (t.params, t.exp_avgs, t.exp_avg_sqs, t.emas or [], t.shadows or []):
        torch.autograd.graph.increment_version(written)


def _on_device(rates: tuple[float | Tensor, float | Tensor], like: Tensor) -> Tensor:
    """(2,) float64 of lr and ema_decay where one of them is a tensor on the device; else empty."""
    if not any(isinstance(one, Tensor) for one in rates):
        return like.new_empty(0, dtype=torch.float64)
    made = [one.double() if isinstance(one, Tensor) else like.new_full((), one, dtype=torch.float64) for one in rates]
    return torch.stack(made)


def eager_norm_and_clip(params: Sequence[Tensor], max_grad_norm: float | None) -> Tensor:
    """n, 0-d, over the gradients of `params`, which are scaled in place by min(1, max_grad_norm / (n + 1e-6))."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    if max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(params, max_grad_norm, norm)
    return norm


def eager(tensors: AdamWEMATensors, is_finite: Tensor, settings: AdamWEMASettings) -> None:
    """One AdamW step on already clipped gradients, then the EMA, with PyTorch's operators; all in place.

    tensors: of any floating type; steps counts the updates so far and is advanced by one here.
    is_finite: 0-d bool, same device - where false, nothing changes.
    On the CPU the flag is read, which waits for nobody. On a GPU torch's foreach AdamW would need the host to skip a
    step, so there the update is torch's fused AdamW, which takes the flag on the device.
    """
    t, s = tensors, settings
    on_host = is_finite.device.type in _READ_THE_FLAG_ON
    if on_host and not is_finite:
        return
    if on_host:
        s = s._replace(lr=float(s.lr), ema_decay=None if s.ema_decay is None else float(s.ema_decay))
    adamw(
        t.params,
        t.grads,
        t.exp_avgs,
        t.exp_avg_sqs,
        [],
        list(t.steps.unbind()),
        foreach=on_host,
        fused=not on_host,
        found_inf=None if on_host else (~is_finite).float(),
        amsgrad=False,
        maximize=False,
        **{name: getattr(s, name) for name in ("beta1", "beta2", "lr", "weight_decay", "eps")},
    )
    if t.emas is not None and s.ema_decay is not None:
        eager_ema(t.emas, t.params, s.ema_decay, is_finite)


def why_not_apex() -> str | None:
    """None where apex's capturable multi-tensor Adam can be called, else the reason in words."""
    if not backends.has_apex():
        return "apex.optimizers does not import (PyPI's apex is another package)"
    try:
        amp = importlib.import_module("amp_C")
    except ImportError as error:
        return f"its CUDA extension does not import: {error}"
    return None if hasattr(amp, "multi_tensor_adam_capturable") else "it is older than its capturable FusedAdam"


def apex(tensors: AdamWEMATensors, norm: Tensor, is_finite: Tensor, settings: AdamWEMASettings) -> None:
    """`adamw_ema_step` with the kernel under apex's FusedAdam (capturable: it takes its skip flag on the device).

    The clip goes in as the kernel's gradient scale. One step count serves all parameters of the call, the first one's,
    as in FusedAdam. The averages are a loop, as apex has none.
    """
    adam = importlib.import_module("amp_C").multi_tensor_adam_capturable
    applier = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
    t, s = tensors, settings
    skip = (~is_finite).int().reshape(1)
    lists = [t.grads, t.params, t.exp_avgs, t.exp_avg_sqs]
    rate = torch.as_tensor(s.lr, dtype=torch.float32, device=norm.device).reshape(1)
    clip = clip_coefficient(norm, s.max_grad_norm).reshape(1)
    is_adamw = has_bias_correction = 1
    steps = t.steps[:1].int()
    applier(
        adam, skip, lists, rate, s.beta1, s.beta2, s.eps, steps, is_adamw, has_bias_correction, s.weight_decay, clip
    )
    if t.emas is not None and s.ema_decay is not None:
        eager_ema(t.emas, t.params, s.ema_decay, is_finite)


def eager_ema(emas: Sequence[Tensor], params: Sequence[Tensor], ema_decay: float | Tensor, is_finite: Tensor) -> None:
    """e <- e + (1 - ema_decay) (p - e) tensor by tensor, in place; nothing where `is_finite` (0-d bool) is false."""
    if not emas:
        return  # the flag would be read for nothing
    weight: Tensor | float = (1.0 - ema_decay) * is_finite
    if is_finite.device.type in _READ_THE_FLAG_ON:
        weight = float(weight)  # a tensor weight is broadcast element by element there
    for ema, param in zip(emas, params, strict=True):
        ema.lerp_(param, weight if isinstance(weight, float) else weight.to(ema.dtype))


def _norm_triton(grads):
    return launchers(_OP).global_norm(grads)


@operator(_OP, "norm", "(Tensor[] grads) -> Tensor", triton=_norm_triton)
def _norm(grads):
    return grads[0].new_empty((), dtype=torch.float32)


def _step_triton(
    params, grads, exp_avgs, exp_avg_sqs, emas, shadows, steps, norm, rates,
    lr, beta1, beta2, eps, weight_decay, ema_decay, max_grad_norm,
):  # fmt: skip
    clip = None if max_grad_norm == math.inf else max_grad_norm
    settings = AdamWEMASettings(lr, beta1, beta2, eps, weight_decay, ema_decay, clip)
    launchers(_OP).adamw_ema_step(
        params, grads, exp_avgs, exp_avg_sqs, emas, shadows, steps, norm, rates if rates.numel() else None, settings
    )


@operator(
    _OP,
    "step",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] emas,"
    " Tensor(e!)[] shadows, Tensor steps, Tensor norm, Tensor rates, float lr, float beta1, float beta2, float eps,"
    " float weight_decay, float ema_decay, float max_grad_norm) -> ()",
    triton=_step_triton,
)
def _step(*arguments):
    return None
