"""Sample grids: the same noise and labels at every step, drawn with the averaged weights, as one PNG."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..models import SiT
from ..pictures import header, tile
from ..randomness import sampling_noise
from ..sampling import sample_ode
from ..vae.decode import DECODE_BATCH

MAX_COLUMNS = 10
ROWS = 4


class SampleGrid:
    """A grid of one class a column (ten of them at most, evenly chosen), ROWS draws each.

    shape: (C, H, W) of a latent. class_names: None shows their numbers. decode: z (n, C, H, W) -> (n, H, W, 3) uint8.
    steps, cfg_scale: of the Heun sampler.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, int, int],
        num_classes: int,
        class_names: Sequence[str] | None,
        seed: int,
        decode: Callable[[torch.Tensor], np.ndarray],
        steps: int,
        cfg_scale: float,
    ) -> None:
        columns = min(num_classes, MAX_COLUMNS)
        classes = [column * num_classes // columns for column in range(columns)]
        self.columns = columns
        self.names = [str(c) if class_names is None else class_names[c] for c in classes]
        self.labels = torch.tensor(classes * ROWS)
        self.noise = torch.from_numpy(sampling_noise(seed, np.arange(columns * ROWS), shape))
        self._decode = decode
        self._steps = steps
        self._cfg_scale = cfg_scale

    def sample(self, model: SiT, device: torch.device) -> torch.Tensor:
        """z (n, C, H, W) from the model as it is, in eval mode."""
        was_training = model.training
        model.eval()
        try:
            return sample_ode(
                model,
                self.noise.to(device),
                self.labels.to(device),
                steps=self._steps,
                method="heun",
                cfg_scale=self._cfg_scale,
            )
        finally:
            model.train(was_training)

    def picture(self, latents: torch.Tensor, between: Callable[[], None] = lambda: None) -> np.ndarray:
        """(height, width, 3) uint8 of what `sample` returned, the classes' names above the columns.

        between: called before every few images, because an autoencoder takes seconds for each on a CPU; it may raise.
        """
        images = []
        for part in latents.split(DECODE_BATCH):
            between()
            images.append(self._decode(part))
        picture = tile(np.concatenate(images), self.columns)
        return np.concatenate([header(self.names, picture.shape[1]), picture])
