"""The head that SRA 2 trains and then throws away: tokens of an early block -> what they are aligned with."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

from torch import nn

from .linear import Linear
from .plain import is_plain, is_readable, watched


def build_projector(hidden_size: int, projector_dim: int, projection_dim: int, num_layers: int) -> nn.Sequential:
    """num_layers Linears D -> projector_dim -> ... -> projection_dim with SiLU between (keys 0, 2, 4, ...).

    Five layers of width 2D are SRA 2's (arXiv 2601.17830), three of 2048 REPA's, two of 2D SRA's.
    """
    widths = [hidden_size, *[projector_dim] * (num_layers - 1), projection_dim]
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        layers += [Linear(width_in, width_out), nn.SiLU()]
    layers[-2:] = [watched(nn.Linear(widths[-2], widths[-1]))]  # read by the loss's kernel, not called
    return watched(nn.Sequential(*layers))


def readable_last(head: nn.Module | None) -> nn.Linear | None:
    """A projector's last Linear, where its weights may be read instead of calling the projector; else None."""
    if head is None or not is_plain(head, nn.Sequential) or head._compiled_call_impl is not None:
        return None
    last = cast(nn.Sequential, head)[-1]
    return cast(nn.Linear, last) if is_readable(last, nn.Linear) else None
