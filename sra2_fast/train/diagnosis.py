"""Losses without a synchronisation a step, and what went wrong when one of them was not finite.

The losses of every step stay on the device until a log point reads them. A flag beside them turns NaN with the first
loss or gradient norm that is not finite and multiplies every later gradient, so the optimizer skips that update and all
that follow: when the host finds out, the weights are still those the bad step began with, and it can be repeated.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..models import SiT

TERMS = ("velocity", "align", "gradient")


class NonFiniteLoss(RuntimeError):
    """The run stopped because a loss or the gradient is not finite; the message is one line."""


class Fetch:
    """Rows on their way from the device to the host: a copy into pinned memory that nobody waits for."""

    def __init__(self, rows: Tensor) -> None:
        self._arrived = torch.cuda.Event() if rows.is_cuda else None
        self._host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=rows.is_cuda)
        self._host.copy_(rows, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def has_arrived(self) -> bool:
        """Whether `rows` would not wait."""
        return self._arrived is None or self._arrived.query()

    def rows(self) -> list[list[float]]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


class StepHistory:
    """(velocity, align, gradient norm) of the steps since the last log point, on the device.

    earlier: rows that were recorded before a checkpoint in the middle of a log interval.
    """

    def __init__(self, capacity: int, device: torch.device, earlier: list[list[float]] | None = None) -> None:
        self._rows = torch.zeros(capacity, len(TERMS), device=device)
        self._count = 0
        self._not_finite = torch.zeros((), device=device)  # 0, or NaN from the first bad step on
        if earlier:
            self._count = len(earlier)
            self._rows[: self._count] = torch.tensor(earlier, device=device)

    def __len__(self) -> int:
        return self._count

    def backward(self, total: Tensor) -> None:
        """total.backward() with gradients that are NaN if this total, or anything before it, is not finite."""
        self._not_finite += total.detach() * 0.0
        total.backward(self._not_finite + 1.0)

    def record(self, velocity: Tensor, align: Tensor, grad_norm: Tensor) -> None:
        """After the optimizer's step. All 0-d; nothing is read on the host."""
        self._not_finite += grad_norm * 0.0
        torch.stack((velocity, align, grad_norm), out=self._rows[self._count])
        self._count += 1

    def read(self) -> list[list[float]]:
        """The rows so far; waits for the device."""
        return self.fetch().rows()

    def fetch(self) -> Fetch:
        """The rows so far, without waiting; what is recorded later does not change them."""
        return Fetch(self._rows[: self._count])

    def clear(self) -> None:
        self._count = 0


def first_non_finite(rows: list[list[float]]) -> int | None:
    """The index of the first row with a NaN or an infinity."""
    return next((i for i, row in enumerate(rows) if not all(map(math.isfinite, row))), None)


def name_terms(row: list[float]) -> str:
    """The losses that are not finite; the gradient only when the losses are."""
    bad = [term for term, value in zip(TERMS, row, strict=True) if not math.isfinite(value)]
    return " and ".join([term for term in bad if term != "gradient"] or bad)


def largest_activations(model: SiT, repeat_step: Any) -> list[float]:
    """max |activation| out of each of `model.blocks` during `repeat_step()`, the forward of the bad step."""
    largest = [0.0] * len(model.blocks)

    def watch(index: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [output] if isinstance(output, Tensor) else [x for x in output if isinstance(x, Tensor)]
            values = [float(x.detach().abs().amax()) for x in tensors]
            largest[index] = math.nan if any(map(math.isnan, values)) else max(values)

        return hook

    handles = [block.register_forward_hook(watch(index)) for index, block in enumerate(model.blocks)]
    try:
        with torch.no_grad():
            repeat_step()
    finally:
        for handle in handles:
            handle.remove()
    return largest


def describe(step: int, row: list[float], activations: list[float], checkpoint: object, precision: str) -> str:
    """The one line: step, term, figures, activations, and where to go on.

    checkpoint: one that is known to be whole, or None. precision: of the run.
    """
    figures = ", ".join(
        f"{term} {value:.3g}" for term, value in zip(("velocity", "align", "gradient norm"), row, strict=True)
    )
    blocks = " ".join(f"{index}:{value:.3g}" for index, value in enumerate(activations, start=1))
    way_on = f"go on from {checkpoint} with --resume and a lower --lr" if checkpoint else "try a lower --lr"
    return (
        f"step {step}: {name_terms(row)} is not finite ({figures}); this update was skipped; "
        f"largest |activation| by block: {blocks}; {way_on}{'' if precision == 'fp32' else ', or --precision fp32'}"
    )
