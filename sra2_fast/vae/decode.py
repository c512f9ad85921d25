"""From z back to images, for sample grids.

Digits are grey levels and need nothing. VAE latents go through the autoencoder when one is given; without it they are
shown as they are, the first three channels as colours, which is enough to see that something forms.
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


def make_decoder(
    info: DecodeInfo, vae: str | None = None, device: str | torch.device = "cpu"
) -> Callable[[torch.Tensor], np.ndarray]:
    """A function from z (n, C, h, w) to images (n, H, W, 3) uint8.

    info: source.decode_info().
    vae: name or path of the autoencoder; loaded here, once, onto `device`.
    Raises InputError when it cannot be loaded or its latents have another number of channels.
    """
    if info.kind == "grayscale":
        if vae is not None:
            raise InputError(f"vae: the data are grayscale pixels, which need no autoencoder; leave out {vae}")
        return lambda z: _to_image(_unnormalise(z, info) * (255.0 / info.white))
    if vae is None:
        return lambda z: _to_image((z.float().cpu()[:, :3] / PREVIEW_RANGE + 1) * 127.5)
    model = autoencoder.load_vae(vae, device)
    channels = autoencoder.normalisation(model).channels
    if channels != len(info.scale):
        raise InputError(
            f"vae: {vae} has {channels} latent channels, the data {len(info.scale)}; give the VAE it was made with"
        )

    def decode(z: torch.Tensor) -> np.ndarray:
        values = _unnormalise(z, info)
        return _to_image(torch.cat([autoencoder.decode(model, part) for part in values.split(DECODE_BATCH)]))

    return decode


def _unnormalise(z: torch.Tensor, info: DecodeInfo) -> torch.Tensor:
    """value = z / scale + shift, float32 on the CPU."""
    scale = torch.from_numpy(info.scale)[:, None, None]
    return z.detach().float().cpu() / scale + torch.from_numpy(info.shift)[:, None, None]


def _to_image(levels: torch.Tensor) -> np.ndarray:
    """(n, C, H, W) levels 0..255 -> (n, H, W, 3) uint8; with fewer than three channels, the first as grey."""
    levels = levels.detach().float()
    rgb = levels[:, :3] if levels.shape[1] >= 3 else levels[:, :1].expand(-1, 3, -1, -1)
    return rgb.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
