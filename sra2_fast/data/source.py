"""What a training set of latents is: numbered samples, read by index, normalised, and shown again as images.

Every layout on disk becomes a LatentSource. It hands out stored values; `latents` turns them into the normalised z that
the model sees, z = (value - shift) * scale per channel, with value = mean + std * eps where a posterior is stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from ..errors import InputError

MAX_NAMED = 3


@dataclass(frozen=True)
class DecodeInfo:
    """How to turn z back into an image: value = z / scale + shift, then what `kind` says."""

    kind: str  # "grayscale": value is the image, from 0 to `white`; "vae": value goes through the decoder of `vae`
    shift: np.ndarray  # (C,) float32
    scale: np.ndarray  # (C,) float32
    white: float = 1.0
    vae: str | None = None  # name or path of the autoencoder the latents were made with, if known


class LatentSource(ABC):
    """A training set. Subclasses set the attributes below and implement `read`, and `describe` where files have names.

    name: str - for messages and config.json.
    num_samples, num_classes: int.
    shape: (C, H, W) of z.
    has_posterior: bool - `read` gives [mean, std] (2C channels) instead of C channels.
    shift, scale: (C,) float32 - the normalisation.
    class_names: list of num_classes names, or None.
    block_size: int or None - samples that lie together on disk; None: order of reading does not matter.
    vae: str or None - the autoencoder the latents were made with.
    """

    name: str
    num_samples: int
    num_classes: int
    shape: tuple[int, int, int]
    has_posterior: bool = False
    shift: np.ndarray
    scale: np.ndarray
    class_names: list[str] | None = None
    block_size: int | None = None
    vae: str | None = None

    @abstractmethod
    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """indices: (n,) int64 -> values (n, 2C or C, H, W) float32, labels (n,) int64. Errors name the file."""

    def describe(self, index: int) -> str:
        """Where sample `index` lies, in words a user can act on."""
        return f"sample {index} of {self.name}"

    def will_need(self, indices: np.ndarray) -> None:  # noqa: B027 - most sources have nothing to do here
        """A hint that these samples are read soon; called once for every window of the block shuffle."""

    def latents(self, values: np.ndarray, eps: np.ndarray | None = None) -> np.ndarray:
        """z = (value - shift) * scale, (n, C, H, W) float32; value = mean + std * eps with a posterior.

        eps: (n, C, H, W) float32, None for the posterior's mean. Ignored without a posterior.
        """
        if self.has_posterior:
            mean, std = np.split(values, 2, axis=1)
            values = mean if eps is None else mean + std * eps
        if np.any(self.shift):
            values = values - self.shift[:, None, None]
        return values * self.scale[:, None, None]

    def check_finite(self, values: np.ndarray, indices: np.ndarray) -> None:
        """Raise an InputError that names the samples with a NaN or an infinity among `values` (n, ...)."""
        if np.isfinite(values).all():
            return
        bad = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
        named = [self.describe(int(index)) for index in np.asarray(indices)[bad][:MAX_NAMED]]
        more = f" and {int(bad.sum()) - MAX_NAMED} more" if bad.sum() > MAX_NAMED else ""
        raise InputError(f"data: NaN or infinity in {', '.join(named)}{more}; encode these images again or remove them")

    def decode_info(self) -> DecodeInfo:
        """How sample grids are made from z (see data/decode.py)."""
        return DecodeInfo("vae", self.shift, self.scale, vae=self.vae)
