"""What a CUDA graph of `AdamWEMA.step` cannot know by itself: whether its tensors are still there, that it wrote them.

A replay runs the kernels that were captured, at the addresses of then, and none of the Python around them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .adamw_ema import AdamWEMA


def addresses(optimizer: AdamWEMA) -> list[int]:
    """Where everything lies that a step reads or writes, gradients left out; 0 for what is frozen.

    Equal lists: a captured step still does what `step` would do.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    found = [p.data_ptr() if p.requires_grad else 0 for p in params]
    found += [tensor.data_ptr() for p in params for tensor in optimizer.state.get(p, {}).values()]
    shadows = optimizer.shadows
    return found + ([] if shadows is None else [leaf.data_ptr() for _, leaf in shadows.items()])


def note_replayed(optimizer: AdamWEMA) -> None:
    """After a replay: tell autograd that the tensors have changed, and the shadows that they are the weights'."""
    shadowed = []
    for active in optimizer.active():
        torch.autograd.graph.increment_version(list(_written(active.tensors)))
        shadowed += active.tensors.params if active.tensors.shadows else []
    if optimizer.shadows is not None:
        optimizer.shadows.note_written(shadowed)


def _written(tensors: object) -> Iterator[Tensor]:
    for name in ("params", "exp_avgs", "exp_avg_sqs", "emas", "shadows"):
        yield from getattr(tensors, name) or ()
