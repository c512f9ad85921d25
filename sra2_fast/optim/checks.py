"""What AdamWEMA accepts, and the words when it does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import must_be, must_have_type


def check_settings(group: dict[str, Any]) -> None:
    """Raises InputError naming the setting of a parameter group that is out of range."""
    check_rates(group)
    lr, betas, decay = group["lr"], group["betas"], group["ema_decay"]
    if not isinstance(lr, Tensor) and not 0 <= lr < math.inf:
        raise must_be("AdamWEMA", "lr", "a finite float, 0 or more", lr)
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise must_be("AdamWEMA", "betas", "two numbers in [0, 1)", betas)
    for name in ("eps", "weight_decay"):
        if not 0 <= group[name] < math.inf:
            raise must_be("AdamWEMA", name, "a finite number, 0 or more", group[name])
    if not isinstance(decay, Tensor) and decay is not None and not 0 <= decay <= 1:
        raise must_be("AdamWEMA", "ema_decay", "in [0, 1], or None", decay)


def check_rates(group: dict[str, Any]) -> None:
    """Raises InputError where lr or ema_decay is neither a number nor a 0-d floating tensor; a tensor's value is not
    looked at, which would wait for the device."""
    for name in ("lr", "ema_decay"):
        value = group[name]
        if isinstance(value, float | int) or (name == "ema_decay" and value is None):
            continue
        if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
            got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise must_be("AdamWEMA", name, "a float, or a 0-d floating tensor", got)


def check_param(name: str, param: Tensor, device: torch.device | None, implementation: str) -> None:
    """Raises InputError or InputTypeError where this implementation cannot update the parameter."""
    if hasattr(param, "to_local"):
        expected = "a plain tensor (what FSDP2 shards is for torch.optim.AdamW)"
        raise must_have_type("AdamWEMA", f"parameter {name}", expected, type(param).__name__)
    is_eager = implementation == "eager"
    if param.dtype not in ((torch.float32, torch.bfloat16, torch.float64) if is_eager else (torch.float32,)):
        expected = "float32, bfloat16 or float64"
        if not is_eager:
            expected = 'float32 (implementation="eager" also takes bfloat16 and float64)'
        raise must_have_type("AdamWEMA", f"parameter {name}", expected, param.dtype)
    if implementation == "apex" and param.device.type != "cuda":
        raise must_be("AdamWEMA", f"parameter {name}", 'on cuda for implementation="apex"', param.device)
    if param.device != device:
        raise must_be("AdamWEMA", f"parameter {name}", f"on {device} as the first one", param.device)
    if torch.empty_like(param, device="meta").stride() != param.stride():
        raise must_be("AdamWEMA", f"parameter {name}", "dense in memory", f"strides {param.stride()}")


def check_dense_gradients(group: dict[str, Any], named: Callable[[Any], Iterable[tuple[str, Tensor]]]) -> None:
    """Raises InputError naming the parameter whose gradient is sparse; named: of the group's parameters, if one is."""
    if all(p.grad is None or p.grad.layout is torch.strided for p in group["params"]):
        return
    name = next(n for n, p in named(group) if p.grad is not None and p.grad.layout is not torch.strided)
    raise must_be("AdamWEMA", f"the gradient of {name}", "dense (embeddings: sparse=False)", "a sparse one")
