"""Which repository a state dict is from, and what of it cannot be converted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import InputError, must_be
from .conventions import OUTPUT, PATCHES, TIME, has_sigma

SOURCES = ("sra2_fast", "sit", "repa", "sra", "repa-e", "lightningdit")
FROM_NOISE = ("sit", "lightningdit")  # t = 0 is noise there
LAYOUTS = ("sra2_fast", "sit", "repa")  # what `convert_state_dict` writes
PATHS = {"linear": "linear", "Linear": "linear", "cosine": "cosine", "cos": "cosine", "GVP": "cosine"}
VELOCITY = ("v", "velocity")
_MODULATION = "blocks.0.adaLN_modulation.1.weight"
_DIMENSIONS = {"pos_embed": 3, PATCHES: 4, TIME: 2, "y_embedder.embedding_table.weight": 2, OUTPUT[0]: 2}
_ESSENTIAL = (*_DIMENSIONS, OUTPUT[1], "blocks.0.mlp.fc1.weight", _MODULATION)
_NOT_SIT = {  # parts of LightningDiT that a SiT has not: (end of a name, the option that makes them)
    "feat_rope.freqs_cos": "use_rope",
    "mlp.w12.weight": "use_swiglu",
    "norm1.weight": "use_rmsnorm",
}


def which_source(state: Mapping[str, Tensor], args: Mapping[str, Any], source: str, op: str) -> str:
    """One of SOURCES: `source` itself, or for "auto" what the names, the shapes and the recorded options tell.

    Raises InputError where the weights are not a SiT's, or where SiT and REPA look alike and nothing tells them apart.
    """
    if source not in ("auto", *SOURCES):
        raise must_be(op, "source", "auto or " + " or ".join(SOURCES), repr(source))
    check_is_sit(state, op)
    told = _by_options(args) or _by_names(state)
    if source != "auto":
        if told is not None and (told in FROM_NOISE) != (source in FROM_NOISE):
            raise InputError(f"{op}: is of {told}, where time runs the other way than in {source}; leave out source")
        return source
    if told is None:
        raise InputError(
            f"{op}: weights of SiT and of REPA without a projector look alike, and time runs the other way in one of "
            "them; say whose they are: source= in Python, or sra2-fast convert with --source sit (or repa)"
        )
    return told


def check_is_sit(state: Mapping[str, Tensor], op: str) -> None:
    """Raise InputError for what is no SiT, or has parts of a LightningDiT that a SiT has not."""
    for ending, option in _NOT_SIT.items():
        found = next((name for name in state if name.endswith(ending)), None)
        if found is not None:
            raise InputError(f"{op}: SiT has no {found}; of LightningDiT only models without {option} can be converted")
    missing = next((name for name in _ESSENTIAL if name not in state), None)
    if missing is not None:
        raise InputError(f"{op}: is no SiT, which has {missing}; give weights of SiT, REPA, SRA or REPA-E")
    for name, dimensions in _DIMENSIONS.items():
        if state[name].dim() != dimensions:
            raise InputError(f"{op}: is no SiT, whose {name} has {dimensions} dimensions and not {state[name].dim()}")
    hidden, modulations = len(state[PATCHES]), len(state[_MODULATION])
    if modulations != 6 * hidden:
        raise InputError(
            f"{op}: {_MODULATION} has {modulations} rows where SiT has 6 D = {6 * hidden}; "
            "of LightningDiT only models without wo_shift can be converted"
        )


def training_path(args: Mapping[str, Any], op: str) -> str | None:
    """ "linear" or "cosine", as the recorded options say; None where they do not.

    Raises InputError for what has no exact conversion: another path, or a model that predicts something else.
    """
    transport = args.get("transport")
    transport = transport if isinstance(transport, Mapping) else args
    prediction, path = transport.get("prediction", "velocity"), transport.get("path_type")
    if prediction not in VELOCITY:
        raise InputError(f"{op}: predicts {prediction}; only models of the velocity can be converted")
    if path is not None and path not in PATHS:
        raise InputError(f"{op}: trained on the path {path}; only the linear and the GVP (cosine) path is converted")
    return None if path is None else PATHS[path]


def _by_options(args: Mapping[str, Any]) -> str | None:
    """What the options of the training scripts are called."""
    if isinstance(args.get("transport"), Mapping):
        return "lightningdit"
    if "block_out_s" in args:
        return "sra"
    if "vae_ckpt" in args:
        return "repa-e"
    if "enc_type" in args and "proj_coeff" in args:
        return "repa"
    return "sit" if args.get("path_type") in ("Linear", "GVP", "VP") else None


def _by_names(state: Mapping[str, Tensor]) -> str | None:
    """What only one repository's models have; the order matters, REPA-E has REPA's projectors."""
    for start, source in (("bn.", "repa-e"), ("decoder_blocks.", "repa"), ("projectors.", "repa"), ("ap_head.", "sra")):
        if any(name.startswith(start) for name in state):
            return source
    if any(name.startswith("projector.") for name in state):
        return "sra2_fast"
    return "sit" if has_sigma(dict(state)) else None
