"""Which checkpoint a run starts from, and whether it is of the same run."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..checkpoints import Checkpoint, checkpoint_name, load_checkpoint
from ..data import LatentSource
from ..errors import InputError
from .options import TrainOptions, fixed_on_resume
from .run_directory import RunDirectory


def find_checkpoint(options: TrainOptions, directory: RunDirectory) -> Checkpoint | None:
    """The checkpoint that --resume names, or None to start anew.

    Raises InputError rather than let two runs share a folder: for `never` in a folder that holds a run, and for a
    checkpoint older than the newest of the folder.
    """
    newest = directory.newest_checkpoint()
    if options.resume == "auto":
        return load_checkpoint(newest) if newest else None
    if options.resume == "never":
        if newest is not None:
            raise InputError(
                f"train: --out {directory.path} already holds a run ({newest.name}); choose another folder, "
                "or go on with --resume auto"
            )
        return None
    checkpoint = load_checkpoint(options.resume)
    if newest is not None and newest.name != checkpoint_name(checkpoint.step):
        raise InputError(
            f"train: --out {directory.path} already holds {newest.name}, and --resume starts from "
            f"{checkpoint_name(checkpoint.step)}; choose another --out"
        )
    if newest is not None and not newest.samefile(checkpoint.path):
        raise InputError(
            f"train: --out {directory.path} already holds another run ({newest.name}); choose another --out"
        )
    return checkpoint


def describe_run(options: TrainOptions, source: LatentSource) -> dict[str, Any]:
    """What a resumed run must share with what went before to be one run: the resolved options and the data."""
    values = {name: value for name, value in dataclasses.asdict(options).items() if fixed_on_resume(name)}
    return {
        **values,
        "data": f"{source.name}: {source.num_samples} x {list(source.shape)}, {source.num_classes} classes",
    }


def check_same_run(checkpoint: Checkpoint, run: dict[str, Any], resume: str) -> list[str]:
    """Compare with the checkpoint's run. With `auto` a difference is an InputError; else it is a wish, and returned."""
    missing = [key for key in ("run", "optimizer", "pending") if key not in checkpoint.state]
    if missing:
        raise InputError(
            f"checkpoint {checkpoint.path}: not of sra2-fast train (its state.json has no {missing[0]!r}); "
            "choose another --resume"
        )
    before = checkpoint.state["run"]
    changes = [
        f"--{name.replace('_', '-')} {before.get(name)} -> {value}"
        for name, value in run.items()
        if before.get(name) != value
    ]
    if changes and resume == "auto":
        raise InputError(
            f"train: {checkpoint.path} is of a run with other options ({'; '.join(changes)}); give the same ones, "
            f"choose another --out, or take the changes on purpose with --resume {checkpoint.path}"
        )
    return changes
