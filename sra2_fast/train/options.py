"""Every option of `sra2-fast train`, declared once: its default, its type, its help, and whether it shapes the run.

The command line and the TOML files of `configs/` are both read from this declaration. An option given on the command
line beats the file, the file beats the default.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import InputError, must_be

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _option(default: Any, help: str, *, shapes_run: bool = True) -> Any:
    """shapes_run: a resumed run must have the same value, or its weights would not be those of one run."""
    return dataclasses.field(default=default, metadata={"help": help, "shapes_run": shapes_run})


@dataclass(frozen=True)
class TrainOptions:
    """One training run. `None` means: chosen from the model, the data or the machine when the run starts."""

    out: str = _option("", "folder of the run: checkpoints, samples, metrics (required)", shapes_run=False)
    data: str = _option("digits", "'digits', or a folder of latents", shapes_run=False)
    model: str = _option("SiT-B/2", "a registry name, or 'D,depth,heads,patch' such as 128,6,4,2")
    num_classes: int | None = _option(None, "labels of the model, without the null label (default: those of the data)")
    qk_norm: bool = _option(False, "normalise queries and keys")
    steps: int = _option(400_000, "train up to this step", shapes_run=False)
    batch_size: int = _option(256, "images a step")
    seed: int = _option(0, "of the weights, the data order, time, noise and label dropout")

    lr: float = _option(1e-4, "learning rate of AdamW")
    lr_warmup: int = _option(0, "steps over which the learning rate rises linearly to --lr")
    weight_decay: float = _option(0.0, "decoupled weight decay")
    max_grad_norm: float = _option(1.0, "clip the gradient to this global norm; 0: never")
    ema_decay: float = _option(
        0.9999, "of the averaged weights, after a warm-up of min(decay, (1 + step) / (10 + step))"
    )
    label_dropout: float = _option(0.1, "share of labels replaced by the null label, for guidance")

    path: Literal["linear", "cosine"] = _option("linear", "x_t between data and noise")
    time: Literal["uniform", "lognormal"] = _option("uniform", "distribution of t")
    align: Literal["cosine", "smooth_l1", "mse", "l1", "none"] = _option("cosine", "alignment loss; none: a plain SiT")
    align_weight: float | None = _option(None, "its weight (default: 0.5 for cosine, else 1)")
    align_depth: int | None = _option(
        None,
        "block whose tokens are aligned (default: 2 for S, B; 8 for L, XL; depth // 4; with a teacher 4, 8 for XL)",
    )
    align_schedule: Literal["constant", "linear", "stop"] = _option("constant", "of the weight")
    align_schedule_steps: int | None = _option(None, "where 'linear' reaches zero (default: --steps) or 'stop' stops")
    beta: float = _option(0.05, "of smooth_l1")
    target: Literal["vae", "teacher"] = _option("vae", "align with: the clean latents (SRA 2), the EMA teacher (SRA)")
    teacher_depth: int | None = _option(None, "block of the teacher (default: 20 for XL, else twice --align-depth)")

    precision: Literal["auto", "bf16", "fp32"] = _option(
        "auto", "bf16 autocast where the machine is good at it, or float32"
    )
    device: Literal["auto", "cpu", "cuda"] = _option("auto", "where to train", shapes_run=False)
    implementation: Literal["auto", "eager", "fused"] = _option("auto", "fused ops, or PyTorch's own", shapes_run=False)
    optimizer: Literal["adamw-ema", "apex"] = _option(
        "adamw-ema", "ours, or NVIDIA apex's fused AdamW where it imports", shapes_run=False
    )
    compile: bool | None = _option(None, "torch.compile the model (default: on a GPU)", shapes_run=False)
    checkpoint_blocks: bool = _option(
        False, "recompute each block in the backward pass to save memory", shapes_run=False
    )
    workers: int | None = _option(None, "data loading processes (default: 0 on a CPU, 4 on a GPU)", shapes_run=False)

    resume: str = _option(
        "auto", "auto: go on from the newest checkpoint of --out; never; or a checkpoint folder", shapes_run=False
    )
    log_every: int = _option(50, "steps between lines of metrics.jsonl", shapes_run=False)
    checkpoint_every: int = _option(
        10_000, "steps between checkpoints; one is always saved at the end", shapes_run=False
    )
    keep_checkpoints: int = _option(0, "delete all but the newest that many; 0: keep all", shapes_run=False)
    sample_every: int = _option(10_000, "steps between sample grids, one more at the end; 0: none", shapes_run=False)
    sample_steps: int = _option(50, "Heun steps of the sample grids", shapes_run=False)
    sample_cfg: float = _option(1.0, "guidance scale of the sample grids", shapes_run=False)
    vae: str | None = _option(
        None, "AutoencoderKL (hub name or folder) that decodes the sample grids", shapes_run=False
    )

    def __post_init__(self) -> None:
        for name, kind, _ in _fields():
            value = getattr(self, name)
            if not _accepts(kind, value):
                raise must_be("train", f"--{name.replace('_', '-')}", _describe(kind), repr(value))
        for name in (
            "steps",
            "batch_size",
            "num_classes",
            "align_depth",
            "align_schedule_steps",
            "teacher_depth",
            "log_every",
            "checkpoint_every",
            "sample_steps",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise must_be("train", f"--{name.replace('_', '-')}", "at least 1", getattr(self, name))
        for name in (
            "lr_warmup",
            "sample_every",
            "keep_checkpoints",
            "workers",
            "seed",
            "max_grad_norm",
            "weight_decay",
        ):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise must_be("train", f"--{name.replace('_', '-')}", "0 or more", getattr(self, name))
        for name in ("label_dropout", "ema_decay"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise must_be("train", f"--{name.replace('_', '-')}", "at least 0 and below 1", getattr(self, name))
        if not 0.0 < self.lr < math.inf:
            raise must_be("train", "--lr", "above 0", self.lr)
        for name in ("align_weight", "beta", "weight_decay", "max_grad_norm", "sample_cfg"):
            if getattr(self, name) is not None and not math.isfinite(getattr(self, name)):
                raise must_be("train", f"--{name.replace('_', '-')}", "a finite number", getattr(self, name))
        if self.seed >= 2**64:
            raise must_be("train", "--seed", "below 2^64", self.seed)
        if self.sample_every and self.sample_cfg != 1.0 and self.label_dropout == 0.0:
            raise InputError(
                f"train: --sample-cfg {self.sample_cfg} needs --label-dropout above 0, or there is no null label"
            )
        if self.align_schedule == "stop" and self.align_schedule_steps is None:
            raise InputError("train: --align-schedule stop needs --align-schedule-steps, the step it stops at")
        if self.align_schedule == "constant" and self.align_schedule_steps is not None:
            raise InputError("train: --align-schedule-steps is for --align-schedule linear or stop, not constant")
        if self.target != "teacher" and self.teacher_depth is not None:
            raise InputError(f"train: --teacher-depth is for --target teacher, not {self.target}")


def shapes_run(name: str) -> bool:
    return bool(TrainOptions.__dataclass_fields__[name].metadata["shapes_run"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every option, without argparse defaults: what is absent was not given."""
    parser.add_argument("--config", metavar="FILE", help="TOML file of these options; the command line beats it")
    for name, kind, help_text in _fields():
        flag = "--" + name.replace("_", "-")
        default = TrainOptions.__dataclass_fields__[name].default
        shown = "" if default in (None, "") else f" [{default}]"
        common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": (help_text + shown).replace("%", "%%")}
        base = _without_none(kind)
        if base is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif typing.get_origin(base) is Literal:
            parser.add_argument(flag, choices=typing.get_args(base), **common)
        else:
            parser.add_argument(flag, type=base, metavar=base.__name__.upper(), **common)


