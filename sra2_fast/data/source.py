"""What a training set of latents is: numbered samples, read by index, normalised, and shown again as images.

Every layout on disk becomes a LatentSource. It hands out stored values; `latents` turns them into the normalised z that
the model sees, z = (value - shift) * scale per channel, with value = mean + std * eps where a posterior is stored.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from .features import FeatureSource

MAX_NAMED = 3
SPREAD_SAMPLES = 256
FINGERPRINT_SAMPLES = 64


@dataclass(frozen=True)
class DecodeInfo:
    """How to turn z back into an image: value = z / scale + shift, then what `kind` says."""

    kind: str  # "grayscale": value is the image, from 0 to `white`; "vae": value goes through the decoder of `vae`
    shift: np.ndarray  # (C,) float32
    scale: np.ndarray  # (C,) float32
    white: float = 1.0
    vae: str | None = None  # name or path of the autoencoder the latents were made with, if known
    vae_fingerprint: str | None = None  # of its weights, see vae/autoencoder.py


class LatentSource(ABC):
    """A training set. Subclasses set the attributes below and implement `read`, and `describe` where files have names.

    name: str - for messages and config.json.
    num_samples, num_classes: int.
    shape: (C, H, W) of z.
    has_posterior: bool - `read` gives [mean, std] (2C channels) instead of C channels.
    has_flips: bool - the latents of the mirrored images are there too, and `read_flipped` gives them.
    has_labels: bool - False where nothing is known about classes: num_classes is 1, every label 0.
    shift, scale: (C,) float32 - the normalisation.
    class_names: list of num_classes names, or None.
    block_size: int or None - samples that lie together on disk; None: order of reading does not matter.
    vae, vae_fingerprint: str or None - the autoencoder the latents were made with, and its weights.
    features: FeatureSource or None - the encoder's features of the same images, where `open_data` was asked for them.
    notes: lines to tell the user before training: what was assumed, what looks wrong.
    """

    name: str
    num_samples: int
    num_classes: int
    shape: tuple[int, int, int]
    has_posterior: bool = False
    has_flips: bool = False
    has_labels: bool = True
    shift: np.ndarray
    scale: np.ndarray
    class_names: list[str] | None = None
    block_size: int | None = None
    vae: str | None = None
    vae_fingerprint: str | None = None
    features: FeatureSource | None = None
    notes: Sequence[str] = ()

    @abstractmethod
    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """indices: (n,) int64 -> values (n, 2C or C, H, W) float32, labels (n,) int64. Errors name the file."""

    def read_flipped(self, indices: np.ndarray, flipped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`read`, with the mirrored image's values where `flipped` (n,) bool is True. Only where `has_flips`.

        Mirrored is the image, not the latent: what the autoencoder makes of the image flipped from left to right.
        """
        raise NotImplementedError(f"{self.name} says has_flips and has no read_flipped")

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

    def spread(self) -> float:
        """The standard deviation of z over all elements of up to SPREAD_SAMPLES samples, posterior included.

        Raises InputError naming those with a NaN or an infinity.
        """
        indices = self.evenly_spaced(SPREAD_SAMPLES)
        values, _ = self.read(indices)
        self.check_finite(values, indices)
        variance = self.latents(values).var(dtype=np.float64)
        if self.has_posterior:
            std = np.split(values, 2, axis=1)[1] * self.scale[:, None, None]
            variance += np.square(std, dtype=np.float64).mean()
        return float(np.sqrt(variance))

    def fingerprint(self) -> str:
        """A digest that differs when the training set does: of its sizes, normalisation and a sample of its values.

        Cheap and the same on every machine. Subclasses that know more of their contents add it.
        """
        values, labels = self.read(self.evenly_spaced(FINGERPRINT_SAMPLES))
        return digest(self.outline(), values, labels)

    def outline(self) -> str:
        """Sizes and normalisation, the part of a fingerprint that every layout has."""
        normalisation = f"{self.shift.tolist()} {self.scale.tolist()}"
        flips = " flips" if self.has_flips else ""
        return f"{self.num_samples} {self.num_classes} {self.shape} {self.has_posterior} {normalisation}{flips}"

    def evenly_spaced(self, count: int) -> np.ndarray:
        """(min(count, num_samples),) int64: sample indices from the first to the last."""
        return np.linspace(0, self.num_samples - 1, min(count, self.num_samples)).astype(np.int64)

    def decode_info(self) -> DecodeInfo:
        """How sample grids are made from z (see vae/decode.py)."""
        return DecodeInfo("vae", self.shift, self.scale, vae=self.vae, vae_fingerprint=self.vae_fingerprint)


class WithoutLabels(LatentSource):
    """The same latents as one class: every label is 0."""

    num_classes = 1
    has_labels = False

    def __init__(self, labelled: LatentSource) -> None:
        self.labelled = labelled
        self.name, self.num_samples, self.shape = labelled.name, labelled.num_samples, labelled.shape
        self.has_posterior, self.shift, self.scale = labelled.has_posterior, labelled.shift, labelled.scale
        self.vae, self.vae_fingerprint = labelled.vae, labelled.vae_fingerprint
        self.has_flips = labelled.has_flips
        self.block_size, self.notes = labelled.block_size, labelled.notes

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, labels = self.labelled.read(indices)
        return values, np.zeros_like(labels)

    def read_flipped(self, indices: np.ndarray, flipped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, labels = self.labelled.read_flipped(indices, flipped)
        return values, np.zeros_like(labels)

    def describe(self, index: int) -> str:
        return self.labelled.describe(index)

    def will_need(self, indices: np.ndarray) -> None:
        self.labelled.will_need(indices)

    def fingerprint(self) -> str:
        return digest("without labels", self.labelled.fingerprint())

    def decode_info(self) -> DecodeInfo:
        return self.labelled.decode_info()


def digest(*parts: str | np.ndarray) -> str:
    """SHA-256, in hexadecimal, of the parts and their lengths."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else np.ascontiguousarray(part).tobytes()
        total.update(f"{len(data)} ".encode() + data)
    return total.hexdigest()
