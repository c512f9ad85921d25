"""Images from their numbers: noise and labels keyed by the image, the sampler, the decoder.

An image depends on its number, not on the batch it is drawn in, up to the rounding of products of another shape (and,
with dopri5, up to its tolerance: it chooses its steps for the whole batch).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models import SiT
from ..randomness import Stream, normal, sampling_noise
from ..sampling import sample_ode, sample_sde

MAX_NAMED = 3


@dataclass(frozen=True)
class Sampler:
    """How noise becomes latents. Every field shapes the images.

    method: "euler", "heun", "dopri5" or "sde". steps: None for dopri5. rtol, atol: of dopri5. last_step, path: of sde.
    """

    method: str
    steps: int | None
    cfg_scale: float
    guidance_interval: tuple[float, float] | None = None
    guided_channels: int | None = None
    rtol: float | None = None
    atol: float | None = None
    last_step: float | None = None
    path: str | None = None

    def __call__(self, model: Any, noise: Tensor, labels: Tensor, step_noise: Callable[[int], Tensor]) -> Tensor:
        guidance: dict[str, Any] = {
            "cfg_scale": self.cfg_scale,
            "guidance_interval": self.guidance_interval,
            "guided_channels": self.guided_channels,
        }
        own = {"rtol": self.rtol, "atol": self.atol, "last_step": self.last_step, "path": self.path}
        given = {**guidance, "steps": self.steps, **own}
        given = {name: value for name, value in given.items() if value is not None}
        if self.method == "sde":
            return sample_sde(model, noise, labels, step_noise=step_noise, **given)
        return sample_ode(model, noise, labels, method=self.method, **given)


class ImageDrawer:
    """Call it with image numbers: (n, H, W, 3) uint8.

    model: in eval mode, on `device`. file: what it was read from, for errors. labels: of sample/labels.py.
    decode: z (n, C, h, w) -> (n, H, W, 3) uint8. precision: "fp32" or "bf16", the type of the products.
    padded_to: draw that many at least, the last one again and again: one shape for compiled code.
    Raises InputError where what the model gives is not finite.
    """

    def __init__(
        self,
        model: SiT,
        file: Path,
        sampler: Sampler,
        labels: Callable[[np.ndarray], np.ndarray],
        decode: Callable[[Tensor], np.ndarray],
        *,
        seed: int,
        device: torch.device,
        precision: str,
        padded_to: int = 0,
    ) -> None:
        self._model, self._file, self._sampler, self._labels, self._decode = model, file, sampler, labels, decode
        self._seed, self._device, self._padded_to = seed, device, padded_to
        self._is_bf16 = precision == "bf16"
        if self._is_bf16:
            round_products(model)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        count = len(indices)
        padded = np.pad(indices, (0, max(0, self._padded_to - count)), mode="edge")
        latents = self.latents(padded)[:count]
        is_finite = latents.isfinite().flatten(1).all(dim=1).cpu().numpy()
        if not is_finite.all():
            bad = indices[~is_finite]
            named = ", ".join(f"{i} (label {self._labels(bad)[k]})" for k, i in enumerate(bad[:MAX_NAMED]))
            raise InputError(
                f"sample: {self._file} gives NaN or infinity for {len(bad)} of {count} images, such as {named}; "
                "its training diverged, or its weights are damaged: give an earlier checkpoint"
            )
        return self._decode(latents)

    def latents(self, indices: np.ndarray) -> Tensor:
        """z (n, C, h, w) float32 on the device."""
        shape = (self._model.in_channels, *self._model.latent_size)
        noise = self._on_device(sampling_noise(self._seed, indices, shape))
        labels = self._on_device(self._labels(indices).astype(np.int64))

        def step_noise(step: int) -> Tensor:
            return self._on_device(normal(Stream.SAMPLING_STEP, self._seed, step, indices, shape))

        bf16 = torch.autocast(self._device.type, dtype=torch.bfloat16) if self._is_bf16 else contextlib.nullcontext()
        with bf16:
            return self._sampler(self._model, noise, labels, step_noise)

    def _on_device(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor


def round_products(model: SiT) -> None:
    """What autocast would round to bf16 at every call, rounded once: the weights of Linears and of the patches."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(torch.bfloat16)
