"""From options and data to what trains: the model, the loss, the optimizer, the device and the precision."""

from __future__ import annotations

import copy
import dataclasses
import difflib

import torch

from .. import backends
from ..data import LatentSource
from ..errors import InputError, must_be
from ..models import SiT, SiT_models
from ..objective import SRA2Loss
from ..objective.sra2_loss import DEFAULT_WEIGHT
from ..optim import AdamWEMA
from .options import TrainOptions

LOADER_WORKERS_ON_GPU = 4  # drawing a step's noise on one core takes longer than a fast step on a GPU


def resolve(options: TrainOptions) -> TrainOptions:
    """The options with everything that was left to the machine, the model or the target filled in."""
    if options.target == "features":
        raise InputError("train: --target features needs encoder features, and no data holds any; use vae or teacher")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise InputError("train: --device cuda: this torch sees no GPU; use --device cpu")
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if backends.is_bf16_fast(device) else "fp32"
    on_gpu = device == "cuda"
    depth = _sizes(options.model)["depth"]
    for name in ("align_depth", "teacher_depth"):
        block = getattr(options, name)
        if block is not None and block > depth:
            expected = f"a block from 1 to {depth}, the depth of --model {options.model}"
            raise must_be("train", f"--{name.replace('_', '-')}", expected, block)
    has_linear_schedule = options.align_schedule == "linear"
    return dataclasses.replace(
        options,
        device=device,
        precision=precision,
        implementation="fused" if options.implementation == "auto" else options.implementation,
        compile=on_gpu if options.compile is None else options.compile,
        workers=(LOADER_WORKERS_ON_GPU if on_gpu else 0) if options.workers is None else options.workers,
        align_weight=DEFAULT_WEIGHT.get(options.align, 0.0) if options.align_weight is None else options.align_weight,
        align_depth=None if options.align == "none" else options.align_depth or default_align_depth(options, depth),
        align_schedule_steps=options.align_schedule_steps or (options.steps if has_linear_schedule else None),
    )


def default_align_depth(options: TrainOptions, depth: int) -> int:
    """The paper's 2 for S and B, 8 for L and XL; SRA's 4, and 8 at XL, for its teacher; a quarter for custom sizes."""
    if options.model not in SiT_models:
        return max(1, depth // 4)
    size = options.model.split("-")[1].split("/")[0]
    if options.target == "teacher":
        return 8 if size == "XL" else 4
    return 8 if size in ("L", "XL") else 2


def _sizes(model: str) -> dict[str, int]:
    """hidden_size, depth, num_heads, patch_size of a registry name or of "D,depth,heads,patch"."""
    if model in SiT_models:
        with torch.device("meta"):
            config = SiT_models[model](input_size=8, num_classes=1, in_channels=1).config()
        return {name: config[name] for name in ("hidden_size", "depth", "num_heads", "patch_size")}
    numbers = model.split(",")
    if len(numbers) == 4 and all(number.strip().isdecimal() and int(number) > 0 for number in numbers):
        return dict(zip(("hidden_size", "depth", "num_heads", "patch_size"), map(int, numbers), strict=True))
    by_upper_case = {name.upper(): name for name in SiT_models}
    near = difflib.get_close_matches(model.upper(), by_upper_case, n=1, cutoff=0.4)
    hint = f"; did you mean {by_upper_case[near[0]]}?" if near else "."
    raise InputError(
        f"train: --model {model} is not known{hint} Names are SiT-{{XL,L,B,S}}/{{1,2,4,8}}, "
        "or give 'hidden_size,depth,heads,patch' such as 128,6,4,2"
    )


def build_model(options: TrainOptions, source: LatentSource) -> SiT:
    """The model on the CPU, its weights a function of the seed alone. options: resolved."""
    channels, height, width = source.shape
    sizes = _sizes(options.model)
    if height != width:
        raise must_be("train", f"latents of {source.name}", "square", f"{height}x{width}")
    if height % sizes["patch_size"]:
        raise InputError(
            f"train: {source.name} has latents of {height}x{width}, which the patch size {sizes['patch_size']} of "
            f"--model {options.model} does not divide; choose another patch size"
        )
    head = {}
    if options.target == "teacher" and options.align_depth is not None:
        head = {
            "projector_layers": 2,
            "projector_dim": 2 * sizes["hidden_size"],
            "projection_dim": sizes["hidden_size"],
        }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        return SiT(
            **sizes,
            input_size=height,
            in_channels=channels,
            num_classes=options.num_classes or source.num_classes,
            class_dropout_prob=options.label_dropout,
            learn_sigma=False,
            qk_norm=options.qk_norm,
            align_depth=options.align_depth,
            implementation=options.implementation,
            checkpoint_blocks=options.checkpoint_blocks,
            **head,
        )


def build_loss(options: TrainOptions) -> SRA2Loss:
    """options: resolved."""
    return SRA2Loss(
        path=options.path,
        time=options.time,
        align=None if options.align == "none" else options.align,
        align_weight=options.align_weight,
        beta=options.beta,
        target=options.target,
        schedule=options.align_schedule,
        schedule_steps=options.align_schedule_steps,
        teacher_depth=options.teacher_depth,
    )


def build_optimizer(options: TrainOptions, model: SiT) -> AdamWEMA:
    """AdamW, clip and EMA over all parameters, by name."""
    return AdamWEMA(
        model.named_parameters(),
        lr=options.lr,
        weight_decay=options.weight_decay,
        ema_decay=options.ema_decay,
        max_grad_norm=options.max_grad_norm or None,
        implementation="apex" if options.optimizer == "apex" else options.implementation,
    )


def build_teacher(model: SiT, optimizer: AdamWEMA) -> SiT:
    """A copy of the model whose parameters *are* the optimizer's averages: it follows them without a copy a step.

    Call it after the optimizer's state was loaded: loading replaces the averages' tensors.
    """
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    averages = optimizer.ema_state_dict()
    for name, parameter in teacher.named_parameters():
        parameter.data = averages[name]
    return teacher


def learning_rate(options: TrainOptions, step: int) -> float:
    """Of the update that makes step `step` (from 1) complete: linear warm-up, then constant."""
    return options.lr * min(1.0, step / options.lr_warmup) if options.lr_warmup else options.lr


def ema_decay(options: TrainOptions, step: int) -> float:
    """min(decay, (1 + step) / (10 + step)): young averages forget the initial weights quickly."""
    return min(options.ema_decay, (1 + step) / (10 + step))
