"""What a SiT accepts: constructor arguments, other repositories' keywords, and the tensors of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import InputError, must_be, must_have_type
from ..ops.checks import autocast_dtype

IMPLEMENTATIONS = ("eager", "fused")
FOREIGN = {  # REPA's and SRA's keywords that would mean something else here
    "z_dims": "REPA's; use projection_dim= with align_depth=, or sra2_fast.compat.repa.SiT",
    "ad": "SRA's; use align_depth=, or sra2_fast.compat.sra.SiT",
}


def constructor_arguments(names: dict[str, Any]) -> dict[str, Any]:
    """What an `__init__` was given, by name: its `locals()` on its first line, without self and the ** keywords."""
    return {k: v for k, v in names.items() if k not in ("self", "__class__", "compat_kwargs", "block_kwargs")}


def latent_size(input_size: Any) -> tuple[int, int]:
    """(H, W) of the constructor's input_size, one number or two. Raises InputError for anything else."""
    sides = [input_size] if isinstance(input_size, int) else input_size
    is_pair = isinstance(sides, (list, tuple)) and 1 <= len(sides) <= 2
    if not is_pair or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise must_be("SiT", "input_size", "a positive integer, or two (height, width)", input_size)
    return sides[0], sides[-1]


def check_arguments(**config: Any) -> None:
    """Raise InputError unless the sizes fit together."""
    for name in ("patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"):
        if not isinstance(config[name], int) or config[name] < 1:
            raise must_be("SiT", name, "a positive integer", config[name])
    if config["implementation"] not in IMPLEMENTATIONS:
        raise must_be("SiT", "implementation", " or ".join(IMPLEMENTATIONS), repr(config["implementation"]))
    patch_size, hidden_size, num_heads = config["patch_size"], config["hidden_size"], config["num_heads"]
    depth, align_depth = config["depth"], config["align_depth"]
    widths = {name: config[name] for name in ("projector_dim", "projection_dim")}
    is_divided = all(side % patch_size == 0 for side in latent_size(config["input_size"]))
    for name, is_right, expected in (
        ("input_size", is_divided, f"divisible by patch_size = {patch_size}"),
        ("hidden_size", hidden_size % num_heads == 0, f"divisible by num_heads = {num_heads}"),
        ("hidden_size", hidden_size % 4 == 0, "divisible by 4 (the sine-cosine positions)"),
        ("mlp_ratio", hidden_size * config["mlp_ratio"] >= 1, "such that the MLP has a width of at least 1"),
        ("class_dropout_prob", 0 <= config["class_dropout_prob"] < 1, "in [0, 1)"),
        ("align_depth", _is_block(align_depth, depth), f"None or a block from 1 to depth = {depth}"),
        ("projector_layers", config["projector_layers"] >= 1, "at least 1"),
        *((name, width is None or width >= 1, "None or at least 1") for name, width in widths.items()),
    ):
        if not is_right:
            raise must_be("SiT", name, expected, config[name])
    for name, width in widths.items():
        if align_depth is None and width is not None:
            raise InputError(f"SiT: {name} without align_depth has no meaning; give align_depth= as well")


def _is_block(number: Any, depth: int) -> bool:
    return number is None or (isinstance(number, int) and 1 <= number <= depth)


def check_compat_kwargs(compat_kwargs: dict[str, Any], hidden_size: int, align_depth: int | None) -> int | None:
    """Accept what REPA and SRA write and means nothing here, refuse what would mean something else.

    Returns align_depth, which REPA calls encoder_depth.
    """
    for name, value in compat_kwargs.items():
        if name in FOREIGN:
            raise InputError(f"SiT: {name} is {FOREIGN[name]}")
        if name == "encoder_depth":
            if align_depth not in (None, value):
                raise must_be("SiT", name, f"equal to align_depth = {align_depth}, or left out", value)
            align_depth = value
        elif name == "decoder_hidden_size":
            if value != hidden_size:
                raise must_be("SiT", name, f"equal to hidden_size = {hidden_size}", value)
        elif name not in ("use_cfg", "fused_attn", "path_type"):
            raise must_have_type("SiT", "keyword", "one of the documented arguments", repr(name))
    return align_depth


def check_inputs(model: Any, x: Tensor, t: Tensor, y: Tensor, force_drop_ids: Tensor | None = None) -> None:
    """Raise InputError unless x (B, C, H, W), t (B,), y (B,) and force_drop_ids (B,) fit the model.

    Values are looked at on the CPU only, where that costs no synchronisation; fake tensors and vmap's have none.
    """
    check_latents(model, x)
    for name, value in (("t", t), ("y", y), ("force_drop_ids", force_drop_ids)):
        if value is not None and value.shape != x.shape[:1]:
            raise must_be("SiT", name, f"(B,) = {tuple(x.shape[:1])}", tuple(value.shape))
    if not check_labels(model, y):
        return
    has_null_label = model.class_dropout_prob > 0
    if force_drop_ids is not None and not has_null_label and force_drop_ids.is_cpu and force_drop_ids.any():
        expected = "None or all zero in a model without a null label (class_dropout_prob = 0)"
        raise must_be("SiT", "force_drop_ids", expected, force_drop_ids.tolist())


def check_latents(model: Any, x: Tensor) -> None:
    """Raise InputError unless x is (B, C, H, W) of the model, in a type that it takes."""
    height, width = model.latent_size
    if x.dim() != 4 or x.shape[1:] != (model.in_channels, height, width):
        raise must_be("SiT", "x", f"(B, {model.in_channels}, {height}, {width})", tuple(x.shape))
    if autocast_dtype(x.device.type) == torch.float16:
        way_out = "bfloat16 (float16 is not supported; accelerate: --mixed-precision bf16)"
        raise must_have_type("SiT", "the autocast dtype", way_out, torch.float16)
    if x.dtype == torch.float16:
        raise must_have_type("SiT", "x", "float32 or bfloat16 (float16 is not supported)", x.dtype)
    if not x.is_floating_point():
        raise must_have_type("SiT", "x", "float32 or bfloat16", x.dtype)


def check_labels(model: Any, y: Tensor) -> bool:
    """Raise InputError unless y holds labels of the model. False where its values could not be looked at for free."""
    if y.is_floating_point() or y.dtype == torch.bool:
        raise must_have_type("SiT", "y", "an integer tensor of labels", y.dtype)
    has_no_values = isinstance(y, FakeTensor) or torch._C._are_functorch_transforms_active()
    if torch.compiler.is_compiling() or not y.numel() or has_no_values:
        return False
    if y.is_cpu:
        rows = model.y_embedder.embedding_table.num_embeddings
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= rows:
            raise must_be("SiT", "y", f"labels from 0 to {rows - 1}", low if low < 0 else high)
    return True


def check_guidance(model: Any, x: Tensor, channels: int | None) -> None:
    """Raise InputError unless the batch has two halves and `channels` of the latent exist."""
    if len(x) % 2:
        raise must_be("SiT", "x", "an even batch (labels, then null labels)", len(x))
    if channels is not None and channels != 3 and not 1 <= channels <= model.in_channels:
        raise must_be("SiT", "channels", f"None or from 1 to {model.in_channels}", channels)
