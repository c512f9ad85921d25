"""`open_data`: from what the user wrote after --data to a LatentSource.

LAYOUTS is the whole registry: a layout is a test on a folder and a function that opens it. A new one adds a line.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from .layouts.digits import DigitsSource
from .layouts.shards import ShardSource, is_shards
from .layouts.vae_sd import VaeSdSource, is_vae_sd
from .normalisation import Numbers
from .source import LatentSource, WithoutLabels


class Layout(NamedTuple):
    """A layout on disk that is read as it is."""

    name: str
    matches: Callable[[Path], bool]
    open: Callable[..., LatentSource]  # path, and for `needs_telling` also latent_scale, latent_shift, ignore_labels
    needs_telling: bool  # it records no normalisation, and may lack labels


LAYOUTS: tuple[Layout, ...] = (
    Layout("sra2-fast shards", is_shards, ShardSource, needs_telling=False),
    Layout("REPA/SRA vae-sd", is_vae_sd, VaeSdSource, needs_telling=True),
)
USUAL_SPREAD = (0.5, 2.0)  # of normalised latents; the noise they are mixed with has 1


def open_data(
    spec: str | os.PathLike[str],
    num_classes: int | None = None,
    *,
    latent_scale: Numbers | None = None,
    latent_shift: Numbers | None = None,
    ignore_labels: bool = False,
) -> LatentSource:
    """The training set named by `spec`: "digits", or a folder in one of the LAYOUTS. Its `notes` are for the user.

    num_classes: the model's, if already known; every label must be below it.
    latent_scale, latent_shift: z = (value - shift) * scale for layouts that record no normalisation; a number or one a
      channel, also as text separated by commas.
    ignore_labels: one class, every label 0.
    Raises InputError where there is nothing, nothing known, or nothing usable; it names the path and what to do.
    """
    told = {"latent_scale": latent_scale, "latent_shift": latent_shift}
    if str(spec) == "digits":
        _refuse_normalisation("digits", told)
        source: LatentSource = DigitsSource()
    else:
        source = _open_folder(Path(spec), told, ignore_labels)
        _check_spread(source)
    if ignore_labels:
        source = WithoutLabels(source)
    if num_classes is not None and source.num_classes > num_classes:
        raise InputError(
            f"data: label out of range: {source.name} has {source.num_classes} classes, the model {num_classes}; "
            f"set num_classes to {source.num_classes} or more"
        )
    return source


def _open_folder(path: Path, told: dict[str, Numbers | None], ignore_labels: bool) -> LatentSource:
    if not path.exists():
        raise InputError(
            f"data: {path} does not exist; give `digits` or a folder of latents (sra2-fast prepare makes one)"
        )
    if not path.is_dir():
        raise InputError(f"data: {path} is a file; give the folder that holds the latents")
    for layout in LAYOUTS:
        if not layout.matches(path):
            continue
        if layout.needs_telling:
            return layout.open(path, **told, ignore_labels=ignore_labels)
        _refuse_normalisation(path, told)
        return layout.open(path)
    if not any(path.iterdir()):
        raise InputError(f"data: {path} is empty; make latents with sra2-fast prepare --images FOLDER --out {path}")
    known = ", ".join(layout.name for layout in LAYOUTS)
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


def _check_spread(source: LatentSource) -> None:
    spread, (least, most) = source.spread(), USUAL_SPREAD
    if spread < least or spread > most:
        warning = (
            f"{source.name}: the standard deviation of the normalised latents is {spread:.3g}, far from the noise's 1; "
            "check the scale (--latent-scale, where none is recorded)"
        )
        source.notes = [*source.notes, warning]
