"""Opens a checkpoint file of another repository: tensors and plain values, never code.

A `.safetensors` file is a state dict. Anything else is torch's format, opened with `weights_only=True` and one more
type allowed, the argparse.Namespace in which the public scripts keep their options; a file that wants any other type is
refused by that type's name. What the tensors mean is for sources.py and converting.py.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import InputError

WRAPPERS = ("module", "_orig_mod")  # what DDP and torch.compile put into names
_UNSAFE = re.compile(r"GLOBAL ([\w.]+)")  # how torch names the type or function that a file wants


@dataclass(frozen=True)
class PublicCheckpoint:
    """What a file of a public script holds.

    weights: the state dicts that are there, "model" (as trained), "ema" (averaged), by names without wrappers.
    optimizer: of torch.optim, or None. args: the options its script recorded, {} where it recorded none.
    """

    weights: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Any] | None = None
    args: dict[str, Any] = field(default_factory=dict)
    step: int = 0


def read_public(path: str | os.PathLike[str]) -> PublicCheckpoint:
    """The file at `path`; its tensors stay on the disk until they are looked at, where the format allows.

    Raises InputError for what is missing, cut short, not a checkpoint, or holds code.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder that holds no checkpoint" if path.is_dir() else "does not exist"
        raise InputError(f"checkpoint {path}: {what}; give a run, a checkpoint of it, or a .pt or .safetensors file")
    if path.suffix == ".safetensors":
        try:
            return unpack(load_file(path), f"checkpoint {path}")
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from error
    is_zip = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True if is_zip else None)
    except pickle.UnpicklingError as error:
        found = _UNSAFE.search(str(error))
        if found is None:
            raise _unreadable(path, error) from error
        raise InputError(
            f"checkpoint {path}: wants to run {found[1]} when it is opened, which is refused; load it "
            'where you trust it and save its tensors alone: torch.save({"ema": checkpoint["ema"]}, ...)'
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    return unpack(content, f"checkpoint {path}")


def unpack(content: Any, op: str) -> PublicCheckpoint:
    """A state dict, or a mapping that has one under "ema", "model" or "state_dict", told apart.

    op: how its errors begin. Raises InputError where there is no state dict.
    """
    if not isinstance(content, Mapping):
        raise InputError(f"{op}: holds {type(content).__name__}, not weights; give a state dict")
    if content and all(_is_entry(key, value) for key, value in content.items()):
        return PublicCheckpoint({"model": without_wrappers(content)})
    named = {"model": content.get("model", content.get("state_dict")), "ema": content.get("ema")}
    weights = {name: dict(one) for name, one in named.items() if isinstance(one, Mapping) and one}
    if not weights:
        keys = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise InputError(f'{op}: no weights under "ema", "model" or "state_dict" (it holds {keys})')
    for name, state in weights.items():
        other = next((key for key, value in state.items() if not _is_entry(key, value)), None)
        if other is not None:
            raise InputError(f"{op}: {name}[{other!r}] is no tensor; give a state dict of a SiT")
    weights = {name: without_wrappers(state) for name, state in weights.items()}
    optimizer, step = content.get("opt"), content.get("steps", content.get("step", 0))
    return PublicCheckpoint(
        weights,
        optimizer if isinstance(optimizer, dict) else None,
        _recorded_options(content),
        step if isinstance(step, int) and step >= 0 else 0,
    )


def _is_entry(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by the names that the model gives them: without `module.` and `_orig_mod.`, anywhere."""
    return {".".join(part for part in name.split(".") if part not in WRAPPERS): one for name, one in state.items()}


def _recorded_options(content: Mapping[str, Any]) -> dict[str, Any]:
    """SiT's, REPA's and SRA's Namespace `args`; LightningDiT's nested `config`, its sections under their names."""
    args = content.get("args", content.get("config"))
    if isinstance(args, argparse.Namespace):
        return dict(vars(args))
    return dict(args) if isinstance(args, Mapping) else {}


def _unreadable(path: Path, error: BaseException) -> InputError:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return InputError(f"checkpoint {path}: cannot be read ({reason}); it is cut short or no checkpoint, copy it again")
