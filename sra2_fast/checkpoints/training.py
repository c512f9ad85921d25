"""Training checkpoints that are whole or not there: safetensors for the tensors, JSON for the rest, no pickle.

A checkpoint is a folder `step-00000040/` of

    model.safetensors      the trained weights, by state-dict name
    ema.safetensors        the averaged weights, by the same names (absent without an average)
    optimizer.safetensors  the optimizer's tensors, `<parameter>/<key>` (e.g. `blocks.0.attn.qkv.weight/exp_avg`)
    state.json             step, model configuration, the optimizer's numbers, size and SHA-256 of each file above,
                           and a seal over all of it (schemas.py)

written under another name, fsynced and renamed, so that a crash, a full disk or a kill leaves the checkpoints before it
as they were. Every file that is read is compared with its checksum first. SHA-256 because `sha256sum` knows it, and
because its 1.5 GB/s (CRC-32: 3.3) are run while the next file is written, and in one thread a file when read.
Left out: sharded checkpoints of many GPUs, and reading the weights of other repositories.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import InputError
from ..files import create_folder, fsync
from ..schemas import Damaged, State, as_type, must_be_whole, read_json, sealed

FORMAT = 1
STATE_FILE = "state.json"
FILES = {"model.safetensors", "ema.safetensors", "optimizer.safetensors"}
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
        create_folder(folder)
        remove_partial_checkpoints(folder)
        partial.mkdir()
        sizes, checksums = {}, {}
        with ThreadPoolExecutor(1) as pool:
            for name, tensors in (("optimizer", optimizer), ("model", model), ("ema", ema)):  # the largest first
                if tensors is None:
                    continue
                path = partial / f"{name}.safetensors"
                save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, path)
                fsync(path)
                sizes[path.name] = path.stat().st_size
                checksums[path.name] = pool.submit(_sha256, path)
        sums = {name: checksum.result() for name, checksum in checksums.items()}
        record = sealed({"format": FORMAT, "step": step, **state, "files": sizes, "sha256": sums})
        (partial / STATE_FILE).write_text(json.dumps(record, indent=1))
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
    """Read a checkpoint folder. One of before there were checksums is opened by the sizes of its files.

    weights_only: leave the optimizer's tensors unread.
    Raises InputError when it is missing, truncated, damaged or of a newer format.
    """
    path = Path(path)
    if not os.path.lexists(path / STATE_FILE):
        raise InputError(
            f"checkpoint {path}: no {STATE_FILE} there; give a folder such as RUN/checkpoints/step-00000040"
        )
    tensors: dict[str, dict[str, Tensor]] = {}
    try:
        state = _read_state(path)
        names = [name for name in state["files"] if not (weights_only and name == "optimizer.safetensors")]
        _check_files(path, state, names)
        for name in names:
            try:
                tensors[Path(name).stem] = load_file(path / name)
            except (SafetensorError, OSError) as error:
                raise Damaged(f"{name} is damaged ({error})") from error
        if "model" not in tensors:
            raise Damaged("model.safetensors is missing")
    except Damaged as error:
        raise Damaged(f"checkpoint {path}: {error}; {_way_on(path)}") from error
    return Checkpoint(path, tensors["model"], tensors.get("ema"), tensors.get("optimizer", {}), state)


def newest_whole(folder: str | os.PathLike[str], *, besides: Path | None = None) -> Path | None:
    """The newest checkpoint in `folder` whose every byte is as it was written (reads them all); not `besides`."""
    for path in reversed(list_checkpoints(folder)):
        try:
            if path != besides:
                state = _read_state(path)
                _check_files(path, state, list(state["files"]))
                return path
        except InputError:
            continue
    return None


def _read_state(path: Path) -> dict[str, Any]:
    """The contents of state.json, every value checked. Raises Damaged with the reason alone."""
    try:
        state = read_json(path / STATE_FILE)
        must_be_whole(state)
        if isinstance(state.get("format"), int) and state["format"] > FORMAT:
            number = state["format"]
            raise InputError(f"checkpoint {path}: written by a newer sra2_fast (format {number}); upgrade sra2_fast")
        as_type(state, State)
    except Damaged as error:
        raise Damaged(f"{STATE_FILE} {error}") from error
    unknown = state["files"].keys() - FILES
    if unknown:
        raise Damaged(f"{STATE_FILE} is damaged (no file of a checkpoint is called {min(unknown)})")
    named = _NAME.fullmatch(path.name)
    if named and int(named[1]) != state["step"]:
        raise Damaged(f"{STATE_FILE} is damaged (it says step {state['step']})")
    return state


def _check_files(path: Path, state: dict[str, Any], names: list[str]) -> None:
    """Compare sizes, and checksums where there are any. Raises Damaged with the reason alone."""
    for name in names:
        file, size = path / name, state["files"][name]
        if not os.path.isfile(file):
            raise Damaged(f"{name} is missing")
        if file.stat().st_size != size:
            raise Damaged(f"{name} is truncated ({file.stat().st_size} bytes of {size})")
    known = state.get("sha256", {})
    missing = [name for name in names if known and name not in known]
    if missing:
        raise Damaged(f"{STATE_FILE} is damaged (no checksum of {missing[0]})")
    with ThreadPoolExecutor(len(FILES)) as pool:
        found = pool.map(_sha256, [path / name for name in names if name in known])
        for name, checksum in zip([name for name in names if name in known], found, strict=True):
            if checksum != known[name]:
                raise Damaged(f"{name} is damaged (its SHA-256 is not the one in {STATE_FILE})")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def load_weights(model: torch.nn.Module, weights: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """`model.load_state_dict(weights)`, with one line when the weights are of another model."""
    own = model.state_dict()
    for name, value in weights.items():
        if not value.is_floating_point():
            raise InputError(f"checkpoint {path}: {name} holds {value.dtype}, not floats; it is no checkpoint of a SiT")
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
        gone = path.with_name(f".{path.name}{_PARTIAL}")  # a kill in the middle leaves no half of one under its name
        with contextlib.suppress(OSError):
            path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


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
    before = newest_whole(folder)
    kept = f"the last whole checkpoint is {before}" if before else "there is no earlier checkpoint"
    reason = str(error).removeprefix("Error while serializing: ").removeprefix("I/O error: ")
    return f"checkpoint {final}: could not be written ({reason}); {kept}; free some space or choose another --out"


def _way_on(path: Path) -> str:
    before = newest_whole(path.parent, besides=path)
    if before is None:
        return "no other checkpoint beside it is whole; start anew with another --out"
    return f"delete that folder and go on from {before.name}, which is whole"
