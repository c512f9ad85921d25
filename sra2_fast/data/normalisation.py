"""z = (value - shift) * scale for latents that record neither: what the user says, or what is known or measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, must_be

if TYPE_CHECKING:
    from pathlib import Path

    from .source import LatentSource

Numbers = float | str | Sequence[float]  # as text: separated by commas
SD_SCALING_FACTOR, SD_CHANNELS = 0.18215, 4  # Stable Diffusion's autoencoders (SD-VAE)
E2E_INVAE_SCALE, E2E_INVAE_CHANNELS = 0.3099, 32  # REPA-E/e2e-invae, as SR-DiT uses it
MEASURED_SAMPLES = 2048


def per_channel(option: str, given: Numbers, channels: int) -> np.ndarray:
    """(C,) float32 from one number or one for every channel.

    option: its name for messages, such as --latent-scale.
    Raises InputError for another count, for what is no finite number, and for a scale that is not above 0.
    """
    parts = given.split(",") if isinstance(given, str) else given
    expected = f"a finite number, or {channels} of them separated by commas, one a channel"
    try:
        values = np.atleast_1d(np.asarray(parts, dtype=np.float32))
    except ValueError as error:
        raise must_be("data", option, expected, given) from error
    if values.shape not in ((1,), (channels,)) or not np.isfinite(values).all():
        raise must_be("data", option, expected, given)
    if option == "--latent-scale" and (values <= 0).any():
        raise must_be("data", option, "above 0", given)
    return np.broadcast_to(values, (channels,)).copy()


def normalise(source: LatentSource, scale: Numbers, shift: Numbers | None = None) -> None:
    """Set `scale` and `shift` (default 0) of a source whose shape is known."""
    channels = source.shape[0]
    source.scale = per_channel("--latent-scale", scale, channels)
    source.shift = per_channel("--latent-shift", 0.0 if shift is None else shift, channels)


def normalise_as_measured(source: LatentSource, why: str) -> None:
    """Set shift and scale so that every channel of z has mean 0 and standard deviation 1; noted with `why`.

    Of MEASURED_SAMPLES samples, evenly spaced: the same whenever the same data are opened.
    """
    indices = source.evenly_spaced(MEASURED_SAMPLES)
    values, _ = source.read(indices)
    source.check_finite(values, indices)
    mean = values[:, : source.shape[0]]
    variance = mean.var(axis=(0, 2, 3), dtype=np.float64)
    if source.has_posterior:
        variance += np.square(values[:, source.shape[0] :], dtype=np.float64).mean(axis=(0, 2, 3))
    if not (variance > 0).all():
        raise InputError(
            f"data: {source.name} has a channel that is the same everywhere, so its scale cannot be measured; "
            "give --latent-scale, or encode the images again"
        )
    source.shift = mean.mean(axis=(0, 2, 3), dtype=np.float64).astype(np.float32)
    source.scale = (1 / np.sqrt(variance)).astype(np.float32)
    source.notes = [*source.notes, f"{why}: every channel is brought to mean 0 and standard deviation 1 as measured"]


Told = tuple[Numbers | None, Numbers | None]  # the user's scale and shift


def normalise_as_recorded(source: LatentSource, stats: Path, told: Told, mean: str, **names: str) -> None:
    """Set shift and scale from a file of statistics (`read_statistics`).

    Raises InputError where the user gives one too: file and options would contradict each other.
    """
    if any(one is not None for one in told):
        raise InputError(
            f"data: {stats} records the normalisation; leave out --latent-scale and --latent-shift, or move it"
        )
    source.shift, source.scale = read_statistics(stats, mean, source.shape[0], **names)


def normalise_as_recorded_or_measured(
    source: LatentSource, stats: Path, told: Told, missing: str, mean: str, **names: str
) -> None:
    """As recorded where the file is there, else as the user says, else as measured; missing: why, for the note."""
    scale, shift = told
    if stats.is_file():
        normalise_as_recorded(source, stats, told, mean, **names)
    elif any(one is not None for one in told):
        normalise(source, 1.0 if scale is None else scale, shift)
    else:
        normalise_as_measured(source, missing)


def read_statistics(path: Path, mean: str, channels: int, **names: str) -> tuple[np.ndarray, np.ndarray]:
    """Shift and scale, (C,) float32 each, of a .pt file of two tensors: `mean`, and `scale=` or `std=` NAME.

    Raises InputError naming the file where it holds anything else, or another number of channels.
    """
    import torch

    ((kind, name),) = names.items()
    try:
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        shift, spread = (np.asarray(found[key].float().flatten(), dtype=np.float32) for key in (mean, name))
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"data: {path} cannot be read as {mean} and {name} ({reason}); copy it again") from error
    if shift.shape != (channels,) or spread.shape != (channels,):
        raise InputError(f"data: {path} is of {len(shift)} channels, the latents have {channels}; copy the right file")
    if not (np.isfinite(shift).all() and np.isfinite(spread).all() and (spread > 0).all()):
        raise InputError(f"data: {path} must hold finite numbers, {name} above 0; compute it again")
    return shift, 1 / spread if kind == "std" else spread