def read_options(args: argparse.Namespace) -> TrainOptions:
    """Defaults, then the --config file, then the command line. Raises InputError for what none of them can mean."""
    given = {name: value for name, value in vars(args).items() if name in TrainOptions.__dataclass_fields__}
    config = getattr(args, "config", None)
    values = {**(read_config(config) if config else {}), **given}
    if not values.get("out"):
        raise InputError("train: --out is missing; name the folder of this run, such as --out runs/digits")
    return TrainOptions(**values)


def read_config(path: str | Path) -> dict[str, Any]:
    """The options in a TOML file; names may be written with - or _."""
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise InputError(f"train: --config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"train: --config {path}: not valid TOML: {error}") from error
    kinds = {name: kind for name, kind, _ in _fields()}
    values = {}
    for written, value in table.items():
        name = written.replace("-", "_")
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; see sra2-fast train --help"
            raise InputError(f"train: --config {path}: unknown option {written!r}{hint}")
        if not _accepts(kinds[name], value):
            raise must_be(f"train: --config {path}", written, _describe(kinds[name]), repr(value))
        values[name] = float(value) if _without_none(kinds[name]) is float and value is not None else value
    return values


def _fields() -> list[tuple[str, Any, str]]:
    kinds = typing.get_type_hints(TrainOptions)
    return [(f.name, kinds[f.name], f.metadata["help"]) for f in dataclasses.fields(TrainOptions)]


def _without_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def _accepts(kind: Any, value: object) -> bool:
    if value is None:
        return _without_none(kind) is not kind
    kind = _without_none(kind)
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _describe(kind: Any) -> str:
    kind = _without_none(kind)
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
