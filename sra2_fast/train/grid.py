"""Sample grids: the same noise and labels at every step, drawn with the averaged weights, as one PNG."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError
from ..models import SiT
from ..randomness import sampling_noise
from ..sampling import sample_ode
from ..vae.decode import DECODE_BATCH

MAX_COLUMNS = 10
ROWS = 4
IMAGE_PIXELS = 64  # smaller images are enlarged, pixel by pixel, to at least this side
MARGIN = 2
HEADER = 16  # pixels for the names of the classes


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


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """(n, H, W, 3) uint8 -> one picture, `columns` images a row, small ones enlarged to the nearest neighbour."""
    factor = -(-IMAGE_PIXELS // images.shape[1])
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    images = np.pad(images, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), constant_values=96)
    count, height, width, _ = images.shape
    rows = count // columns
    return images.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def header(names: Sequence[str], width: int) -> np.ndarray:
    """(HEADER, width, 3) uint8: the names in white, each centred over its column and cut where it is too long."""
    from PIL import Image, ImageDraw

    strip = Image.new("RGB", (width, HEADER))
    draw = ImageDraw.Draw(strip)
    column = width / len(names)
    for place, name in enumerate(names):
        text = name.encode("latin-1", "replace").decode("latin-1")  # what Pillow's own font has
        while len(text) > 1 and draw.textlength(text) > column - 2 * MARGIN:
            text = text[:-1]
        draw.text(((place + 0.5) * column, HEADER / 2), text, fill="white", anchor="mm")
    return np.asarray(strip)


def can_write_png() -> bool:
    """Whether pillow is installed."""
    return importlib.util.find_spec("PIL") is not None


def write_png(picture: np.ndarray, path: Path) -> None:
    """Write the picture under another name, then rename it; InputError when the disk does not take it."""
    from PIL import Image

    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(temporary, format="PNG")
        temporary.rename(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise InputError(f"train: {path} cannot be written ({error.strerror or error}); free some space") from error
