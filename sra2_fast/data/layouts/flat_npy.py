"""A folder of .npy files and nothing that tells their classes: latents to train on without labels.

    FOLDER/*.npy    (C, H, W) or (1, C, H, W): sampled from the posterior and scaled already

The names order the samples, as numbers where all are numbers. Latents that were not scaled need --latent-scale.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..normalisation import Numbers
from .fast_dit import scale_of_scaled
from .npy_files import SUFFIX, NpyFolderSource, in_order


def is_flat_npy(path: Path) -> bool:
    """Whether .npy files lie in `path` itself."""
    with os.scandir(path) as entries:
        return any(entry.name.endswith(SUFFIX) for entry in entries)


class FlatNpySource(NpyFolderSource):
    """A folder of latents without labels."""

    def __init__(
        self,
        path: Path,
        latent_scale: Numbers | None = None,
        latent_shift: Numbers | None = None,
        ignore_labels: bool = False,
    ) -> None:
        """latent_scale, latent_shift: for latents that were not scaled; ignore_labels: there are none anyway."""
        stems = in_order([name for name in os.listdir(path) if name.endswith(SUFFIX)])
        self._open(path, [f"{stem}{SUFFIX}" for stem in stems], None, has_posterior=False)
        self.notes = [f"{self.name} holds no labels: trained without classes"]
        scale_of_scaled(self, latent_scale, latent_shift)
