"""Training checkpoints that are whole or not there: safetensors for the tensors, JSON for the rest, no pickle.

A checkpoint is a folder `step-00000040/` of

    model.safetensors      the trained weights, by state-dict name
    ema.safetensors        the averaged weights, by the same names (absent without an average)
    optimizer.safetensors  the optimizer's tensors, `<parameter>/<key>` (e.g. `blocks.0.attn.qkv.weight/exp_avg`)
    state.json             step, model configuration, the optimizer's numbers, and the size of each file above

written under another name, fsynced and renamed, so that a crash, a full disk or a kill leaves the checkpoints before it
as they were. Left out: sharded checkpoints of many GPUs, and reading the weights of other repositories.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import InputError
from ..files import fsync

FORMAT = 1
STATE_FILE = "state.json"
_PARTIAL = ".partial"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """What one folder holds. `state` is the JSON part; the tensors are on the CPU."""

    path: Path
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizer: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The finished checkpoints in `folder`, oldest first. Half-written ones have another name and are not listed."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def save_checkpoint(
    folder: str | os.PathLike[str],
    step: int,
    *,
    model: Mapping[str, Tensor],
    state: Mapping[str, Any],
    ema: Mapping[str, Tensor] | None = None,
    optimizer: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `folder/step-XXXXXXXX/` and return it; an existing one of that step is left as it is.

    Raises InputError when the disk is full or the folder cannot be written; then nothing of the new one is left.
    """
    folder = Path(folder)
    final = folder / checkpoint_name(step)
    if final.exists():
        return final
    partial = folder / f".{final.name}{_PARTIAL}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial_checkpoints(folder)
        partial.mkdir()
        sizes = {}
        for name, tensors in (("model", model), ("ema", ema), ("optimizer", optimizer)):
            if tensors is None:
                continue
            path = partial / f"{name}.safetensors"
            save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, path)
            fsync(path)
            sizes[path.name] = path.stat().st_size
        record = {"format": FORMAT, "step": step, **state, "files": sizes}
        text = json.dumps(record, indent=1)
        (partial / STATE_FILE).write_text(text)
        fsync(partial / STATE_FILE)
        fsync(partial)
        partial.rename(final)
        fsync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(_why_not_saved(final, folder, error)) from error
    except BaseException:  # an interrupt: leave no half-written folder behind either
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def load_checkpoint(path: str | os.PathLike[str], *, weights_only: bool = False) -> Checkpoint:
    """Read a checkpoint folder.

    weights_only: leave the optimizer's tensors unread.
    Raises InputError when it is missing, truncated, damaged or of a newer format.
    """
    path = Path(path)
    if not (path / STATE_FILE).is_file():
        raise InputError(
            f"checkpoint {path}: no {STATE_FILE} there; give a folder such as RUN/checkpoints/step-00000040"
        )
    try:
        state = json.loads((path / STATE_FILE).read_text())
        sizes = dict(state["files"])
        format_number = int(state["format"])
        int(state["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, STATE_FILE, "is damaged") from error
    if format_number > FORMAT:
        raise InputError(f"checkpoint {path}: written by a newer sra2_fast (format {format_number}); upgrade sra2_fast")
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            raise _damaged(path, name, "is missing")
        if file.stat().st_size != size:
            raise _damaged(path, name, f"is truncated ({file.stat().st_size} bytes of {size})")
        if weights_only and name == "optimizer.safetensors":
            continue
        try:
            tensors[Path(name).stem] = load_file(file)
        except SafetensorError as error:
            raise _damaged(path, name, "is damaged") from error
    if "model" not in tensors:
        raise _damaged(path, "model.safetensors", "is missing")
    return Checkpoint(path, tensors["model"], tensors.get("ema"), tensors.get("optimizer", {}), state)


def load_weights(model: torch.nn.Module, weights: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """`model.load_state_dict(weights)`, with one line when the weights are of another model."""
    own = model.state_dict()
    for name in [*own, *weights]:
        here = tuple(own[name].shape) if name in own else "absent"
        there = tuple(weights[name].shape) if name in weights else "absent"
        if here != there:
            raise InputError(
                f"checkpoint {path}: of another model: {name} is {there} there and {here} here; "
                "give the --model and --align options it was trained with"
            )
    model.load_state_dict(weights)


def prune_checkpoints(folder: str | os.PathLike[str], keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; 0 keeps all. Call it after a new one is safely there."""
    for path in list_checkpoints(folder)[: -keep or None] if keep else []:
        shutil.rmtree(path, ignore_errors=True)


def remove_partial_checkpoints(folder: str | os.PathLike[str]) -> None:
    """Delete what a killed process left half written."""
    for path in Path(folder).glob(f".step-*{_PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


def split_optimizer(named: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A name-keyed optimizer state (torch.distributed.checkpoint.state_dict) as (tensors by `<parameter>/<key>`, rest).

    The rest, its parameter groups, is JSON-able.
    """
    tensors = {f"{name}/{key}": value for name, entry in named["state"].items() for key, value in entry.items()}
    return tensors, {"param_groups": named["param_groups"]}


def join_optimizer(tensors: Mapping[str, Tensor], rest: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The inverse of `split_optimizer`; a state of a parameter not in `names` is an InputError."""
    state: dict[str, dict[str, Any]] = {name: {} for name in names}
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        if name not in state:
            raise InputError(f"optimizer state is of another model: no parameter is named {name}")
        state[name][key] = value
    # Checkpoints of version 0.1 before November 2026 number the parameters; their names stand beside the numbers.
    groups = [{**group, "params": group.get("param_names", group["params"])} for group in rest["param_groups"]]
    return {"state": {name: entry for name, entry in state.items() if entry}, "param_groups": groups}


def _why_not_saved(final: Path, folder: Path, error: BaseException) -> str:
    before = list_checkpoints(folder)
    kept = f"the last checkpoint {before[-1]} is intact" if before else "there is no earlier checkpoint"
    reason = str(error).removeprefix("Error while serializing: ").removeprefix("I/O error: ")
    return f"checkpoint {final}: could not be written ({reason}); {kept}; free some space or choose another --out"


def _damaged(path: Path, name: str, what: str) -> InputError:
    return InputError(f"checkpoint {path}: {name} {what}; delete that folder and resume from the one before it")
