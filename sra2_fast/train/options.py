"""Every option of `sra2-fast train`, declared once: its default, its type, its help, and whether it shapes the run.

The command line and the TOML files of `configs/` are both read from this declaration. An option given on the command
line beats the file, the file beats the default.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .. import recipe
from ..errors import InputError, must_be

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Bound(NamedTuple):
    """What a value must be, in words, and the test of it. Every number must be finite besides."""

    words: str
    holds: Callable[[Any], bool]


ANY = Bound("a finite number", lambda value: True)
COUNT = Bound("from 1 to 1,000,000", lambda value: 1 <= value <= 10**6)
AT_LEAST_1 = Bound("at least 1", lambda value: value >= 1)
FROM_0 = Bound("0 or more", lambda value: value >= 0)
ABOVE_0 = Bound("above 0", lambda value: value > 0)
SHARE = Bound("at least 0 and below 1", lambda value: 0 <= value < 1)
PART = Bound("above 0 and at most 1", lambda value: 0 < value <= 1)
SEED = Bound("from 0 to 2^64 - 1", lambda value: 0 <= value < 2**64)


# One number, or one a channel; patterns. On the command line separated by commas, in a file also as a list.
LISTS_AS_TEXT = ("latent_scale", "latent_shift", "freeze", "lr_scale")


def _option(default: Any, help: str, bound: Bound = ANY, *, fixed_on_resume: bool = True) -> Any:
    """fixed_on_resume: a resumed run must have the same value, or its weights would not be those of one run."""
    about = {"help": help, "bound": bound, "fixed_on_resume": fixed_on_resume}
    return dataclasses.field(default=default, metadata=about)


_changeable = functools.partial(_option, fixed_on_resume=False)


@dataclass(frozen=True)
class TrainOptions:
    """One training run. `None` means: chosen from the model, the data or the machine when the run starts."""

    out: str = _changeable("", "folder of the run: checkpoints, samples, metrics (required)")
    data: str = _changeable("digits", "'digits', or a folder of latents")
    latent_scale: str | None = _option(
        None, "z = (value - shift) * scale, where the data record neither: a number, or one a channel (0.1,0.2,...)"
    )
    latent_shift: str | None = _option(None, "the shift of --latent-scale")
    ignore_labels: bool = _option(False, "train without classes, whatever labels the data have")
    model: str = _option("SiT-B/2", "a registry name, or 'D,depth,heads,patch' such as 128,6,4,2")
    num_classes: int | None = _option(
        None, "labels of the model, without the null label (default: those of the data)", COUNT
    )
    qk_norm: bool = _option(False, "normalise queries and keys")
    init: str | None = _option(
        None, "start from these weights: a run, a checkpoint, or a file of SiT, REPA, SRA, REPA-E or LightningDiT"
    )
    init_positions: Literal["recompute", "interpolate"] = _option(
        "recompute", "where --init has another latent size: positions 0, 1, 2, ..., or spread over those it knows"
    )
    freeze: str | None = _option(None, "parameters that are not trained: PATTERN,... such as 'blocks.0.*,x_embedder.*'")
    lr_scale: str | None = _option(None, "factors of the learning rate: PATTERN=FACTOR,... such as 'projector.*=10'")
    steps: int = _changeable(400_000, "train up to this step", AT_LEAST_1)
    batch_size: int = _option(recipe.BATCH_SIZE, "images a step", COUNT)
    microbatch: int | None = _changeable(None, "images run at once, the batch in turn (default: all)", AT_LEAST_1)
    seed: int = _option(0, "of the weights, the data order, time, noise and label dropout", SEED)

    lr: float = _option(recipe.LR, "learning rate of AdamW", ABOVE_0)
    lr_warmup: int = _option(0, "steps over which the learning rate rises linearly to --lr", FROM_0)
    weight_decay: float = _option(0.0, "decoupled weight decay", FROM_0)
    max_grad_norm: float = _option(recipe.MAX_GRAD_NORM, "clip the gradient to this global norm; 0: never", FROM_0)
    ema_decay: float = _option(
        recipe.EMA_DECAY, "of the averaged weights, after a warm-up of min(decay, (1 + step) / (10 + step))", SHARE
    )
    label_dropout: float = _option(
        recipe.LABEL_DROPOUT, "share of labels replaced by the null label, for guidance", SHARE
    )

    path: Literal["linear", "cosine"] = _option("linear", "x_t between data and noise")
    time: Literal["uniform", "lognormal"] = _option("uniform", "distribution of t")
    align: Literal["cosine", "smooth_l1", "mse", "l1", "none"] = _option("cosine", "alignment loss; none: a plain SiT")
    align_weight: float | None = _option(None, "its weight (default: 0.5 for cosine, else 1)")
    align_depth: int | None = _option(
        None,
        "block whose tokens are aligned (default: 2 for S, B; 8 for L, XL; depth // 4; with a teacher 4, 8 for XL)",
        AT_LEAST_1,
    )
    align_schedule: Literal["constant", "linear", "stop"] = _option("constant", "of the weight")
    align_schedule_steps: int | None = _option(
        None, "where 'linear' reaches zero (default: --steps) or 'stop' stops", AT_LEAST_1
    )
    align_tokens: float = _option(
        1.0, "share of each image's tokens that are aligned, drawn anew every step; below 1 a cheaper head", PART
    )
    beta: float = _option(recipe.BETA, "of smooth_l1")
    target: Literal["vae", "features", "teacher"] = _option(
        "vae", "align with: the clean latents (SRA 2), an encoder's features beside them (REPA), the EMA teacher (SRA)"
    )
    teacher_depth: int | None = _option(
        None, "block of the teacher (default: 20 for XL, else twice --align-depth)", AT_LEAST_1
    )

    precision: Literal["auto", "bf16", "fp32"] = _option(
        "auto", "bf16 autocast where the machine is good at it, or float32"
    )
    device: Literal["auto", "cpu", "cuda"] = _changeable("auto", "where to train")
    implementation: Literal["auto", "eager", "fused"] = _changeable("auto", "fused ops, or PyTorch's own")
    attention: Literal["auto", "sdpa", "matmul", "flash-attn-3", "flash-attn", "cudnn", "flash", "efficient"] = (
        _changeable("auto", "what computes it; auto: the fastest here, measured once and kept on resume")
    )
    optimizer: Literal["adamw-ema", "apex"] = _changeable(
        "adamw-ema", "ours, or NVIDIA apex's fused AdamW where it imports"
    )
    compile: bool | None = _changeable(None, "torch.compile the model (default: on a GPU)")
    graph: bool = _changeable(False, "run each step as one CUDA graph, captured after the first ones")
    checkpoint_blocks: bool = _changeable(False, "recompute each block in the backward pass to save memory")
    workers: int | None = _changeable(None, "data loading processes (default: 0 on a CPU, 4 on a GPU)", FROM_0)

    resume: str = _changeable("auto", "auto: from the newest checkpoint of --out; never; or a checkpoint or run")
    log: Literal["auto", "tensorboard", "wandb", "none"] = _changeable(
        "auto", "what takes the numbers besides metrics.jsonl; auto: TensorBoard where it is installed"
    )
    log_every: int = _changeable(50, "steps between lines of metrics.jsonl", COUNT)
    checkpoint_every: int = _changeable(10_000, "steps between checkpoints; one is always saved at the end", AT_LEAST_1)
    keep_checkpoints: int = _changeable(0, "delete all but the newest that many; 0: keep all", FROM_0)
    sample_every: int = _changeable(10_000, "steps between sample grids, one more at the end; 0: none", FROM_0)
    sample_steps: int = _changeable(50, "Heun steps of the sample grids", AT_LEAST_1)
    sample_cfg: float = _changeable(1.0, "guidance scale of the sample grids")
    vae: str | None = _changeable(
        None,
        "autoencoder of diffusers (hub name or folder) that decodes sample grids, or none (default: the data's own)",
    )

    def __post_init__(self) -> None:
        for name, kind, about in _fields():
            value, option = getattr(self, name), f"--{name.replace('_', '-')}"
            if not _accepts(kind, value):
                raise must_be("train", option, _describe(kind), repr(value))
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                if not about["bound"].holds(value):
                    raise must_be("train", option, about["bound"].words, value)
                if not math.isfinite(value):
                    raise must_be("train", option, ANY.words, value)
        if self.sample_every and self.sample_cfg != 1.0 and self.label_dropout == 0.0:
            raise InputError(
                f"train: --sample-cfg {self.sample_cfg} needs --label-dropout above 0, or there is no null label"
            )
        if self.align_schedule == "stop" and self.align_schedule_steps is None:
            raise InputError("train: --align-schedule stop needs --align-schedule-steps, the step it stops at")
        if self.align_schedule == "constant" and self.align_schedule_steps is not None:
            raise InputError("train: --align-schedule-steps is for --align-schedule linear or stop, not constant")
        if self.init is not None and self.resume not in ("auto", "never"):
            raise InputError("train: --init starts a run and --resume goes on with one; give one of them")
        if self.target != "teacher" and self.teacher_depth is not None:
            raise InputError(f"train: --teacher-depth is for --target teacher, not {self.target}")


def fixed_on_resume(name: str) -> bool:
    return bool(TrainOptions.__dataclass_fields__[name].metadata["fixed_on_resume"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every option, without argparse defaults: what is absent was not given."""
    parser.add_argument("--config", metavar="FILE", help="TOML file of these options; the command line beats it")
    for name, kind, about in _fields():
        flag = "--" + name.replace("_", "-")
        default = TrainOptions.__dataclass_fields__[name].default
        shown = "" if default in (None, "") else f" [{default}]"
        common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": (about["help"] + shown).replace("%", "%%")}
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
    """The options in a TOML file; names may be written with - or _, numbers of channels as a number or a list."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a FIFO would wait for a writer
            raise InputError(f"train: --config {path}: not a regular file")
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise InputError(f"train: --config {path}: {error.strerror}") from error
    except RecursionError as error:
        raise InputError(f"train: --config {path}: not valid TOML: nested too deeply") from error
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
        if name in LISTS_AS_TEXT and not isinstance(value, str):
            value = ",".join(map(str, value if isinstance(value, list) else [value]))
        if not _accepts(kinds[name], value):
            raise must_be(f"train: --config {path}", written, _describe(kinds[name]), repr(value))
        values[name] = float(value) if _without_none(kinds[name]) is float and value is not None else value
    return values


def _fields() -> list[tuple[str, Any, Mapping[str, Any]]]:
    """(name, type, what _option said) of every option."""
    kinds = typing.get_type_hints(TrainOptions)
    return [(f.name, kinds[f.name], f.metadata) for f in dataclasses.fields(TrainOptions)]


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
