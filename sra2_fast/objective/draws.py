"""The random numbers of one batch: its times, noise, dropped labels, teacher gaps and aligned tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Draws(NamedTuple):
    """What is random in one batch; `SRA2Loss.draws` makes it, `SRA2Loss.__call__` takes it."""

    t: Tensor  # (B,) float
    noise: Tensor  # (B, C, H, W) like the latents
    label_drop: Tensor | None  # (B,) bool - labels replaced by the null label; None: none are
    teacher_gap: Tensor | None  # (B,) - how much earlier the teacher looks; None without a teacher
    token_uniform: Tensor | None = None  # (B,) in (0, 1) - says which tokens are aligned; None: all of them
