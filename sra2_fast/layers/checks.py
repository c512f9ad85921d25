"""What a SiT accepts: constructor arguments, other repositories' spellings, and the tensors of a call."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import InputError, must_be, must_have_type
from ..ops.checks import autocast_dtype

IMPLEMENTATIONS = ("eager", "fused")


def check_arguments(**config: Any) -> None:
    """Raise InputError unless the sizes fit together."""
    for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"):
        if not isinstance(config[name], int) or config[name] < 1:
            raise must_be("SiT", name, "a positive integer", config[name])
    input_size, patch_size = config["input_size"], config["patch_size"]
    if input_size % patch_size:
        raise must_be("SiT", "input_size", f"divisible by patch_size = {patch_size}", input_size)
    hidden_size, num_heads, depth = config["hidden_size"], config["num_heads"], config["depth"]
    if hidden_size % num_heads:
        raise must_be("SiT", "hidden_size", f"divisible by num_heads = {num_heads}", hidden_size)
    if hidden_size % 4:
        raise must_be("SiT", "hidden_size", "divisible by 4 (the sine-cosine positions)", hidden_size)
    if int(hidden_size * config["mlp_ratio"]) < 1:
        raise must_be("SiT", "mlp_ratio", "such that the MLP has a width of at least 1", config["mlp_ratio"])
    if not 0 <= config["class_dropout_prob"] < 1:
        raise must_be("SiT", "class_dropout_prob", "in [0, 1)", config["class_dropout_prob"])
    if config["implementation"] not in IMPLEMENTATIONS:
        raise must_be("SiT", "implementation", " or ".join(IMPLEMENTATIONS), repr(config["implementation"]))
    align_depth = config["align_depth"]
    if align_depth is None:
        for name in ("projector_dim", "projection_dim"):
            if config[name] is not None:
                raise InputError(f"SiT: {name} without align_depth has no meaning; give align_depth= as well")
    elif not isinstance(align_depth, int) or not 1 <= align_depth <= depth:
        raise must_be("SiT", "align_depth", f"None or a block from 1 to depth = {depth}", align_depth)
    for name in ("projector_dim", "projection_dim"):
        if config[name] is not None and config[name] < 1:
            raise must_be("SiT", name, "None or at least 1", config[name])
    if config["projector_layers"] < 1:
        raise must_be("SiT", "projector_layers", "at least 1", config["projector_layers"])


def check_spellings(spellings: dict[str, Any], hidden_size: int, align_depth: int | None) -> int | None:
    """Accept what REPA and SRA write and means nothing here, refuse what would mean something else.

    Returns align_depth, which REPA calls encoder_depth.
    """
    for name, value in spellings.items():
        if name in ("use_cfg", "fused_attn", "path_type"):
            continue
        if name == "encoder_depth":
            if align_depth not in (None, value):
                raise must_be("SiT", "encoder_depth", f"equal to align_depth = {align_depth}, or left out", value)
            align_depth = value
        elif name == "decoder_hidden_size":
            if value != hidden_size:
                raise must_be("SiT", "decoder_hidden_size", f"equal to hidden_size = {hidden_size}", value)
        elif name == "z_dims":
            raise InputError(
                "SiT: z_dims is REPA's; use projection_dim= with align_depth=, or sra2_fast.compat.repa.SiT"
            )
        elif name == "ad":
            raise InputError("SiT: ad is SRA's; use align_depth=, or sra2_fast.compat.sra.SiT")
        else:
            raise must_have_type("SiT", "keyword", "one of the documented arguments", repr(name))
    return align_depth


def check_inputs(
    model: Any, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, force_drop_ids: torch.Tensor | None = None
) -> None:
    """Raise InputError unless x (B, C, H, W), t (B,), y (B,) and force_drop_ids (B,) fit the model.

    Values are looked at on the CPU only, where that costs no synchronisation.
    """
    size = model.input_size
    if x.dim() != 4 or x.shape[1:] != (model.in_channels, size, size):
        raise must_be("SiT", "x", f"(B, {model.in_channels}, {size}, {size})", tuple(x.shape))
    if torch.float16 in (x.dtype, autocast_dtype(x.device.type)):
        raise must_have_type("SiT", "x", "float32 or bfloat16 (float16 is not supported)", "float16")
    if not x.is_floating_point():
        raise must_have_type("SiT", "x", "float32 or bfloat16", x.dtype)
    if t.shape != x.shape[:1]:
        raise must_be("SiT", "t", f"(B,) = {tuple(x.shape[:1])}", tuple(t.shape))
    if y.shape != x.shape[:1]:
        raise must_be("SiT", "y", f"(B,) = {tuple(x.shape[:1])}", tuple(y.shape))
    if y.is_floating_point() or y.dtype == torch.bool:
        raise must_have_type("SiT", "y", "an integer tensor of labels", y.dtype)
    if force_drop_ids is not None and force_drop_ids.shape != x.shape[:1]:
        raise must_be("SiT", "force_drop_ids", f"(B,) = {tuple(x.shape[:1])}", tuple(force_drop_ids.shape))
    if torch.compiler.is_compiling() or not y.numel():
        return
    if y.is_cpu:
        rows = model.y_embedder.embedding_table.num_embeddings
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= rows:
            raise must_be("SiT", "y", f"labels from 0 to {rows - 1}", low if low < 0 else high)
    has_null_label = model.class_dropout_prob > 0
    if force_drop_ids is not None and not has_null_label and force_drop_ids.is_cpu and force_drop_ids.any():
        expected = "None or all zero in a model without a null label (class_dropout_prob = 0)"
        raise must_be("SiT", "force_drop_ids", expected, force_drop_ids.tolist())


def check_guidance(model: Any, x: torch.Tensor, channels: int | None) -> None:
    """Raise InputError unless the batch has two halves and `channels` of the latent exist."""
    if len(x) % 2:
        raise must_be("SiT", "x", "an even batch (labels, then null labels)", len(x))
    if channels is not None and channels != 3 and not 1 <= channels <= model.in_channels:
        raise must_be("SiT", "channels", f"None or from 1 to {model.in_channels}", channels)
