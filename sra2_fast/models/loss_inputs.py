"""What the objective and the model hand each other, so that the loss is computed inside the model's forward.

It stands here because the objective may know the models, and the models must not know the objective.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from .sit import SiT


class LossOutput(NamedTuple):
    """0-d float32 tensors; total = velocity + weight * align carries the gradient of both."""

    total: Tensor
    velocity: Tensor
    align: Tensor


SiTOutput = Tensor | tuple[Tensor, Tensor] | LossOutput


class LossInputs(Protocol):
    """What one batch is compared with; `sra2_fast.objective.terms.Terms` is the one there is."""

    t: Tensor  # (B,) - the times; a wrapper that casts the arguments of `forward` has no hold of these

    @property
    def needs_hidden(self) -> bool:
        """Whether the tokens of the aligned block are wanted."""

    def evaluate(self, model: SiT, velocity_tokens: Tensor, hidden: Tensor) -> LossOutput:
        """The losses, from velocity tokens (B, N, P) and, where they are wanted, the aligned tokens (B, N, D)."""
