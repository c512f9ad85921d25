"""What the aligner hangs on a model: a hook that keeps a layer's output until the loss takes it.

The model's own modules, parameters and state dict stay as they are; the hook is all there is, and it can be taken off.
"""

from __future__ import annotations

import contextlib
import difflib
from typing import Any

import torch
from torch import nn

from ..errors import must_be, must_have_type


class Tap:
    """A forward hook that keeps the last output of its layer; in a copy of the model it keeps nothing."""

    def __init__(self, is_live: bool = False) -> None:
        self.output: Any = None
        self.is_live = is_live

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # Activation checkpointing runs a layer again inside the backward; that output is not a new one.
        if self.is_live and (torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1):
            self.output = output

    def take(self) -> Any:
        """The output, once: a second loss of one forward would be of stale tokens."""
        output, self.output = self.output, None
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Tap:
        return Tap()

    def __reduce__(self) -> tuple[type[Tap], tuple[()]]:
        return Tap, ()


def find_layer(model: nn.Module, layer: str) -> nn.Module:
    """The module of this name, in the model or in what DDP, torch.compile or peft have wrapped.

    Raises InputError that names the nearest there is.
    """
    if not isinstance(model, nn.Module):
        raise must_have_type("Aligner", "model", "a torch.nn.Module", type(model).__name__)
    for one in _unwrapped(model):
        with contextlib.suppress(AttributeError):
            return one.get_submodule(str(layer) or "nothing")
    names = [name for name, _ in one.named_modules() if name]
    number = str(layer).rpartition(".")[2]  # blocks.7 may be transformer_blocks.7 in this model
    same = [name for name in names if number.isdigit() and name.endswith(f".{number}") and name.count(".") == 1]
    near = same or difflib.get_close_matches(str(layer), names, n=1) or names
    hint = f" such as {near[0]}" if near else ""
    raise must_be("Aligner", "layer", f"a module of {type(one).__name__}{hint}", repr(layer))


def _unwrapped(model: nn.Module) -> list[nn.Module]:
    """The model, then what it wraps: DDP's `module`, torch.compile's `_orig_mod`, peft's `base_model` and `model`."""
    chain = [model]
    while True:
        inner = [getattr(chain[-1], name, None) for name in ("module", "_orig_mod", "base_model", "model")]
        wrapped = [one for one in inner if isinstance(one, nn.Module) and all(one is not other for other in chain)]
        if not wrapped:
            return chain
        chain.append(wrapped[0])


def hidden_size_of(model: nn.Module) -> int | None:
    """The width of the model's tokens, as SiT, DiT and diffusers' transformers record it; None where they do not."""
    for one in _unwrapped(model)[::-1]:
        config = getattr(one, "config", None)
        for name in ("hidden_size", "inner_dim"):
            for owner in (one, config):
                if isinstance(size := getattr(owner, name, None), int):
                    return size
        heads, width = (getattr(config, name, None) for name in ("num_attention_heads", "attention_head_dim"))
        if isinstance(heads, int) and isinstance(width, int):
            return heads * width
    return None
