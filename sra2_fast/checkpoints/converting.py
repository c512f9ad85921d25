"""State dicts of the public repositories into ours and back; the conventions are in conventions.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, must_be
from .conventions import Weights, add_sigma, drop_sigma, has_sigma, turn_time_around
from .reading import unpack, without_wrappers
from .sources import FROM_NOISE, LAYOUTS, check_is_sit, training_path, which_source

_OP = "convert_state_dict"
_ORDER = ("pos_embed", "x_embedder", "t_embedder", "y_embedder", "blocks", "projector", "projectors", "final_layer")
_SRA_HEAD = {"linear1": "0", "linear2": "2"}  # its SiLU is number 1
_REPA_HEAD = {"0", "2", "4"}  # the Linears of a projector of REPA


def convert_state_dict(state: Mapping[str, Any], source: str = "auto", to: str = "sra2_fast") -> dict[str, Tensor]:
    """Weights of a public SiT, REPA, SRA, REPA-E or SiT-like LightningDiT model, as those of a `sra2_fast.SiT`.

    state: a state dict, or what a training script saved: a mapping with one under "ema" (taken first) or "model".
        `module.` and `_orig_mod.` in names are dropped. It is left as it is.
    source: "sit", "repa", "sra", "repa-e", "lightningdit" or "sra2_fast"; "auto" tells them by their names, shapes and
        recorded options, and asks where SiT without sigma channels and REPA without a projector cannot be told apart.
    to: "sra2_fast", for `SiT(..., learn_sigma=False)`; "sit", for the SiT repository's class as it is by default (2C
        output channels); "repa", for REPA's class.
    Returns float32 tensors by name, in the order of the model. The first projector of REPA, and SRA's head, are
        `projector.*`; further projectors and REPA-E's `bn.*` are left out, and so is a projector that REPA's class has
        no place for.
    Raises InputError for what is no SiT, NaN or infinity in the weights, and what has no exact conversion.
    Precision: names and signs are exact; SiT's and LightningDiT's time embedding is combined in float64.
    """
    if to not in LAYOUTS:
        raise must_be(_OP, "to", " or ".join(LAYOUTS), repr(to))
    checkpoint = unpack(state, _OP)
    weights = checkpoint.weights.get("ema") or checkpoint.weights["model"]
    training_path(checkpoint.args, _OP)
    ours = to_ours(weights, which_source(weights, checkpoint.args, source, _OP), _OP)
    return from_ours(ours, to)


def to_ours(state: Weights, source: str, op: str) -> Weights:
    """Public weights of a known source, by names without wrappers, as ours."""
    names = our_names(state)
    kept = {new: state[old].detach().float() for old, new in names.items()}
    for old, new in names.items():
        if not torch.isfinite(kept[new]).all():
            raise InputError(f"{op}: NaN or infinity in {old}; take an earlier checkpoint")
    if has_sigma(kept):
        kept = drop_sigma(kept)
    return in_order(turn_time_around(kept) if source in FROM_NOISE else kept)


def from_ours(state: Weights, to: str) -> Weights:
    """Our weights in one of the LAYOUTS; the tensors may be shared."""
    if to == "sra2_fast":
        return in_order(state)
    plain = {name: one for name, one in state.items() if not name.startswith("projector.")}
    if to == "sit":
        return in_order(add_sigma(turn_time_around(plain)))
    head = {name.removeprefix("projector."): one for name, one in state.items() if name not in plain}
    if {name.split(".")[0] for name in head} == _REPA_HEAD:
        plain |= {f"projectors.0.{name}": one for name, one in head.items()}
    return in_order(plain)


def our_names(state: Mapping[str, Any]) -> dict[str, str]:
    """{name there: name here} of everything that a `sra2_fast.SiT` has a place for."""
    encoder_blocks = count_blocks(state)
    found = {}
    for name in state:
        first, *rest = name.split(".")
        if first == "bn" or (first == "projectors" and rest[:1] != ["0"]):
            continue
        if (
            first == "decoder_blocks" and rest and rest[0].isdecimal()
        ):  # REPA's first code counts anew after the projector
            found[name] = ".".join(["blocks", str(int(rest[0]) + encoder_blocks), *rest[1:]])
        elif first == "projectors":
            found[name] = ".".join(["projector", *rest[1:]])
        elif first == "ap_head" and rest and rest[0] in _SRA_HEAD:
            found[name] = ".".join(["projector", _SRA_HEAD[rest[0]], *rest[1:]])
        else:
            found[name] = name
    return found


def count_blocks(state: Mapping[str, Any], start: str = "blocks.") -> int:
    """How many numbers follow `start` in the names."""
    return len({name.split(".")[1] for name in state if name.startswith(start)})


def in_order(state: Weights) -> Weights:
    """The same entries in the order in which the models register them; what is unknown comes last."""

    def place(name: str) -> tuple[int, int]:
        first, *rest = name.split(".")
        is_numbered = first == "blocks" and rest and rest[0].isdecimal()
        return _ORDER.index(first) if first in _ORDER else len(_ORDER), int(rest[0]) if is_numbered else 0

    return {name: state[name] for name in sorted(state, key=place)}


def normalisation(state: Mapping[str, Tensor]) -> tuple[list[float], list[float]] | None:
    """REPA-E's (shift, scale) of each latent channel, z = (value - shift) * scale, from its `bn.*`; None without."""
    state = without_wrappers(state)
    if "bn.running_mean" not in state:
        return None
    return state["bn.running_mean"].tolist(), state["bn.running_var"].rsqrt().tolist()


def convert_optimizer(
    optimizer: Mapping[str, Any], state: Mapping[str, Tensor], op: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """torch.optim.AdamW's state over `model.parameters()`, by our names: (tensors by `<parameter>/<key>`, groups).

    state: the "model" weights of the same file, whose order numbers the parameters.
    For REPA, REPA-E and SRA, where a converted weight is the weight: SiT's second moments of the combined time
    embedding cannot be combined.
    Raises InputError where the state does not fit the weights: other counts or shapes, several groups, not AdamW.
    """
    check_is_sit(state, op)
    parameters = [name for name in state if not name.startswith("bn.")]
    groups, entries = optimizer.get("param_groups", []), optimizer.get("state", {})
    if len(groups) != 1 or len(groups[0]["params"]) != len(parameters):
        counts = [len(group["params"]) for group in groups]
        raise InputError(f"{op}: the optimizer's state has {counts} parameters, the model {len(parameters)}")
    names, tensors = our_names(dict.fromkeys(parameters)), {}
    for number, old in zip(groups[0]["params"], parameters, strict=True):
        entry, new = entries.get(number), names.get(old)
        if entry is None or new is None:
            continue
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = torch.as_tensor(entry.get(key, torch.nan), dtype=torch.float32)
            if key != "step" and value.shape != state[old].shape:
                raise InputError(
                    f"{op}: the optimizer's {key} of {old} is {list(value.shape)}, the weight {list(state[old].shape)}"
                )
            tensors[f"{new}/{key}"] = value
    settings = {name: groups[0][name] for name in ("lr", "betas", "eps", "weight_decay") if name in groups[0]}
    ordered = list(in_order(dict.fromkeys(names.values())))  # type: ignore[arg-type]
    return tensors, {"param_groups": [{**settings, "params": ordered}]}
