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
from .source import LatentSource


class Layout(NamedTuple):
    """A layout on disk that is read as it is."""

    name: str
    matches: Callable[[Path], bool]
    open: Callable[[Path], LatentSource]


LAYOUTS: tuple[Layout, ...] = (
    Layout("sra2-fast shards", is_shards, ShardSource),
    Layout("REPA/SRA vae-sd", is_vae_sd, VaeSdSource),
)


def open_data(spec: str | os.PathLike[str], num_classes: int | None = None) -> LatentSource:
    """The training set named by `spec`: "digits", or a folder in one of the LAYOUTS.

    num_classes: the model's, if already known; every label must be below it.
    Raises InputError where there is nothing, nothing known, or nothing usable; it names the path and what to do.
    """
    source = DigitsSource() if str(spec) == "digits" else _open_folder(Path(spec))
    if num_classes is not None and source.num_classes > num_classes:
        raise InputError(
            f"data: label out of range: {source.name} has {source.num_classes} classes, the model {num_classes}; "
            f"set num_classes to {source.num_classes} or more"
        )
    return source


def _open_folder(path: Path) -> LatentSource:
    if not path.exists():
        raise InputError(
            f"data: {path} does not exist; give `digits` or a folder of latents (sra2-fast prepare makes one)"
        )
    if not path.is_dir():
        raise InputError(f"data: {path} is a file; give the folder that holds the latents")
    for layout in LAYOUTS:
        if layout.matches(path):
            return layout.open(path)
    if not any(path.iterdir()):
        raise InputError(f"data: {path} is empty; make latents with sra2-fast prepare --images FOLDER --out {path}")
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise InputError(f"data: {path} holds no known layout ({known}); make latents with sra2-fast prepare")
