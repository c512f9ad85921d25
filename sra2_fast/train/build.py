"""From options and data to what trains: the model, the loss, the optimizer, the device and the precision."""

from __future__ import annotations

import copy
import dataclasses
from importlib.util import find_spec

import torch

from .. import backends, recipe
from ..data import LatentSource
from ..errors import InputError, must_be
from ..models import SiT, model_sizes
from ..objective import SRA2Loss
from ..optim import AdamWEMA
from .initial import freeze, parameter_groups
from .options import TrainOptions

LOADER_WORKERS_ON_GPU = 4  # drawing a step's noise on one core takes longer than a fast step on a GPU


def resolve(options: TrainOptions) -> TrainOptions:
    """The options with everything that was left to the machine, the model or the target filled in."""
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise InputError("train: --device cuda: this torch sees no GPU; use --device cpu")
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if backends.is_bf16_fast(device) else "fp32"
    backends.check_attention("train", "--attention", options.attention, device, precision == "bf16")
    on_gpu = device == "cuda"
    depth = model_sizes(options.model, "train")["depth"]
    for name in ("align_depth", "teacher_depth"):
        block = getattr(options, name)
        if block is not None and block > depth:
            expected = f"a block from 1 to {depth}, the depth of --model {options.model}"
            raise must_be("train", f"--{name.replace('_', '-')}", expected, block)
    has_align = options.align != "none"
    align_depth = options.align_depth or recipe.align_depth(options.model, depth, options.target)
    align_weight = recipe.ALIGN_WEIGHT.get(options.align, 0.0) if options.align_weight is None else options.align_weight
    has_linear_schedule = options.align_schedule == "linear"
    log = options.log
    if log in ("tensorboard", "wandb") and not find_spec(log):
        raise InputError(f"train: --log {log}: {log} is not installed; pip install {log}, or use --log none")
    if log == "auto":
        log = "tensorboard" if find_spec("tensorboard") else "none"
    return dataclasses.replace(
        options,
        log=log,
        device=device,
        precision=precision,
        implementation="fused" if options.implementation == "auto" else options.implementation,
        compile=on_gpu if options.compile is None else options.compile,
        workers=(LOADER_WORKERS_ON_GPU if on_gpu else 0) if options.workers is None else options.workers,
        align_weight=align_weight,
        align_depth=align_depth if has_align else None,
        align_schedule_steps=options.align_schedule_steps or (options.steps if has_linear_schedule else None),
    )


def build_model(options: TrainOptions, source: LatentSource) -> SiT:
    """The model on the CPU, its weights a function of the seed alone. options: resolved."""
    channels, height, width = source.shape
    sizes = model_sizes(options.model, "train")
    if height % sizes["patch_size"] or width % sizes["patch_size"]:
        raise InputError(
            f"train: {source.name} has latents of {height}x{width}, which the patch size {sizes['patch_size']} of "
            f"--model {options.model} does not divide; choose another patch size"
        )
    tokens = height // sizes["patch_size"] * (width // sizes["patch_size"])
    features = source.features
    if features is not None and features.num_tokens != tokens:
        raise InputError(
            f"train: {features.name} holds {features.num_tokens} tokens an image, --model {options.model} has "
            f"{tokens}; choose another patch size or compute the features on another grid"
        )
    feature_dim = None if features is None else features.width
    head = {} if options.align_depth is None else recipe.projector(options.target, sizes["hidden_size"], feature_dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = SiT(
            **sizes,
            input_size=(height, width),
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
    if options.freeze is not None:
        freeze(model, options.freeze)
    return model


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
        align_tokens=options.align_tokens,
    )


def build_optimizer(options: TrainOptions, model: SiT) -> AdamWEMA:
    """AdamW, clip and EMA over all parameters, by name."""
    return AdamWEMA(
        parameter_groups(model, options.lr_scale),
        lr=options.lr,
        weight_decay=options.weight_decay,
        ema_decay=options.ema_decay,
        max_grad_norm=options.max_grad_norm or None,
        implementation="apex" if options.optimizer == "apex" else options.implementation,
    )


def build_schedule(options: TrainOptions) -> recipe.UpdateSchedule:
    """Learning rate and decay of every update."""
    return recipe.UpdateSchedule(options.lr, options.lr_warmup, options.ema_decay)


def build_teacher(model: SiT, optimizer: AdamWEMA) -> SiT:
    """A copy of the model whose parameters *are* the optimizer's averages: it follows them without a copy a step.

    Call it after the optimizer's state was loaded: loading replaces the averages' tensors.
    """
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    averages = optimizer.ema_state_dict()
    for name, parameter in teacher.named_parameters():
        parameter.data = averages[name]
    return teacher
