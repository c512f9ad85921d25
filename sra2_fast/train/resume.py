"""Which checkpoint a run starts from, whether it is of the same run, and back from it to where the run stood."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

from ..checkpoints import (
    Checkpoint,
    checkpoint_name,
    join_optimizer,
    list_checkpoints,
    load_checkpoint,
    load_weights,
)
from ..data import LatentSource
from ..errors import InputError
from ..schemas import SEAL
from .diagnosis import TERMS
from .options import TrainOptions, fixed_on_resume
from .run_directory import RunDirectory

FINGERPRINT = "data_fingerprint"
OPTIMIZER_STATE = {"step", "exp_avg", "exp_avg_sq"}
SHAPES_WEIGHTS = ("model", "num_classes", "qk_norm")


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
    checkpoint = load_checkpoint(newest_of_run(options.resume))
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


def newest_of_run(path: str) -> str | Path:
    """`path`, or the newest checkpoint in it where it is the folder of a run."""
    found = list_checkpoints(Path(path) / "checkpoints")
    return found[-1] if found else path


def describe_run(options: TrainOptions, source: LatentSource) -> dict[str, Any]:
    """What a resumed run must share with what went before to be one run: the resolved options and the data.

    Not where the data lie: another spelling of the path, or a copy, is the same data.
    """
    values = {name: value for name, value in dataclasses.asdict(options).items() if fixed_on_resume(name)}
    values["num_classes"] = options.num_classes or source.num_classes
    values["data"] = f"{source.num_samples} x {list(source.shape)}, {source.num_classes} classes"
    values[FINGERPRINT] = source.fingerprint()
    if source.features is not None:
        values[FINGERPRINT] += f" {source.features.fingerprint()}"
    return values


def check_same_run(checkpoint: Checkpoint, run: dict[str, Any], resume: str) -> list[str]:
    """Compare with the checkpoint's run. With `auto` a difference is an InputError; else it is a wish, and returned.

    What makes other shapes of weights is no wish: it is an InputError either way.
    """
    missing = [key for key in ("run", "optimizer", "pending") if key not in checkpoint.state]
    if missing:
        raise InputError(
            f"checkpoint {checkpoint.path}: not of sra2-fast train (its state.json has no {missing[0]!r}); "
            "choose another --resume, or start from its weights with --init"
        )
    before = _as_today(checkpoint.state["run"], run)
    differing = [name for name, value in run.items() if before[name] != value]
    for name in differing:
        if name in SHAPES_WEIGHTS:
            raise InputError(
                f"train: {checkpoint.path} was trained with {option_of(name)} {before[name]}, not {run[name]}; "
                "give the same"
            )
    changes = [f"{option_of(name)} {before[name]} -> {run[name]}" for name in differing if name != FINGERPRINT]
    if differing == [FINGERPRINT]:
        changes = ["--data holds other latents than it was trained on"]
    if changes and resume == "auto":
        raise InputError(
            f"train: {checkpoint.path} is of a run with other options ({'; '.join(changes)}); give the same ones, "
            f"choose another --out, or take the changes on purpose with --resume {checkpoint.path}"
            f"{_about_the_decay(before, run, differing)}"
        )
    return changes


def restore(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, options: TrainOptions
) -> list[list[float]]:
    """Weights, averages and moments; returns the losses of the log interval the checkpoint lies in."""
    load_weights(model, checkpoint.model, checkpoint.path)
    check_optimizer(checkpoint, model, optimizer)
    names = [name for name, _ in model.named_parameters()]
    state = join_optimizer(checkpoint.optimizer, checkpoint.state["optimizer"], names)
    for name, entry in state["state"].items():
        if checkpoint.ema is not None:
            entry["ema"] = checkpoint.ema[name]
    scales = [{k: group[k] for k in group if k == "lr_scale"} for group in optimizer.param_groups]
    state["param_groups"] = regroup(state["param_groups"], optimizer.param_groups)
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(strict=False))
    for group, scale in zip(optimizer.param_groups, scales, strict=True):
        # The loaded ones, unless they were changed on purpose.
        group |= {"weight_decay": options.weight_decay, **scale}
    pending = checkpoint.state["pending"]
    every = options.log_every  # it may have been another one
    since_log_point = checkpoint.step % every
    if not since_log_point and len(pending) >= every:  # a log point whose record could not be written
        since_log_point = every
    return list(pending[len(pending) - min(len(pending), since_log_point) :])


def regroup(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The settings of saved parameter groups for parameters that are grouped otherwise now (another --lr-scale).

    A group gets the settings of its first parameter; what has no parameter there, those of the first group.
    """
    settings = {name: group for group in saved for name in group["params"]}
    names = [list(group["param_names"]) for group in own]
    return [{**settings.get(of[0], saved[0]), "params": of, "param_names": of} for of in names]


