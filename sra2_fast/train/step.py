"""One training step, the only one: `sra2-fast train`, the benchmarks and the tests run this object.

    loss of every microbatch -> backward -> clip, AdamW, EMA -> figures kept on the device

Under bf16 autocast a step of one microbatch multiplies by the bf16 weights that the optimizer left (`bf16_weights`),
and hands it bf16 gradients: the same numbers, without a cast.

It waits for nothing: figures stay on the device until `history.read()`, and a loss that is not finite is noticed there
(see diagnosis.py). Left out: where batches come from, logging and saving (loop.py), and many processes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data import Batch
from ..models import LossOutput
from ..models.attention import choose_attention
from ..models.products import choose_products
from ..objective import SRA2Loss, unwrapped
from ..optim import AdamWEMA
from ..recipe import UpdateSchedule
from .captured import CapturedStep
from .diagnosis import StepHistory


class StepResult(NamedTuple):
    """0-d float32 tensors on the device: means over the whole batch, and the gradient's norm before clipping."""

    total: Tensor
    velocity: Tensor
    align: Tensor
    grad_norm: Tensor


class TrainStep:
    """`step([batch])` runs one step; several microbatches of one batch give its gradient, summed in float32.

    network: a SiT, compiled or wrapped as it will run. optimizer: AdamWEMA, or what has its `step`, `zero_grad`,
        `param_groups` and `grad_norm`; it clips.
    schedule: rate and decay by step; None leaves the optimizer's own.
    autocast_dtype: bfloat16, or None for none. label_dropout: share of labels replaced by the null label.
    teacher: the EMA copy, for target="teacher". encoder: images (B, 3, H, W) uint8 -> features (B, N, F), for
        target="features" online.
    attention: a backend of attention (`sra2-fast info`), or "auto": what `choices` says, else the fastest, which the
        first step measures. choices: {op: name} that a resumed run was trained with; then what this one runs.
    graph: capture the step as one CUDA graph after the first ones (captured.py).
    step: steps done so far, from which a resumed run counts on. history: figures since the last log point.
    """

    def __init__(
        self,
        network: nn.Module,
        loss_fn: SRA2Loss,
        optimizer: Any,
        history: StepHistory,
        *,
        device: torch.device,
        schedule: UpdateSchedule | None = None,
        autocast_dtype: torch.dtype | None = None,
        label_dropout: float = 0.0,
        teacher: nn.Module | None = None,
        encoder: Callable[[Tensor], Tensor] | None = None,
        attention: str = "auto",
        choices: Mapping[str, str] | None = None,
        graph: bool = False,
        step: int = 0,
    ) -> None:
        self.network, self.loss_fn, self.optimizer, self.history = network, loss_fn, optimizer, history
        self.device, self.schedule, self.autocast_dtype = device, schedule, autocast_dtype
        self.label_dropout, self.teacher, self.encoder = label_dropout, teacher, encoder
        self.attention, self.choices = attention, dict(choices or {})
        self._has_chosen = False
        self.step = step
        self._captured = CapturedStep(self) if graph else None

    def __call__(self, microbatches: Sequence[Batch]) -> StepResult:
        """One step on a batch cut into microbatches, each weighted by its share of the samples."""
        if not self._has_chosen:
            self.choose(max(len(batch.labels) for batch in microbatches))
        if self.schedule is not None:
            settings = self.schedule.at(self.step + 1)
            for group in self.optimizer.param_groups:
                group.update({**settings, "lr": settings["lr"] * group.get("lr_scale", 1.0)})
        figures = self.compute(microbatches) if self._captured is None else self._captured(microbatches)
        result = StepResult(*figures.unbind())
        self.history.record(result.velocity, result.align, result.grad_norm)
        self.step += 1
        return result

    def compute(self, microbatches: Sequence[Batch], align_weight: Tensor | None = None) -> Tensor:
        """All that a step does on the device: gradients of the microbatches, then the optimizer's step.

        align_weight: 0-d, in place of the loss's own. Returns (4,) float32, the figures of a StepResult.
        """
        count = sum(len(batch.labels) for batch in microbatches)
        with self.weights(len(microbatches)):
            parts = [self._backward(batch, len(batch.labels) / count, align_weight) for batch in microbatches]
        total, velocity, align = (functools.reduce(torch.add, part) for part in zip(*parts, strict=True))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack((total, velocity, align, self.optimizer.grad_norm))

    def weights(self, microbatches: int = 1) -> contextlib.AbstractContextManager[Any]:
        """What a step's forward and backward run under: the optimizer's bf16 weights, where the numbers are the same.

        Not for several microbatches, whose gradients are summed in float32, nor for the reducer of DDP, which waits for
        gradients of the parameters themselves.
        """
        if not self.keeps_bf16_weights(microbatches):
            return contextlib.nullcontext()
        return self.optimizer.bf16_weights(self.network, unwrapped(self.network).float32_gradients())

    def keeps_bf16_weights(self, microbatches: int = 1) -> bool:
        """Whether products read bf16 weights that the optimizer wrote; else autocast casts them at every use."""
        can_shadow = isinstance(self.optimizer, AdamWEMA) and self.optimizer.can_shadow
        is_alone = not isinstance(self.network, DistributedDataParallel)
        return self.autocast_dtype is torch.bfloat16 and microbatches == 1 and can_shadow and is_alone

    def choose(self, batch_size: int) -> list[str]:
        """Settle what measurement decides, for this many samples at once; in words, what was chosen and how.

        The first step does it where nobody has. Raises InputError for an `attention` that cannot run here.
        """
        self._has_chosen = True
        networks = (self.network, self.teacher)
        runs: dict[str, Any] = {"device": self.device, "autocast_dtype": self.autocast_dtype}
        kept = self.choices.get
        found = {
            "attention": choose_attention(networks, batch_size, **runs, wanted=self.attention, kept=kept("attention")),
            "products": choose_products(networks, batch_size, **runs, kept=kept("products")),
        }
        chosen = {op: choice for op, choice in found.items() if choice is not None}
        self.choices.update({op: choice.name for op, choice in chosen.items()})
        return [f"{op} {choice}" for op, choice in chosen.items()]

    def _backward(self, batch: Batch, share: float, align_weight: Tensor | None) -> tuple[Tensor, ...]:
        """Adds the gradient of this microbatch's share of the loss; returns that share of (total, velocity, align)."""
        losses = self.losses(self.network, batch, self.step, align_weight)
        if share == 1:
            self.history.backward(losses.total)
            return losses.total.detach(), losses.velocity, losses.align
        self.history.backward(losses.total * share)
        return losses.total.detach() * share, losses.velocity * share, losses.align * share

    def losses(self, network: nn.Module, batch: Batch, step: int, align_weight: Tensor | None = None) -> LossOutput:
        """The objective of one batch on `network`, in the step's precision; `step` counts the steps done before it."""
        draws = self.loss_fn.draws(
            batch.latents,
            self.label_dropout,
            noise=batch.noise,
            time_uniform=batch.time_uniform,
            label_uniform=batch.label_uniform,
            teacher_uniform=batch.teacher_uniform,
            token_uniform=batch.token_uniform,
        )
        with self.autocast():
            features = None if batch.features is None else batch.features.float()
            if self.encoder is not None and batch.images is not None:
                features = self.encoder(batch.images)
            given = {**draws._asdict(), "features": features, "teacher": self.teacher}
            return self.loss_fn(network, batch.latents, batch.labels, step=step, align_weight=align_weight, **given)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """What the forward runs under."""
        dtype = self.autocast_dtype
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)
