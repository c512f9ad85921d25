"""The constructor's arguments of a SiT, from its weights and from what a training script recorded beside them.

Weights tell every size but three: the number of heads, which the public sizes imply; whether the last label is the null
label; and the sides of a latent that is not square. What is assumed is said in a note.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import recipe
from ..errors import InputError
from ..models import SiT
from ..models.registry import SIZES
from .conventions import PATCHES, Weights
from .converting import count_blocks

_HEADS = {(depth, hidden): heads for depth, hidden, heads in SIZES.values()} | {(24, 1536): 24, (28, 1792): 28}
_TARGETS = {"repa": "features", "repa-e": "features", "sra": "teacher"}  # what the source's projector is aligned with
_LABELS = "y_embedder.embedding_table.weight"


class Told(NamedTuple):
    """What the user says of a file whose weights do not tell it; None: whatever they tell."""

    num_heads: int | None = None
    num_classes: int | None = None
    input_size: int | Sequence[int] | None = None
    align_depth: int | None = None


def model_config(
    state: Weights, source: str, args: Mapping[str, Any], told: Told, op: str
) -> tuple[dict[str, Any], list[str]]:
    """(arguments of `SiT`, notes on what was assumed) for converted weights.

    Raises InputError where something is not told, or told wrongly.
    """
    hidden, channels, patch, _ = state[PATCHES].shape
    depth = count_blocks(state)
    num_classes, dropout, notes = _classes(state, args, told, op)
    config: dict[str, Any] = {
        "input_size": _input_size(state, patch, told, op),
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": hidden,
        "depth": depth,
        "num_heads": _num_heads(state, depth, hidden, told, op),
        "mlp_ratio": _mlp_ratio(len(state["blocks.0.mlp.fc1.weight"]), hidden),
        "class_dropout_prob": dropout,
        "num_classes": num_classes,
        "learn_sigma": False,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
    }
    linears = sorted((int(name.split(".")[1]), one) for name, one in state.items() if _is_weight_of(name, "projector."))
    if linears:
        recorded = args.get("encoder_depth", args.get("block_out_s"))
        target = _TARGETS.get(source, "vae")
        align_depth = recorded if told.align_depth is None else told.align_depth
        if align_depth is None:
            align_depth = recipe.align_depth(registry_name(config), depth, target)
            notes.append(f"the projector is taken to read block {align_depth}, which its file does not tell")
        config |= {
            "align_depth": align_depth,
            "projector_layers": len(linears),
            "projector_dim": len(linears[0][1]),
            "projection_dim": len(linears[-1][1]),
        }
    check_fits(state, config, op)
    return config, notes


def registry_name(config: Mapping[str, Any]) -> str:
    """ "SiT-XL/2" where the sizes are those of a name, else "hidden,depth,heads,patch"; both are what --model takes."""
    sizes = config["depth"], config["hidden_size"], config["num_heads"]
    for name, of_name in SIZES.items():
        if sizes == of_name and config["patch_size"] in (1, 2, 4, 8):
            return f"SiT-{name}/{config['patch_size']}"
    return ",".join(str(config[name]) for name in ("hidden_size", "depth", "num_heads", "patch_size"))


def check_fits(state: Weights, config: Mapping[str, Any], op: str) -> None:
    """Raise InputError unless the weights have the names and shapes of `SiT(**config)`."""
    try:
        with torch.device("meta"):
            own = SiT(**config).state_dict()
    except InputError as error:
        raise InputError(f"{op}: {error}") from error
    for name in [*own, *state]:
        here = tuple(own[name].shape) if name in own else "absent"
        there = tuple(state[name].shape) if name in state else "absent"
        if here != there:
            raise InputError(f"{op}: {name} is {there} there and {here} in a SiT of these sizes")


def _mlp_ratio(width: int, hidden: int) -> float:
    """The ratio whose int(hidden * ratio) is the MLP's width."""
    ratio = width / hidden
    return ratio if int(hidden * ratio) == width else math.nextafter(ratio, math.inf)


def _is_weight_of(name: str, start: str) -> bool:
    return name.startswith(start) and name.endswith(".weight")


def _classes(state: Mapping[str, Tensor], args: Mapping[str, Any], told: Told, op: str) -> tuple[int, float, list[str]]:
    """(num_classes, class_dropout_prob, notes): is the table's last row a class or the null label?"""
    rows = len(state[_LABELS])
    section = args.get("data")
    recorded = section.get("num_classes") if isinstance(section, Mapping) else args.get("num_classes")
    num_classes = recorded if told.num_classes is None else told.num_classes
    if num_classes is None:
        note = f"{rows} labels are taken to be {rows - 1} classes and the null label (num_classes says otherwise)"
        return rows - 1, recipe.LABEL_DROPOUT, [note] if rows != 1001 else []
    if num_classes not in (rows, rows - 1):
        raise InputError(f"{op}: has {rows} labels, which are not {num_classes} classes, with a null label or without")
    dropout = args.get("cfg_prob", recipe.LABEL_DROPOUT)
    return num_classes, (dropout or recipe.LABEL_DROPOUT) if rows > num_classes else 0.0, []


def _num_heads(state: Mapping[str, Tensor], depth: int, hidden: int, told: Told, op: str) -> int:
    norm = state.get("blocks.0.attn.q_norm.weight")
    heads = hidden // len(norm) if norm is not None else _HEADS.get((depth, hidden))
    heads = heads if told.num_heads is None else told.num_heads
    if heads is None:
        how = "say the heads (sra2-fast convert --num-heads)"
        raise InputError(f"{op}: {depth} blocks of width {hidden} are no public size, so {how}")
    return heads


def _input_size(state: Mapping[str, Tensor], patch: int, told: Told, op: str) -> int | Sequence[int]:
    if told.input_size is not None:
        return told.input_size
    tokens = state["pos_embed"].shape[1]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise InputError(f"{op}: {tokens} positions are no square, so say the latent's sides (--input-size 32,64)")
    return side * patch
