"""What the models of REPA and SRA share: one constructor but for the head, and a velocity that comes in a tuple.

Left out on purpose: a `decoder_hidden_size` other than `hidden_size`. The repositories accept it and then cannot run,
which is also what breaks their S sizes: there it is left at its default of 768.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import InputError, must_be, must_have_type
from ..models.sit import SIZES, SiT
from ..ops.patchify import unpatchify

DECODER_HIDDEN_SIZE = 768  # the repositories' default, taken as "not given"
PATCH_SIZES = (2, 4, 8)
SHARED_KEYWORDS = ("qk_norm", "fused_attn", "implementation", "checkpoint_blocks")


class FamilySiT(SiT):
    """A SiT without sigma channels, built and called as REPA and SRA do.

    arguments: the constructor's named arguments, kept for `config()`.
    block_kwargs: `qk_norm`; `fused_attn`, which has no effect (attention picks its own kernel); and of ours
        `implementation` and `checkpoint_blocks`. The repositories insist on `qk_norm`, here it is False by default.
    Raises InputError for sizes that do not fit or an unknown keyword.
    """

    def __init__(self, repository: str, arguments: dict[str, Any], block_kwargs: dict[str, Any]) -> None:
        op = f"compat.{repository}.SiT"
        for name in block_kwargs:
            if name not in SHARED_KEYWORDS:
                raise must_have_type(op, "keyword", f"one of {', '.join(SHARED_KEYWORDS)}", repr(name))
        own = {"path_type", "use_cfg", "decoder_hidden_size", "encoder_depth", "z_dims", "projector_dim"}
        plain = {name: value for name, value in arguments.items() if name not in own}
        decoder_hidden_size = arguments["decoder_hidden_size"]
        if decoder_hidden_size not in (DECODER_HIDDEN_SIZE, plain["hidden_size"]):
            expected = f"equal to hidden_size = {plain['hidden_size']}"
            raise must_be(op, "decoder_hidden_size", expected, decoder_hidden_size)
        super().__init__(**plain, **block_kwargs, learn_sigma=False)
        self._arguments = {**arguments, **block_kwargs}
        self._op = op
        self.path_type = arguments["path_type"]
        self.use_cfg = arguments["use_cfg"]

    def config(self) -> dict[str, Any]:
        """The constructor's arguments; `type(model)(**model.config())` has the same shape."""
        return dict(self._arguments)

    def _add_head(self, name: str, head: nn.Module) -> None:
        """Register the head where the repositories have it, before `final_layer`: the order of keys and of optimizer
        state follows the order of registration. Its Linears get the reference's initial weights."""
        for module in head.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        final_layer = self.final_layer
        del self.final_layer
        self.add_module(name, head)
        self.final_layer = final_layer

    def _check_block(self, argument: str, number: Any) -> None:
        if not isinstance(number, int) or not 1 <= number <= self.depth:
            raise must_be(self._op, argument, f"a block from 1 to depth = {self.depth}", number)

    def _velocity_and_tokens(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, argument: str, tap: int, **drop: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._check_block(argument, tap)
        velocity_tokens, hidden = self.run_blocks(x, t, y, tap=tap, **drop)
        assert velocity_tokens is not None and hidden is not None
        return unpatchify(velocity_tokens, self.patch_size, *x.shape[2:]), hidden


def check_head_sizes(op: str, **sizes: Any) -> None:
    """Raise InputError unless every size is a positive integer."""
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{op}: {name} must be a positive integer, got {value}")


def registry(model_class: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """{"SiT-XL/2": builder, ...}: the twelve names of those repositories. Every one runs, S included."""

    def registered(size: str, patch_size: int) -> Callable[..., Any]:
        depth, hidden_size, num_heads = SIZES[size]

        def build(**kwargs: Any) -> Any:
            sizes = {"depth": depth, "hidden_size": hidden_size, "num_heads": num_heads, "patch_size": patch_size}
            return model_class(**sizes, decoder_hidden_size=hidden_size, **kwargs)

        build.__name__ = f"SiT_{size}_{patch_size}"
        return build

    return {f"SiT-{size}/{patch}": registered(size, patch) for size in SIZES for patch in PATCH_SIZES}
