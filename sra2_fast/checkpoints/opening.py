"""Opens a model from whatever it was saved in: a run of ours, a folder of `save_pretrained`, a public checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import InputError, must_be
from ..models import SiT
from .configuration import Told, check_fits, model_config
from .conventions import Weights
from .converting import count_blocks, normalisation, to_ours
from .reading import PublicCheckpoint, read_public
from .sources import training_path, which_source
from .training import STATE_FILE, list_checkpoints, load_checkpoint

WEIGHTS = ("ema", "model")
SD_VAE_SCALE = 0.18215
_SD_VAE = "stabilityai/sd-vae-ft-"
_OF_SD_VAE = ("sit", "repa", "sra")  # they train on its latents, and on nothing else


@dataclass(frozen=True)
class OpenedWeights:
    """Weights in our convention (t = 0 is data), float32 on the CPU, and what is known of them.

    config: the arguments of `SiT` that they fit. weights: "ema" or "model", which of the two they are.
    source: whose they are, see `convert_state_dict`. file: where they lie. step: of their training, 0 where unknown.
    path: "linear" or "cosine", the path they were trained on; None where that is not recorded.
    latents: how z becomes an image again, as in `state.json` (the fields of `sra2_fast.data.DecodeInfo`), or None.
    notes: lines for the user about what was assumed.
    """

    config: dict[str, Any]
    state: Weights
    weights: str
    source: str
    file: Path
    step: int = 0
    path: str | None = None
    latents: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def open_model(
    path: str | os.PathLike[str],
    weights: str = "ema",
    source: str = "auto",
    *,
    num_heads: int | None = None,
    num_classes: int | None = None,
    input_size: int | Sequence[int] | None = None,
    align_depth: int | None = None,
) -> tuple[SiT, OpenedWeights]:
    """(the model, in evaluation, float32 on the CPU, in our convention; where it is from).

    path: a run (its newest checkpoint), a checkpoint folder, a folder of `save_pretrained`, or a .pt or .safetensors
        file of SiT, REPA, SRA, REPA-E or a SiT-like LightningDiT, converted on the way.
    weights: "ema", the averages where there are some, or "model", as trained.
    source, num_heads, num_classes, input_size, align_depth: what the weights of a public file do not tell.
    Raises InputError naming the file and what to do.
    """
    opened = open_weights(path, weights, source, Told(num_heads, num_classes, input_size, align_depth))
    with torch.device("meta"):  # a CPU takes ten seconds over the initial weights of SiT-XL/2, which nobody wants
        model = SiT(**opened.config)
    model.load_state_dict({name: value.float() for name, value in opened.state.items()}, assign=True)
    return model.eval(), opened


def open_weights(
    path: str | os.PathLike[str], weights: str = "ema", source: str = "auto", told: Told | None = None
) -> OpenedWeights:
    """The weights and arguments of `open_model`, without building the model."""
    if weights not in WEIGHTS:
        raise must_be("open_model", "weights", " or ".join(WEIGHTS), repr(weights))
    path = Path(path)
    if (path / "checkpoints").is_dir():
        found = list_checkpoints(path / "checkpoints")
        if not found:
            raise InputError(f"checkpoint {path}: the run has no checkpoint yet; give another one")
        return _of_a_run(found[-1], weights)
    if (path / STATE_FILE).is_file():
        return _of_a_run(path, weights)
    if (path.parent / STATE_FILE).is_file() and path.stem in WEIGHTS:
        return _of_a_run(path.parent, path.stem)
    if (path / "config.json").is_file():
        return _of_a_pretrained_folder(path)
    return convert_weights(read_public(path), path, weights, source, told or Told())


def convert_weights(
    checkpoint: PublicCheckpoint, path: Path, weights: str = "ema", source: str = "auto", told: Told | None = None
) -> OpenedWeights:
    """A public file's weights in our convention; "model" or "ema", whichever is there if only one is."""
    op = f"checkpoint {path}"
    taken = weights if weights in checkpoint.weights else next(iter(checkpoint.weights))
    state = checkpoint.weights[taken]
    source = which_source(state, checkpoint.args, source, op)
    trained_on = training_path(checkpoint.args, op)
    ours = to_ours(state, source, op)
    config, notes = model_config(ours, source, checkpoint.args, told or Told(), op)
    projectors = count_blocks(state, "projectors.")
    if projectors > 1:
        notes.append(f"of {projectors} projectors the first is kept")
    step = checkpoint.step or (int(path.stem) if path.stem.isdecimal() else 0)
    latents = _latents(state, source, checkpoint.args, config["in_channels"])
    return OpenedWeights(config, ours, taken, source, path, step, trained_on, latents, tuple(notes))


def _of_a_run(path: Path, weights: str) -> OpenedWeights:
    checkpoint = load_checkpoint(path, weights_only=True)
    config = checkpoint.state.get("model")
    if not isinstance(config, dict):
        raise InputError(f"checkpoint {path}: its {STATE_FILE} has no model; it is not of sra2-fast train or convert")
    state = checkpoint.ema if weights == "ema" and checkpoint.ema is not None else checkpoint.model
    check_fits(state, config, f"checkpoint {path}")
    return OpenedWeights(
        config,
        state,
        "ema" if state is checkpoint.ema else "model",
        "sra2_fast",
        path,
        checkpoint.step,
        (checkpoint.state.get("run") or {}).get("path"),
        checkpoint.state.get("latents"),
    )


def _of_a_pretrained_folder(path: Path) -> OpenedWeights:
    """A folder of `sra2_fast.SiT`, or of a class of `sra2_fast.compat`, which has the public repository's weights."""
    op = f"checkpoint {path}"
    file = path / "model.safetensors"
    if not file.is_file():
        raise InputError(f"{op}: has a config.json and no {file.name}; give a folder that SiT.save_pretrained wrote")
    try:
        config = json.loads((path / "config.json").read_text())
        state = load_file(file)
    except (ValueError, OSError, SafetensorError) as error:
        raise InputError(f"{op}: cannot be read ({' '.join(str(error).split())[:120]}); save it again") from error
    if "decoder_hidden_size" in config:
        source = "repa" if "encoder_depth" in config else "sra"
        told = Told(config["num_heads"], config["num_classes"], config["input_size"], config.get("encoder_depth"))
        return convert_weights(PublicCheckpoint({"model": state}), path, "model", source, told)
    try:
        check_fits(state, config, op)
    except TypeError as error:
        raise InputError(f"{op}: its config.json is of no SiT; give a folder of SiT.save_pretrained") from error
    return OpenedWeights(config, state, "model", "sra2_fast", path)


def _latents(state: Weights, source: str, args: dict[str, Any], channels: int) -> dict[str, Any] | None:
    """How z becomes an image: REPA-E's own statistics, the others' SD-VAE where the latent has its four channels."""
    about = {"kind": "vae", "white": 1.0, "vae": None, "vae_fingerprint": None}
    own = normalisation(state)
    if own is not None:
        return {**about, "shift": own[0], "scale": own[1]}
    if source not in _OF_SD_VAE or channels != 4:
        return None
    which = args.get("vae", "ema")
    vae = _SD_VAE + (which if which in ("ema", "mse") else "ema")
    return {**about, "shift": [0.0] * 4, "scale": [SD_VAE_SCALE] * 4, "vae": vae}
