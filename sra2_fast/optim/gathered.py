"""The tensors that one call of the kernels walks, and how they have to lie in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.adamw_ema import AdamWEMATensors


@dataclass
class Active:
    """The tensors of one group's parameters that have a gradient, kept from step to step while that set is the same.

    One for the parameters whose gradient came through a shadow weight, one for all others.
    Each parameter's state["step"] is a view of its entry of `tensors.steps`; the gradients are left out.
    states: {key: tensor} of each parameter, as the optimizer's state held it when this was gathered.
    """

    key: tuple[object, ...]
    tensors: AdamWEMATensors
    states: list[dict[str, Tensor]]

    def is_of(self, key: tuple[object, ...], state: Mapping[Tensor, dict[str, Tensor]]) -> bool:
        """Whether the parameters are the same, and nobody cleared their state or replaced a tensor of it."""
        if self.key != key:
            return False
        for param, own in zip(self.tensors.params, self.states, strict=True):
            now = state.get(param, {})
            if any(now.get(name) is not value for name, value in own.items()):
                return False
        return True


def laid_out_as(param: Tensor, value: Tensor) -> Tensor:
    """`value`, or a copy with the strides of `param` where it has others: kernels see flat memory."""
    return value if value.stride() == param.stride() else torch.empty_like(param).copy_(value)


def dense_grad(leaf: Tensor) -> Tensor:
    """The gradient of a parameter or of its shadow, with its strides and dtype."""
    grad = leaf.grad
    assert grad is not None
    if grad.stride() == leaf.stride() and grad.dtype == leaf.dtype:
        return grad
    return torch.empty_like(leaf).copy_(grad)


def exchange(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Exchange values in place, one pair at a time."""
    with torch.no_grad():
        for a, b in pairs:
            kept = a.clone()
            a.copy_(b)
            b.copy_(kept)
