"""What is sampled from: which weights they are, and what makes their latents images."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

from ..checkpoints import OpenedWeights
from ..data import DecodeInfo
from ..errors import InputError
from ..models import SiT
from ..vae.autoencoder import load_vae, normalisation
from ..vae.decode import NONE, Decoder, make_decoder


def fingerprint(model: SiT) -> str:
    """SHA-256, in hexadecimal, of the weights that make images; 1 s for a gigabyte."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith("projector."):
            total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            total.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def decoder_for(
    origin: OpenedWeights, vae: str | None, model: SiT, device: str | torch.device
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


def _decode_info(origin: OpenedWeights, model: SiT) -> DecodeInfo | None:
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
