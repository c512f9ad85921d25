"""bf16 copies of a network's weights, which products read, and whose gradients the optimizer takes as they are.

Autocast rounds every float32 weight to bf16 in each forward and casts every weight gradient back to float32 in each
backward: 12 bytes a weight and two launches a tensor. A shadow is the rounded weight itself, a leaf of its own: the
product's bf16 gradient arrives at it unchanged, `AdamWEMA.step` reads that, and writes the next shadow in the pass over
the float32 master that it makes anyway. The numbers are autocast's, bit for bit.

A shadow is copied again from its master before a forward where something other than such a step has written the master:
loading, `swap_ema`, `.to`, assigning `.data`, any operator in place, a step on a float32 gradient. One way escapes:
`param.data.copy_(..)` writes past autograd's counter, so call `refresh` after it.

Left out: what is no plain nn.Linear or nn.Conv2d, shared parameters, and those with hooks of their own. Several
microbatches a step (their gradients are summed in float32), DDP and FSDP are for the caller to leave out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import InputError

_PLAIN = (nn.Parameter,)  # no sharded, quantised or otherwise extended tensors


@dataclass
class _Shadow:
    """One weight: where it stands, its shadow, and the state of the master that the shadow was rounded from."""

    module: nn.Module
    name: str
    master: nn.Parameter
    leaf: nn.Parameter
    seen: tuple[int, int] | None = None

    def state(self) -> tuple[int, int]:
        """What changes with every write that autograd sees, and with every assignment of other memory."""
        return self.master._version, self.master.untyped_storage()._cdata

    def is_in_use(self) -> bool:
        """Whether the master still stands there, and nobody waits for its own gradient."""
        hooks = (self.master._backward_hooks, self.master._post_accumulate_grad_hooks)
        return self.module._parameters.get(self.name) is self.master and not any(hooks)


class ShadowWeights:
    """The shadows of one network's Linear and convolution parameters; made and kept by `AdamWEMA.bf16_weights`.

    network: the module whose forward will run. params: the optimizer's parameters; others have no shadow.
    keep: parameters whose gradient is a float32 sum that rounding would make worse; they have no shadow either.
    Shadows of parameters with the same last names (`blocks.0.mlp.fc1.weight`, `blocks.1.mlp.fc1.weight`, ..) lie one
    after another, so that the adaLN weights of all blocks are one matrix (layers/modulation.py).
    Memory: 2 bytes an element, and as much less for their gradients.
    """

    def __init__(self, network: nn.Module, params: Iterable[Tensor], keep: Iterable[Tensor] = ()) -> None:
        self.network = network
        wanted = set(map(id, params)) - set(map(id, keep))
        uses = Counter(id(p) for module in network.modules() for p in module._parameters.values())
        groups: dict[tuple[str, ...], list[tuple[nn.Module, str, nn.Parameter]]] = {}
        for path, module in network.named_modules():
            if not _is_linear(module):
                continue
            for name, param in module._parameters.items():
                is_plain = type(param) in _PLAIN and param.dtype is torch.float32 and param.is_contiguous()
                if param is not None and is_plain and id(param) in wanted and uses[id(param)] == 1:
                    groups.setdefault((*path.split(".")[-2:], name), []).append((module, name, param))
        self._shadows = [shadow for group in groups.values() for shadow in _beside_each_other(group)]
        self._of = {id(shadow.master): shadow for shadow in self._shadows}
        self._used: list[_Shadow] = []

    def leaf_of(self, param: Tensor) -> nn.Parameter | None:
        """The shadow of a parameter; None where it has none."""
        shadow = self._of.get(id(param))
        return None if shadow is None else shadow.leaf

    def items(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(parameter, its shadow) of all that have one."""
        return [(shadow.master, shadow.leaf) for shadow in self._shadows]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the network's modules hold the shadows; afterwards the masters, whatever happened inside.

        Forward and backward both belong inside: activation checkpointing calls modules in the backward.
        Raises InputError where a shadow still has the gradient of an earlier block: their sum would be bf16's.
        """
        if any(shadow.leaf.grad is not None for shadow in self._shadows):
            raise InputError(
                "AdamWEMA: bf16_weights is for one backward a step; call step() and zero_grad() first, "
                "or accumulate outside of it"
            )
        self._used = [shadow for shadow in self._shadows if shadow.is_in_use()]
        self.refresh(only_stale=True)
        for shadow in self._used:
            if shadow.leaf.requires_grad is not shadow.master.requires_grad:
                shadow.leaf.requires_grad_(shadow.master.requires_grad)
            shadow.module._parameters[shadow.name] = shadow.leaf
        try:
            yield
        finally:
            for shadow in self._used:
                shadow.module._parameters[shadow.name] = shadow.master

    @torch.no_grad()
    def refresh(self, only_stale: bool = False) -> None:
        """Round the masters again; only_stale: those that were written since, as far as autograd knows."""
        stale = [shadow for shadow in self._shadows if not only_stale or shadow.seen != shadow.state()]
        for shadow in stale:
            if shadow.leaf.device != shadow.master.device or shadow.leaf.shape != shadow.master.shape:
                shadow.leaf.data = torch.empty_like(shadow.master, dtype=shadow.leaf.dtype)
        if stale:
            torch._foreach_copy_([shadow.leaf for shadow in stale], [shadow.master.detach() for shadow in stale])
            self.note_written([shadow.master for shadow in stale])

    def note_written(self, masters: Iterable[Tensor]) -> None:
        """These parameters and their shadows were written together."""
        for master in masters:
            shadow = self._of[id(master)]
            shadow.seen = shadow.state()


def _is_linear(module: nn.Module) -> bool:
    """An nn.Linear or nn.Conv2d as torch has it, or as this package does: others may do more with their weights."""
    is_ours = isinstance(module, nn.Linear) and type(module).__module__.startswith(__package__.split(".")[0] + ".")
    return is_ours or type(module) in (nn.Linear, nn.Conv2d)


def _beside_each_other(group: Sequence[tuple[nn.Module, str, nn.Parameter]]) -> list[_Shadow]:
    """Shadows in one piece of memory, in the group's order; their values come with the first refresh."""
    params = [param for _, _, param in group]
    memory = torch.empty(sum(p.numel() for p in params), dtype=torch.bfloat16, device=params[0].device)
    pieces = memory.split([p.numel() for p in params])
    leaves = [nn.Parameter(piece.view(p.shape), p.requires_grad) for piece, p in zip(pieces, params, strict=True)]
    return [_Shadow(*place, leaf) for place, leaf in zip(group, leaves, strict=True)]
