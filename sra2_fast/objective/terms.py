"""The loss terms of one batch, evaluated inside the model's forward.

`SRA2Loss` decides what to compare; `Terms` carries it into `SiT.forward` and computes it there, where DDP and FSDP2
see every weight that is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from ..errors import must_be
from ..ops.alignment_velocity_loss import alignment_loss, velocity_loss
from ..ops.alignment_velocity_loss import alignment_velocity_loss as _fused
from ..ops.alignment_velocity_loss import eager as _eager


class LossOutput(NamedTuple):
    """0-d float32 tensors; total = velocity + weight * align carries the gradient of both."""

    total: torch.Tensor
    velocity: torch.Tensor
    align: torch.Tensor


@dataclass(frozen=True)
class Terms:
    """What one batch is compared with.

    latents, noise: (B, C, H, W) float32. t: (B,) float32.
    weight: lambda, a float, or a 0-d tensor where a schedule changes it.
    align: the alignment's name, None for the velocity loss alone.
    target_tokens: (B, N, F) features of an encoder or a teacher; None aligns with the latent itself.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    path: str
    align: str | None
    weight: float | torch.Tensor
    beta: float
    target_tokens: torch.Tensor | None = None

    @property
    def needs_hidden(self) -> bool:
        """Whether the tokens of the aligned block are wanted."""
        return self.align is not None

    def evaluate(
        self,
        velocity_tokens: torch.Tensor,
        hidden: torch.Tensor | None,
        projector: nn.Sequential | None,
        patch_size: int,
        implementation: str,
    ) -> LossOutput:
        """The losses, from the model's velocity tokens (B, N, P) and the aligned block's tokens (B, N, D)."""
        if self.align is None:
            velocity = velocity_loss(velocity_tokens, self.latents, self.noise, self.t, patch_size, self.path)
            return LossOutput(velocity, velocity.detach(), torch.zeros_like(velocity))
        assert hidden is not None and projector is not None
        if self.target_tokens is None:
            velocity, align = self._against_latents(velocity_tokens, hidden, projector, patch_size, implementation)
        else:
            velocity = velocity_loss(velocity_tokens, self.latents, self.noise, self.t, patch_size, self.path)
            projection = projector(hidden)
            width = self.target_tokens.shape[-1]
            if projection.shape[-1] != width:
                expected = f"{width}, the width of the target's tokens"
                raise must_be("SRA2Loss", "the model's projection_dim", expected, projection.shape[-1])
            if projection.shape != self.target_tokens.shape:
                expected = f"(B, N, projection_dim) = {tuple(projection.shape)}"
                raise must_be("SRA2Loss", "target tokens", expected, tuple(self.target_tokens.shape))
            align = alignment_loss(projection, self.target_tokens, self.align, self.beta)
        return LossOutput(velocity + self.weight * align, velocity.detach(), align.detach())

    def _against_latents(
        self,
        velocity_tokens: torch.Tensor,
        hidden: torch.Tensor,
        projector: nn.Sequential,
        patch_size: int,
        implementation: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        last = projector[-1]
        assert isinstance(last, nn.Linear) and self.align is not None
        if last.out_features != velocity_tokens.shape[-1]:
            expected = f"patch_size^2 C = {velocity_tokens.shape[-1]} for target='vae'"
            raise must_be("SRA2Loss", "the model's projection_dim", expected, last.out_features)
        op = _fused if implementation == "fused" else _eager
        return op(
            projector[:-1](hidden),
            last.weight,
            last.bias,
            velocity_tokens,
            self.latents,
            self.noise,
            self.t,
            patch_size=patch_size,
            path=self.path,
            align=self.align,
            beta=self.beta,
        )
