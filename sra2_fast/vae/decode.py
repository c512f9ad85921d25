"""From z back to images, for sample grids.

Digits are grey levels and need nothing. VAE latents go through the autoencoder they were made with, or another one that
is named; without one they are shown as they are, the first three channels as colours, which is enough to see that
something forms.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..data.source import DecodeInfo
from ..errors import InputError
from . import autoencoder

PREVIEW_RANGE = 3.0  # normalised latents have about unit variance
DECODE_BATCH = 8  # an SD-VAE decoder takes about 0.5 GB an image of 256x256 in float32
NONE = "none"
IN_COLOURS = "samples are latents shown as colours (--vae names an autoencoder, --vae none is content)"


class Decoder:
    """Call it with z (n, C, h, w): images (n, H, W, 3) uint8.

    vae, fingerprint: name or path, and weights, of the autoencoder in use; None where there is none.
    note: a line for the user, None where all is as wished.
    """

    def __init__(
        self,
        to_images: Callable[[torch.Tensor], np.ndarray],
        vae: str | None = None,
        note: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        self._to_images, self.vae, self.note, self.fingerprint = to_images, vae, note, fingerprint

    def __call__(self, z: torch.Tensor) -> np.ndarray:
        return self._to_images(z)


def make_decoder(info: DecodeInfo, vae: str | None = None, device: str | torch.device = "cpu") -> Decoder:
    """How latents become images; the autoencoder is loaded here, once, onto `device`.

    info: source.decode_info().
    vae: None takes the autoencoder that the data record, if it is on this machine; where it is not, or cannot be loaded
      or does not fit, latents are shown as colours and `note` says why. "none" shows colours at once. A name or path
      has to work, and is downloaded if need be.
    Other weights than those the latents were made with (a decoder that was trained on) are noted, and used.
    Raises InputError where a `vae` that was named cannot be loaded, has another number of latent channels, or is not
    needed.
    """
    if info.kind == "grayscale":
        if vae not in (None, NONE):
            raise InputError(f"vae: the data are grayscale pixels, which need no autoencoder; leave out {vae}")
        return Decoder(lambda z: _to_image(_unnormalise(z, info) * (255.0 / info.white)))
    if vae == NONE:
        return Decoder(_as_colours)
    if vae is not None:
        return _through(vae, info, device)
    if info.vae is None:
        return Decoder(_as_colours, note=f"{IN_COLOURS}: the data name no autoencoder")
    try:
        return _through(info.vae, info, device, download=False)
    except InputError as error:
        return Decoder(_as_colours, note=f"{IN_COLOURS}: {str(error).removeprefix('vae: ')}")


def _through(vae: str, info: DecodeInfo, device: str | torch.device, *, download: bool = True) -> Decoder:
    model = autoencoder.load_vae(vae, device, download=download)
    channels = autoencoder.normalisation(model).channels
    if channels != len(info.scale):
        raise InputError(
            f"vae: {vae} has {channels} latent channels, the data {len(info.scale)}; give the VAE it was made with"
        )

    def decode(z: torch.Tensor) -> np.ndarray:
        values = _unnormalise(z, info)
        return _to_image(torch.cat([autoencoder.decode(model, part) for part in values.split(DECODE_BATCH)]))

    fingerprint = autoencoder.fingerprint(model)
    is_same = info.vae_fingerprint in (None, fingerprint)
    note = None if is_same else f"{vae} has other weights than the autoencoder the latents were made with ({info.vae})"
    return Decoder(decode, vae, note, fingerprint)


def _as_colours(z: torch.Tensor) -> np.ndarray:
    return _to_image((z.float().cpu()[:, :3] / PREVIEW_RANGE + 1) * 127.5)


def _unnormalise(z: torch.Tensor, info: DecodeInfo) -> torch.Tensor:
    """value = z / scale + shift, float32 on the CPU."""
    scale = torch.from_numpy(info.scale)[:, None, None]
    return z.detach().float().cpu() / scale + torch.from_numpy(info.shift)[:, None, None]


def _to_image(levels: torch.Tensor) -> np.ndarray:
    """(n, C, H, W) levels 0..255 -> (n, H, W, 3) uint8; with fewer than three channels, the first as grey."""
    levels = levels.detach().float()
    rgb = levels[:, :3] if levels.shape[1] >= 3 else levels[:, :1].expand(-1, 3, -1, -1)
    return rgb.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
