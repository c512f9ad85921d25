"""What is sampled from: the model of a checkpoint, what is known of it, and what makes its latents images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoints import list_checkpoints, load_checkpoint, load_weights
from ..data import DecodeInfo
from ..errors import InputError
from ..models import SiT
from ..vae.autoencoder import load_vae, normalisation
from ..vae.decode import NONE, Decoder, make_decoder


@dataclass(frozen=True)
class Origin:
    """Where the weights are from. path: "linear", "cosine" or None (unknown). latents: as in state.json, or None."""

    file: Path
    weights: str
    step: int
    path: str | None
    latents: dict[str, Any] | None
    notes: tuple[str, ...] = ()


def open_checkpoint(path: str, weights: str) -> tuple[SiT, Origin]:
    """The model on the CPU, and where it is from. path: a run, or a checkpoint of one. Raises InputError."""
    folder = Path(path)
    if (folder / "checkpoints").is_dir():
        found = list_checkpoints(folder / "checkpoints")
        if not found:
            raise InputError(f"sample: the run {folder} has no checkpoint yet; give another one")
        folder = found[-1]
    checkpoint = load_checkpoint(folder, weights_only=True)
    config = checkpoint.state.get("model")
    if not isinstance(config, dict):
        raise InputError(f"sample: {folder} has no model in its state.json; it is not of sra2-fast train")
    if weights == "ema" and checkpoint.ema is None:
        raise InputError(f"sample: {folder} has no averaged weights; use --weights model")
    model = SiT(**config)
    load_weights(model, checkpoint.ema if weights == "ema" and checkpoint.ema else checkpoint.model, folder)
    trained_on = (checkpoint.state.get("run") or {}).get("path")
    return model, Origin(folder, weights, checkpoint.step, trained_on, checkpoint.state.get("latents"))


def fingerprint(model: SiT) -> str:
    """SHA-256, in hexadecimal, of the weights that make images; 1 s for a gigabyte."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith("projector."):
            total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            total.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def decoder_for(
    origin: Origin, vae: str | None, model: SiT, device: str | torch.device
) -> tuple[Decoder, dict[str, Any]]:
    """(the decoder, what stands for it in the plan).

    vae: None is the autoencoder that the checkpoint names, "none" shows latents as colours.
    A checkpoint that does not say how its latents were normalised takes the normalisation of a `vae` that is named.
    Raises InputError where there is no way to images, or the recorded normalisation cannot be.
    """
    info = _decode_info(origin, model)
    if info is None and vae in (None, NONE):
        info = DecodeInfo("vae", np.zeros(model.in_channels, np.float32), np.ones(model.in_channels, np.float32))
    elif info is None:
        about = normalisation(load_vae(str(vae)))
        info = DecodeInfo("vae", about.shift, about.scale)
    if info.kind == "vae" and vae is None:
        if info.vae is None:
            raise InputError(
                f"sample: {origin.file} names no autoencoder; give --vae NAME_OR_PATH, or --vae none for colours"
            )
        vae = info.vae
    decode = make_decoder(info, vae, device)
    normalised = {"shift": info.shift.tolist(), "scale": info.scale.tolist()}
    return decode, {"kind": info.kind, "vae": decode.vae, "vae_fingerprint": decode.fingerprint, **normalised}


def _decode_info(origin: Origin, model: SiT) -> DecodeInfo | None:
    if origin.latents is None:
        return None
    try:
        shift, scale = (np.asarray(origin.latents[name], dtype=np.float32) for name in ("shift", "scale"))
        info = DecodeInfo(**{**origin.latents, "shift": shift, "scale": scale})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"sample: {origin.file} does not say how its latents become images; its state.json is damaged"
        ) from error
    is_right = shift.shape == scale.shape == (model.in_channels,) and np.isfinite([*shift, *scale]).all()
    if not is_right or not scale.all():
        raise InputError(
            f"sample: {origin.file} has latents of shift {shift.tolist()} and scale {scale.tolist()}, where "
            f"{model.in_channels} finite numbers each, no scale of 0, are needed; its state.json is damaged"
        )
    return info
