"""The loss terms of one batch, evaluated inside the model's forward.

`SRA2Loss` decides what to compare; `Terms` carries it into `SiT.forward` and computes it there, where DDP and FSDP2
see every weight that is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import must_be
from ..models import LossOutput, SiT
from ..ops.alignment_velocity_loss import alignment_loss, velocity_loss
from ..ops.alignment_velocity_loss import alignment_velocity_loss as _fused
from ..ops.alignment_velocity_loss import eager as _eager


@dataclass(frozen=True)
class Terms:
    """What one batch is compared with.

    latents, noise: (B, C, H, W) float32. t: (B,) float32.
    weight: lambda, a float, or a 0-d tensor where a schedule changes it.
    align: the alignment's name, None for the velocity loss alone.
    target_tokens: (B, N, F) features of an encoder or a teacher; None aligns with the latent itself.
    """

    latents: Tensor
    noise: Tensor
    t: Tensor
    path: str
    align: str | None
    weight: float | Tensor
    beta: float
    target_tokens: Tensor | None = None

    @property
    def needs_hidden(self) -> bool:
        """Whether the tokens of the aligned block are wanted."""
        return self.align is not None

    def evaluate(self, model: SiT, velocity_tokens: Tensor, hidden: Tensor) -> LossOutput:
        """The losses, from the model's velocity tokens (B, N, P) and the aligned block's tokens (B, N, D)."""
        batch = (velocity_tokens, self.latents, self.noise, self.t)
        if self.align is not None and self.target_tokens is None:
            velocity, align = self._against_latents(model, hidden, *batch)
        else:
            velocity = velocity_loss(*batch, model.patch_size, self.path)
            align = self._against_tokens(model, hidden) if self.align is not None else torch.zeros_like(velocity)
        total = velocity + self.weight * align if self.align is not None else velocity
        return LossOutput(total, velocity.detach(), align.detach())

    def _against_tokens(self, model: SiT, hidden: Tensor) -> Tensor:
        head, target = model.alignment_head, self.target_tokens
        assert head is not None and target is not None and self.align is not None
        projection = head(hidden)
        if projection.shape[-1] != target.shape[-1]:
            expected = f"{target.shape[-1]}, the width of the target's tokens"
            raise must_be("SRA2Loss", "the model's projection_dim", expected, projection.shape[-1])
        if projection.shape != target.shape:
            expected = f"(B, N, projection_dim) = {tuple(projection.shape)}"
            raise must_be("SRA2Loss", "target tokens", expected, tuple(target.shape))
        return alignment_loss(projection, target, self.align, self.beta)

    def _against_latents(self, model: SiT, hidden: Tensor, *batch: Tensor) -> tuple[Tensor, Tensor]:
        head, p_elements = model.alignment_head, batch[0].shape[-1]
        assert isinstance(head, nn.Sequential) and isinstance(head[-1], nn.Linear) and self.align is not None
        if head[-1].out_features != p_elements:
            expected = f"patch_size^2 C = {p_elements} for target='vae'"
            raise must_be("SRA2Loss", "the model's projection_dim", expected, head[-1].out_features)
        op = _fused if model.implementation == "fused" else _eager
        return op(
            head[:-1](hidden),
            head[-1].weight,
            head[-1].bias,
            *batch,
            patch_size=model.patch_size,
            path=self.path,
            align=self.align,
            beta=self.beta,
        )