def check_optimizer(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse what would restart a moment or an average, or go on with other settings, without a word.

    A parameter that was never updated has no state at all. Sealed settings are those that were written, such as another
    program's betas in a run that was converted; others must be ours. Raises InputError naming what is wrong.
    """
    where, own = f"checkpoint {checkpoint.path}", optimizer.param_groups[0]
    for group in checkpoint.state["optimizer"]["param_groups"]:
        for name in () if SEAL in checkpoint.state else ("betas", "eps"):
            there, here = group.get(name), own[name]
            if there != (list(here) if name == "betas" else here):
                raise InputError(f"{where}: {name} of its optimizer is {there}; this version goes on with {here} only")
    if any(len(row) != len(TERMS) for row in checkpoint.state["pending"]):
        raise InputError(f"{where}: a row of its pending losses has not {len(TERMS)} numbers; it is damaged")
    parameters = dict(model.named_parameters())
    found: dict[str, set[str]] = {}
    for path, value in checkpoint.optimizer.items():
        name, _, key = path.rpartition("/")
        if name not in parameters or key not in OPTIMIZER_STATE:
            raise InputError(f"{where}: optimizer.safetensors holds {path}, which is nothing of this model's optimizer")
        found.setdefault(name, set()).add(key)
        _check_tensor(f"{where}: optimizer.safetensors: {path}", value, parameters[name], is_scalar=key == "step")
    for name, keys in found.items():
        if keys != OPTIMIZER_STATE:
            raise InputError(
                f"{where}: optimizer.safetensors lacks {name}/{min(OPTIMIZER_STATE - keys)}; it is damaged"
            )
    for name, parameter in parameters.items():
        if checkpoint.ema is not None and name not in checkpoint.ema:
            raise InputError(f"{where}: ema.safetensors lacks {name}; it is damaged")
        if checkpoint.ema is not None:
            _check_tensor(f"{where}: ema.safetensors: {name}", checkpoint.ema[name], parameter)


def _check_tensor(where: str, value: torch.Tensor, parameter: torch.Tensor, *, is_scalar: bool = False) -> None:
    shape = () if is_scalar else tuple(parameter.shape)
    if tuple(value.shape) != shape or not value.is_floating_point():
        raise InputError(f"{where} must be floats of shape {shape}, got {value.dtype} {tuple(value.shape)}")


def option_of(name: str) -> str:
    """The option as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def _as_today(before: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """A description with what an older version did not record: defaults of newer options; what is unknown agrees."""
    told = {name: value for name, value in before.items() if value is not None or name != "num_classes"}
    if isinstance(told.get("data"), str):
        told["data"] = told["data"].rpartition(": ")[2]  # the path stood before it
    defaults = {name: field.default for name, field in TrainOptions.__dataclass_fields__.items() if name in run}
    unknown = {name: run[name] for name in ("num_classes", FINGERPRINT, "data")}
    return {**defaults, **unknown, **told}


def _about_the_decay(before: dict[str, Any], run: dict[str, Any], differing: list[str]) -> str:
    """The linear decay of the alignment ends at --steps unless told, so more steps would stretch it."""
    if differing != ["align_schedule_steps"] or run["align_schedule"] != "linear":
        return ""
    kept = before["align_schedule_steps"]
    return f"; --align-schedule-steps {kept} ends the decay where it was to end, more --steps stretch it"
