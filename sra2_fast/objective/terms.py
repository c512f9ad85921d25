"""The loss terms of one batch, evaluated inside the model's forward.

`SRA2Loss` decides what to compare; `Terms` carries it into `SiT.forward` and computes it there, where DDP and FSDP2
see every weight that is used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import must_be
from ..models import LossOutput, SiT
from ..ops.alignment_velocity_loss import alignment_loss, velocity_loss
from ..ops.alignment_velocity_loss import alignment_velocity_loss as _fused
from ..ops.alignment_velocity_loss import eager as _eager
from ..ops.patchify import patchify
from .tokens import random_tokens, take_tokens


class Terms:
    """What one batch is compared with.

    latents, noise: (B, C, H, W) float32. t: (B,) float32.
    align: the alignment's name, None for the velocity loss alone.
    weight: lambda, a float, or a 0-d tensor where a schedule changes it.
    target_tokens: (B, N, F) features of an encoder or a teacher; None aligns with the latent itself.
    reduction: "mean", or "none" for the losses of each sample, which no kernel of ours computes.
    token_uniform, align_tokens: (B,) and the share of the tokens that are aligned; None aligns them all.

    A plain class on purpose: FSDP's mixed precision casts every tensor that it finds in a dataclass, tuple or dict on
    the way into `forward`, and targets rounded to bf16 are other targets.
    """

    def __init__(
        self,
        latents: Tensor,
        noise: Tensor,
        t: Tensor,
        path: str,
        align: str | None,
        weight: float | Tensor,
        beta: float,
        target_tokens: Tensor | None = None,
        reduction: str = "mean",
        token_uniform: Tensor | None = None,
        align_tokens: float = 1.0,
    ) -> None:
        self.latents, self.noise, self.t = latents, noise, t
        self.path, self.align, self.weight, self.beta = path, align, weight, beta
        self.target_tokens, self.reduction = target_tokens, reduction
        self.token_uniform, self.align_tokens = token_uniform, align_tokens

    @property
    def needs_hidden(self) -> bool:
        """Whether the tokens of the aligned block are wanted."""
        return self.align is not None

    def evaluate(self, model: SiT, velocity_tokens: Tensor, hidden: Tensor) -> LossOutput:
        """The losses, from the model's velocity tokens (B, N, P) and the aligned block's tokens (B, N, D)."""
        patch_size = model.patch_size
        batch = (velocity_tokens, self.latents, self.noise, self.t)
        if self.align is None:
            velocity = velocity_loss(*batch, patch_size, self.path, self.reduction)
            return LossOutput(velocity, velocity.detach(), torch.zeros_like(velocity))
        head = model.alignment_head
        is_one_op = self.target_tokens is None and self.reduction == "mean" and self.token_uniform is None
        last = model.readable_last_projection() if is_one_op else None
        if isinstance(head, nn.Sequential) and last is not None:
            self._check_width(last.out_features, velocity_tokens.shape[-1])
            op = _fused if model.implementation == "fused" else _eager
            settings: dict = {"patch_size": patch_size, "path": self.path, "align": self.align, "beta": self.beta}
            velocity, align = op(head[:-1](hidden), last.weight, last.bias, *batch, **settings)
        else:
            assert head is not None
            target = patchify(self.latents, patch_size) if self.target_tokens is None else self.target_tokens
            every_token = hidden.shape[:2]
            if self.token_uniform is not None:
                chosen = random_tokens(self.token_uniform, hidden.shape[1], self.align_tokens)
                hidden = take_tokens(hidden, chosen)
            projection = head(hidden)
            self._check_width(projection.shape[-1], target.shape[-1])
            expected_shape = (*every_token, projection.shape[-1])
            if target.shape != expected_shape:
                expected = f"(B, N, projection_dim) = {expected_shape}"
                raise must_be("SRA2Loss", "target tokens", expected, tuple(target.shape))
            if self.token_uniform is not None:
                target = take_tokens(target, chosen)
            velocity = velocity_loss(*batch, patch_size, self.path, self.reduction)
            align = alignment_loss(projection, target, self.align, self.beta, reduction=self.reduction)
        return LossOutput(velocity + self.weight * align, velocity.detach(), align.detach())

    def _check_width(self, projection_dim: int, width: int) -> None:
        if projection_dim != width:
            expected = f"patch_size^2 C = {width} for target='vae'"
            if self.target_tokens is not None:
                expected = f"{width}, the width of the target's tokens"
            raise must_be("SRA2Loss", "the model's projection_dim", expected, projection_dim)
