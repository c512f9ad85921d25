"""`open_data`: from what the user wrote after --data to a LatentSource.

LAYOUTS is the whole registry: a layout is a test on a path and a function that opens it. A new one adds a line.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from .features import open_features
from .layouts.digits import DigitsSource
from .layouts.fast_dit import FastDiTSource, is_fast_dit
from .layouts.flat_npy import FlatNpySource, is_flat_npy
from .layouts.lightningdit import LightningDiTSource, is_lightningdit
from .layouts.repa_e import RepaESource, is_repa_e
from .layouts.shards import ShardSource, is_shards
from .layouts.vae_sd import VaeSdSource, is_vae_sd
from .normalisation import Numbers
from .source import LatentSource, WithoutLabels


class Layout(NamedTuple):
    """A layout on disk that is read as it is."""

    name: str
    matches: Callable[[Path], bool]
    open: Callable[..., LatentSource]  # path, and for `needs_telling` also latent_scale, latent_shift, ignore_labels
    needs_telling: bool = True  # it may record no normalisation, and may lack labels


LAYOUTS: tuple[Layout, ...] = (
    Layout("sra2-fast shards", is_shards, ShardSource, needs_telling=False),
    Layout("REPA/SRA vae-sd or SR-DiT vae-in", is_vae_sd, VaeSdSource),
    Layout("fast-DiT features and labels", is_fast_dit, FastDiTSource),
    Layout("LightningDiT safetensors", is_lightningdit, LightningDiTSource),
    Layout("REPA-E HDF5", is_repa_e, RepaESource),
)
UNLABELLED = Layout("flat .npy files", is_flat_npy, FlatNpySource)  # only where none of the others matches
USUAL_SPREAD = (0.5, 2.0)  # of normalised latents; the noise they are mixed with has 1
LIKELY_SPREAD = (
    0.2,
    5.0,
)  # beyond it a scale that was only assumed is wrong: raw SD latents have 5.5, twice scaled 0.2


def open_data(
    spec: str | os.PathLike[str],
    num_classes: int | None = None,
    *,
    latent_scale: Numbers | None = None,
    latent_shift: Numbers | None = None,
    ignore_labels: bool = False,
    features: bool = False,
) -> LatentSource:
    """The training set named by `spec`: "digits", or a folder in one of the LAYOUTS. Its `notes` are for the user.

    num_classes: the model's, if already known; every label must be below it.
    latent_scale, latent_shift: z = (value - shift) * scale for layouts that record no normalisation; a number or one a
      channel, also as text separated by commas.
    ignore_labels: one class, every label 0.
    features: open the encoder's features beside the latents too, as `source.features`.
    Raises InputError where there is nothing, nothing known, or nothing usable; it names the path and what to do.
    """
    told = {"latent_scale": latent_scale, "latent_shift": latent_shift}
    if str(spec) == "digits":
        _refuse_normalisation("digits", told)
        source: LatentSource = DigitsSource()
    else:
        layout = _layout_of(Path(spec))
        if layout.needs_telling:
            source = layout.open(Path(spec), **told, ignore_labels=ignore_labels)
        else:
            _refuse_normalisation(spec, told)
            source = layout.open(Path(spec))
        _check_spread(source, is_assumed=layout.needs_telling and latent_scale is None)
    if ignore_labels:
        source = WithoutLabels(source)
    if features:
        source.features = open_features(Path(spec), source)
    if num_classes is not None and source.num_classes > num_classes:
        raise InputError(
            f"data: label out of range: {source.name} has {source.num_classes} classes, the model {num_classes}; "
            f"set num_classes to {source.num_classes} or more"
        )
    return source


def _layout_of(path: Path) -> Layout:
    """The one layout that `path` is in. Raises InputError for none and for two."""
    if not os.path.exists(path):  # False too for a name that no file can have
        raise InputError(
            f"data: {path} does not exist; give `digits` or a folder of latents (sra2-fast prepare makes one)"
        )
    if path.is_file():
        if is_repa_e(path):
            return next(layout for layout in LAYOUTS if layout.matches is is_repa_e)
        raise InputError(f"data: {path} is a file; give the folder that holds the latents")
    found = [layout for layout in LAYOUTS if layout.matches(path)]
    if len(found) > 1:
        names = " and ".join(layout.name for layout in found)
        raise InputError(f"data: {path} holds latents in two layouts ({names}); give the folder or file of one")
    if found or is_flat_npy(path):
        return found[0] if found else UNLABELLED
    if not any(path.iterdir()):
        raise InputError(f"data: {path} is empty; make latents with sra2-fast prepare --images FOLDER --out {path}")
    known = ", ".join(layout.name for layout in (*LAYOUTS, UNLABELLED))
    raise InputError(
        f"data: {path} holds no known layout ({known}); make latents with sra2-fast prepare, "
        "or bring your own as docs/data.md says"
    )


def _refuse_normalisation(name: object, told: dict[str, Numbers | None]) -> None:
    for option, value in told.items():
        if value is not None:
            raise InputError(
                f"data: {name} records its own normalisation; leave out --{option.replace('_', '-')} {value}"
            )


def _check_spread(source: LatentSource, is_assumed: bool) -> None:
    """Note a spread far from the noise's; raise an InputError where the scale was assumed and cannot be right."""
    spread = source.spread()
    if USUAL_SPREAD[0] <= spread <= USUAL_SPREAD[1]:
        return
    found = f"{source.name}: the standard deviation of the normalised latents is {spread:.3g}, far from the noise's 1"
    if is_assumed and not LIKELY_SPREAD[0] <= spread <= LIKELY_SPREAD[1]:
        raise InputError(
            f"data: {found}; give --latent-scale: z = (value - shift) * scale, {source.scale.mean() / spread:.3g} "
            "would make it 1"
        )
    source.notes = [*source.notes, f"{found}; check the scale (--latent-scale, where none is recorded)"]
