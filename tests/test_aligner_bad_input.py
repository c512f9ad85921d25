"""Aligner: every message of bad input, when it is attached and when it is called."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from foreign_transformer import GRID, Transformer, aligner_of, transformer
from torch import Tensor

from sra2_fast import Aligner
from sra2_fast.errors import InputError, InputTypeError
from sra2_fast.ops.patchify import patchify

BAD: list[tuple[dict[str, Any], str]] = [
    ({"layer": "transformer_blocks.1"}, r"layer must be a module of Transformer such as blocks\.1, got 'transf"),
    ({"layer": ""}, "layer must be a module of Transformer such as"),
    ({"grid": (16,)}, r"grid must be \(H, W\) or \(F, H, W\) in tokens, got \(16,\)"),
    ({"patch_size": (1, 2, 2)}, "patch_size must be a number, or one a dimension"),
    ({"patch_size": 0}, "patch_size must be at least 1"),
    ({"latent_channels": 0}, "latent_channels must be at least 1"),
    ({"align": "cos"}, "align must be cosine or smooth_l1 or mse or l1, got 'cos'"),
    ({"weight": -1.0}, r"weight must be zero or positive, got -1\.0"),
    ({"beta": 0.0}, "beta must be positive"),
    ({"decay": (30, 20)}, r"decay must be \(first, last\) with 0 <= first < last, got \(30, 20\)"),
    ({"projector_layers": 0}, "projector_layers must be at least 1"),
    ({"implementation": "triton"}, "implementation must be fused or eager"),
    ({"latent_channels": 128}, 'implementation must be "eager" for patches of more than 256 elements'),
    ({"latent_mean": [0.0]}, r"latent_mean must be \(C,\) = \(4,\), got \(1,\)"),
    ({"latent_std": [1.0, 1.0, 1.0, 0.0]}, "latent_std must be finite, a std above 0"),
]


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_what_is_wrong_is_named_when_it_is_attached(changes: dict[str, Any], words: str) -> None:
    model = transformer()
    with pytest.raises(InputError, match=f"^Aligner: {words}") as raised:
        Aligner(model, **{"layer": "blocks.1", **GRID, **changes})
    assert "\n" not in str(raised.value)
    assert not any(module._forward_hooks for module in model.modules())


def call_without_width() -> None:
    model = transformer()
    del model.hidden_size
    Aligner(model, "blocks.1", **GRID)


def replace_block(model: Transformer, aligner: Aligner) -> None:
    model.blocks[1] = Transformer.Block(12)


IMAGE, WIDE = torch.zeros(3, 4, 8, 8), torch.zeros(3, 8, 8, 8)


def call(
    *given: Tensor, change: Callable[[Transformer, Aligner], object] | None = None, **changes: Any
) -> Callable[[], None]:
    """A loss of three images, after something went wrong."""

    def wrong() -> None:
        model = transformer()
        aligner = aligner_of(model, **changes)
        model(IMAGE)
        if change is not None:
            change(model, aligner)
        aligner(*(given or (IMAGE,)))

    return wrong


BAD_CALLS: list[tuple[Callable[[], None], str]] = [
    (lambda: Aligner("model", "blocks.1", **GRID), "model must be a torch.nn.Module, got str"),  # type: ignore[arg-type]
    (call_without_width, "Transformer does not say how wide its tokens are; give hidden_size="),
    (call(change=replace_block), r"blocks\.1 was replaced \(by peft\?\) after it was attached"),
    (
        call(change=lambda model, aligner: aligner.to("meta")),
        r"it is on meta, the model on cpu; move it: aligner\.to\(",
    ),
    (call(hidden_size=48), r"the output of blocks\.1 must be \(B, N, D\) = \(3, 16, 48"),
    (call(IMAGE[:2]), r"\(B, N, D\) = \(2, 16, 12\), got \(3, 16, 12\)"),
    (call(select=lambda output: "text"), r"must be a tensor \(see select=\), got str"),
    (call(WIDE), r"latents must be \(B, C, \.\.\.\) = \(B, 4, 8, 8\), got \(3, 8, 8, 8\)"),
    (call(IMAGE, WIDE, IMAGE), "prediction must be .* got"),
    (call(IMAGE, IMAGE), "prediction needs target; leave out both"),
    (call(IMAGE.long()), "latents must be a float, got torch.int64"),
    (call(patchify(IMAGE, 2), latent_mean=[0.0] * 4), "latents must be .* not tokens"),
]


@pytest.mark.parametrize(("wrong", "words"), BAD_CALLS)
def test_what_is_wrong_is_named_when_it_is_called(wrong: Callable[[], None], words: str) -> None:
    with pytest.raises(InputError, match=f"^Aligner: .*{words}") as raised:
        wrong()
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, InputTypeError) == bool(re.search("got str|int64", words))
