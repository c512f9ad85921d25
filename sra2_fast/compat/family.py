"""What the models of REPA and SRA share: one constructor but for the head, and a velocity that comes in a tuple.

Left out on purpose: a `decoder_hidden_size` other than `hidden_size`. The repositories accept it and then cannot run,
which is also what breaks their S sizes: there it is left at its default of 768.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import InputError, must_be, must_have_type
from ..models import SiT

DECODER_HIDDEN_SIZE = 768  # the repositories' default, taken as "not given"
PATCH_SIZES = (2, 4, 8)
SHARED_KEYWORDS = ("qk_norm", "fused_attn", "implementation", "checkpoint_blocks")


class FamilySiT(SiT):
    """A SiT without sigma channels, built and called as REPA and SRA do.

    `SRA2Loss` takes it too: called with keywords of `sra2_fast.SiT.forward` it does what that does, with `align_depth`
    and `alignment_head` for the block and the head of its repository.
    arguments: the constructor's named arguments, which `config()` returns.
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
        self._config = {**arguments, **block_kwargs}
        self._op = op
        self.path_type = arguments["path_type"]
        self.use_cfg = arguments["use_cfg"]

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
        self, x: Tensor, t: Tensor, y: Tensor, argument: str, tap: int, force_drop_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self._check_block(argument, tap)
        velocity_tokens, hidden = self.velocity_and_hidden(x, t, y, force_drop_ids, tap)
        return self.unpatchify(velocity_tokens), hidden


def check_head_sizes(op: str, **sizes: Any) -> None:
    """Raise InputError unless every size is a positive integer."""
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{op}: {name} must be a positive integer, got {value}")
