"""The velocity a sampler follows: the model's, guided within an interval of t, and as cheap as that can be had.

Guidance is one call on a doubled batch, and only inside the interval. All images of a call have the same time, so what
the layers are told of it differs by label alone: a plain `SiT` computes that once for every (t, label), and keeps it
for the next call at the same t (Heun has two).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..errors import InputError, must_be
from ..layers.conditioning import Conditioning
from ..layers.plain import is_plain
from ..models import SiT


class GuidedVelocity:
    """velocity(x, t, t_decides): the model's in float64, guided while `t_decides` lies in the interval.

    Heun's second call passes the time of its first, so that both slopes of a step are of the same field.
    The arguments are those of `sample_ode`; op names the caller in errors.
    """

    def __init__(
        self,
        op: str,
        model: Callable[..., Any],
        noise: Tensor,
        labels: Tensor,
        cfg_scale: float,
        guidance_interval: tuple[float, float],
        guided_channels: int | None,
    ) -> None:
        if noise.dim() != 4 or not noise.is_floating_point():
            raise must_be(op, "noise", "float (B, C, H, W)", f"{noise.dtype} {tuple(noise.shape)}")
        batch = noise.shape[0]
        if labels.shape != (batch,) or labels.is_floating_point():
            raise must_be(op, "labels", f"int (B,) = ({batch},)", f"{labels.dtype} {tuple(labels.shape)}")
        if guided_channels is not None and not 1 <= guided_channels <= noise.shape[1]:
            raise must_be(op, "guided_channels", f"None or 1 to {noise.shape[1]}", guided_channels)
        self._cfg_scale, self._interval, self._guided_channels = cfg_scale, guidance_interval, guided_channels
        self._dtype, self._batch = noise.dtype, batch
        if cfg_scale != 1.0:
            labels = torch.cat([labels, _null_labels(op, model, labels)])
        self._call = _SharedConditioning(model, labels) if _is_shareable(model) else _PlainCalls(model, labels)

    def edges(self) -> list[float]:
        """The times between 0 and 1 at which guidance sets in or ends: there the field jumps."""
        return sorted({t for t in self._interval if 0.0 < t < 1.0 and self._cfg_scale != 1.0})

    def __call__(self, x: Tensor, t: float, t_decides: float) -> Tensor:
        low, high = self._interval
        if self._cfg_scale == 1.0 or not low <= t_decides <= high:
            return self._call(x.to(self._dtype), t).to(torch.float64)
        halves = self._call(torch.cat([x, x]).to(self._dtype), t).to(torch.float64)
        conditional, null = halves.chunk(2)
        guided = null + self._cfg_scale * (conditional - null)
        if self._guided_channels is None:
            return guided
        return torch.cat([guided[:, : self._guided_channels], conditional[:, self._guided_channels :]], dim=1)


class _PlainCalls:
    """Any (x, t, y) -> velocity, or a tuple with it first."""

    def __init__(self, model: Callable[..., Any], labels: Tensor) -> None:
        self._model, self._labels = model, labels

    def __call__(self, x: Tensor, t: float) -> Tensor:
        out = self._model(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device), self._labels[: len(x)])
        return out[0] if isinstance(out, tuple) else out


class _SharedConditioning:
    """A plain SiT: its conditioning computed once for every (t, label), and kept until t changes."""

    def __init__(self, model: SiT, labels: Tensor) -> None:
        self._model = model
        self._distinct, self._rows = torch.unique(labels, return_inverse=True)
        self._t: float | None = None
        self._conditioning: Conditioning | None = None

    def __call__(self, x: Tensor, t: float) -> Tensor:
        if self._conditioning is None or t != self._t:
            times = torch.full(self._distinct.shape, t, dtype=x.dtype, device=x.device)
            self._t, self._conditioning = t, self._model.condition(times, self._distinct).of(self._rows)
        return self._model.velocity(x, self._conditioning.first(len(x)))


def _is_shareable(model: Any) -> TypeGuard[SiT]:
    """Whether going around `model(x, t, y)` is unseen: by hooks, by a wrapper, by label dropout in train mode."""
    return isinstance(model, SiT) and is_plain(model, SiT) and not model.training


def _null_labels(op: str, model: Any, labels: Tensor) -> Tensor:
    model = getattr(model, "module", model)  # DistributedDataParallel's wrapper hides its model's attributes
    num_classes = getattr(model, "num_classes", None)
    if num_classes is None or getattr(model, "class_dropout_prob", 1.0) == 0:
        raise InputError(
            f"{op}: cfg_scale must be 1.0 for a model without a null label; train with label dropout above 0 to guide"
        )
    return torch.full_like(labels, num_classes)
