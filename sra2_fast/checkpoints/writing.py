"""Writes weights in a file that the public scripts open, whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import InputError
from ..files import PARTIAL, fsync
from .conventions import Weights

PUBLIC_SUFFIXES = (".pt", ".safetensors")


def write_public(path: Path, weights: dict[str, Weights], step: int) -> None:
    """`path`, a .pt of {"model", "ema", "steps"} as the public training scripts save, or the averages as .safetensors.

    Raises InputError where it cannot be written; then nothing of it is left.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".pt":
            torch.save({**weights, "steps": step}, partial)
        else:
            save_file({name: one.contiguous() for name, one in weights["ema"].items()}, partial)
        fsync(partial)
        os.replace(partial, path)
        fsync(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"convert: cannot write {path} ({reason}); free some space or choose another --out") from error
    finally:  # after an error or an interrupt; the renamed file has another name
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
