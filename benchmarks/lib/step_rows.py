"""The rows of the step-time table: what one training step of each method consists of, and the check that it is right.

Every row is the same SiT trained on the same prepared batches: loss, backward, clip, AdamW, EMA. `eager` is the style
of the public repositories from PyTorch's own ops: `clip_grad_norm_`, `torch.optim.AdamW`, an EMA loop over parameters.
`fused` is ours. Weights that start at zero are made random, since products of zeros run faster than training does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sra2_fast import SiT, SiT_models, SRA2Loss
from sra2_fast.errors import InputError, must_be
from sra2_fast.train.allocator import keep_freed_memory

from .counting import count_parameters, projector_forward_flops, sit_forward_flops, training_flops

ROWS = ("baseline", "sra2-cosine", "sra2-smooth-l1", "sra", "repa")
PRECISIONS = ("fp32", "tf32", "bf16")
LR, EMA_DECAY, MAX_GRAD_NORM = 1e-4, 0.9999, 1.0
BATCHES = 4
UNIT_ROUNDOFF = {"fp32": 2.0**-24, "tf32": 2.0**-11, "bf16": 2.0**-8}
ROUNDINGS_A_BLOCK = 10  # matrix products, norms, gates and residuals that a value passes through in one block


@dataclass(frozen=True)
class Setting:
    """What all rows of a table share."""

    model: str
    batch_size: int
    precision: str
    implementation: str
    is_compiled: bool
    device: torch.device

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 autocast, or nothing."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()


@dataclass(frozen=True)
class Batch:
    """Inputs of one step, drawn before any timing."""

    latents: torch.Tensor
    labels: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    label_drop: torch.Tensor
    teacher_gap: torch.Tensor
    images: torch.Tensor | None

    def part(self, rows: slice) -> Batch:
        """Some of its samples."""
        return Batch(**{name: None if v is None else v[rows] for name, v in vars(self).items()})


def model_arguments(name: str) -> tuple[Callable[..., SiT], dict[str, Any]]:
    """(constructor, arguments) of a registry name or of `D,depth,heads,patch` on 32x32x4 latents.

    Raises InputError for anything else.
    """
    if name in SiT_models:
        return SiT_models[name], {}
    try:
        hidden_size, depth, num_heads, patch_size = (int(part) for part in name.split(","))
    except ValueError:
        known = ", ".join(sorted(SiT_models))
        raise must_be("step_time", "--model", f"'D,depth,heads,patch' or one of {known}", repr(name)) from None
    return SiT, {"hidden_size": hidden_size, "depth": depth, "num_heads": num_heads, "patch_size": patch_size}


def align_depth(row: str, name: str, depth: int) -> int:
    """The aligned block: 2 for S and B, 8 for L and XL in SRA 2; 4 and 8 in REPA; in SRA 8 for XL alone; a quarter of
    other models."""
    size = name.removeprefix("SiT-").split("/")[0]
    if size not in ("S", "B", "L", "XL"):
        return max(1, depth // 4)
    if size == "XL" or (size == "L" and row != "sra"):
        return 8
    return 2 if row.startswith("sra2") else 4


def make_batches(setting: Setting, config: dict[str, Any], with_images: bool, seed: int = 0) -> list[Batch]:
    """A few random batches, the same for every row; images are uint8, 16 pixels a token."""
    generator = torch.Generator().manual_seed(seed)
    b, channels, side = setting.batch_size, config["in_channels"], config["input_size"]
    pixels = 16 * (side // config["patch_size"])

    def draw() -> Batch:
        normal = torch.randn(2, b, channels, side, side, generator=generator)
        uniform = torch.rand(3, b, generator=generator)
        labels = torch.randint(0, config["num_classes"], (b,), generator=generator)
        images = torch.randint(0, 256, (b, 3, pixels, pixels), dtype=torch.uint8, generator=generator)
        return Batch(
            latents=normal[0].to(setting.device),
            labels=labels.to(setting.device),
            noise=normal[1].to(setting.device),
            t=uniform[0].to(setting.device),
            label_drop=(uniform[1] < config["class_dropout_prob"]).to(setting.device),
            teacher_gap=0.2 * uniform[2].to(setting.device),
            images=images.to(setting.device) if with_images else None,
        )

    return [draw() for _ in range(BATCHES)]


class TrainingStep:
    """One row: calling it runs one training step on the next batch and returns its 0-d loss, without synchronising.

    Raises InputError for a model that cannot be built.
    """

    def __init__(self, row: str, setting: Setting, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.row, self.setting = row, setting
        build, sizes = model_arguments(setting.model)
        arguments = dict(sizes, learn_sigma=False, implementation=setting.implementation)
        plain = plain_model(setting)
        grid = plain.input_size // plain.patch_size
        self.encoder: nn.Module | None = None
        self.loss_fn = SRA2Loss(align=None)
        frozen_flops = 0
        if row != "baseline":
            arguments["align_depth"] = align_depth(row, setting.model, plain.depth)
        if row.startswith("sra2"):
            self.loss_fn = SRA2Loss(align="cosine" if row == "sra2-cosine" else "smooth_l1")
        elif row == "sra":
            teacher_depth = 20 if plain.depth == 28 else min(2 * arguments["align_depth"], plain.depth)
            arguments.update(projector_layers=2, projection_dim=plain.hidden_size)
            self.loss_fn = SRA2Loss(target="teacher", teacher_depth=teacher_depth)
            frozen_flops = sit_forward_flops(plain.config(), stop_at_block=teacher_depth)
        elif row == "repa":
            from .dinov2 import HIDDEN_SIZE, DINOv2Encoder

            with setting.device:
                self.encoder = DINOv2Encoder(grid)
            arguments.update(projector_layers=3, projector_dim=2048, projection_dim=HIDDEN_SIZE)
            self.loss_fn = SRA2Loss(target="features")
            frozen_flops = self.encoder.forward_flops()
        with setting.device:  # drawn where they stay: a CPU would take ten seconds over the weights of SiT-XL/2
            self.sit = build(**arguments).train()
        fill_zeros(self.sit)
        self.params_head = count_parameters(self.sit.projector)
        self.params_external = count_parameters(self.encoder)
        head_flops = projector_forward_flops(self.sit.projector, grid * grid)
        self.flops_per_image = training_flops(sit_forward_flops(self.sit.config()) + head_flops, frozen_flops)
        self.batches = make_batches(setting, self.sit.config(), with_images=row == "repa")
        self.steps_taken = 0
        if setting.device.type == "cpu":
            keep_freed_memory()  # as sra2-fast train does; it helps every row and implementation
        self.model: nn.Module = self.sit
        self.teacher: nn.Module | None = None
        self.encode: Callable[[torch.Tensor], torch.Tensor] | None = self.encoder
        if setting.implementation == "fused":
            self._optimize_fused()
        else:
            self._optimize_eager()
        if row == "sra":
            self.teacher = self.ema_model
        if setting.is_compiled:
            self.model = torch.compile(self.sit)
            self.encode = torch.compile(self.encoder) if self.encoder is not None else None
            self.teacher = torch.compile(self.teacher) if self.teacher is not None else None

    def _optimize_eager(self) -> None:
        self.ema_model = copy.deepcopy(self.sit).requires_grad_(False)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.trained(), lr=LR, weight_decay=0.0)
        self.pairs = list(zip(self.ema_model.parameters(), self.sit.parameters(), strict=True))

    def _optimize_fused(self) -> None:
        from sra2_fast.optim import AdamWEMA

        named = [(name, p) for name, p in self.sit.named_parameters() if p.requires_grad]
        self.optimizer = AdamWEMA(named, lr=LR, ema_decay=EMA_DECAY, max_grad_norm=MAX_GRAD_NORM)
        if self.row == "sra":  # the teacher is a view of the optimizer's averages: they move, it moves
            self.ema_model = copy.deepcopy(self.sit)
            self.ema_model.load_state_dict(self.optimizer.ema_state_dict(), strict=False, assign=True)
            self.ema_model.requires_grad_(False)

    def trained(self) -> list[nn.Parameter]:
        """The parameters that the optimizer updates."""
        return [p for p in self.sit.parameters() if p.requires_grad]

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The total loss of `batch` in the precision of the setting."""
        with self.setting.autocast():
            extra: dict[str, Any] = {}
            if self.encode is not None:
                extra["features"] = self.encode(batch.images)
            if self.teacher is not None:
                extra.update(teacher=self.teacher, teacher_gap=batch.teacher_gap)
            return self.loss_fn(
                model,
                batch.latents,
                batch.labels,
                t=batch.t,
                noise=batch.noise,
                label_drop=batch.label_drop,
                **extra,
            ).total

    def __call__(self) -> torch.Tensor:
        batch = self.batches[self.steps_taken % len(self.batches)]
        self.steps_taken += 1
        total = self.loss(self.model, batch)
        total.backward()
        if self.setting.implementation == "fused":
            self.optimizer.step()
        else:
            torch.nn.utils.clip_grad_norm_(self.sit.parameters(), MAX_GRAD_NORM)
            self.optimizer.step()
            with torch.no_grad():
                for average, param in self.pairs:
                    average.mul_(EMA_DECAY).add_(param, alpha=1 - EMA_DECAY)
        self.optimizer.zero_grad(set_to_none=True)
        return total.detach()

    def persistent_bytes(self) -> int:
        """Bytes that live between steps: weights, averages, moments, encoder, batches; each storage once."""
        tensors = [*self._module_tensors(), *(t for batch in self.batches for t in vars(batch).values())]
        for state in self.optimizer.state.values():
            tensors += state.values()
        storages = {}
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def _module_tensors(self) -> Iterator[torch.Tensor]:
        for module in (self.sit, self.encoder, getattr(self, "ema_model", None)):
            if module is not None:
                yield from module.parameters()
                yield from module.buffers()

    def check(self) -> None:
        """Hold the step's loss and gradient norm to a float32 eager model of the same weights; before the first step.

        Raises RuntimeError where they differ by more than the precision explains. Skipped for what is that model.
        """
        setting = self.setting
        if (setting.implementation, setting.precision, setting.is_compiled) == ("eager", "fp32", False):
            return
        want_loss, want_norm = self._reference()
        got = self.loss(self.model, self.batches[0])
        got.backward()
        norm = grad_norm(self.sit)
        self.optimizer.zero_grad(set_to_none=True)
        limit = self.allowed_error()
        for what, value, want in (("loss", float(got.detach()), want_loss), ("gradient norm", norm, want_norm)):
            if not abs(value - want) <= limit * abs(want):  # written so that NaN fails
                raise RuntimeError(
                    f"step_time: row {self.row}: {what} is {value:.6g}, a float32 eager model says {want:.6g}; "
                    f"allowed is a relative difference of {limit:.1e}"
                )

    def allowed_error(self) -> float:
        """Twice 0.42 u sqrt(k) for k roundings (STYLE.md, "Tests"), and float32 sums over the widest layer."""
        config = self.sit.config()
        roundings = ROUNDINGS_A_BLOCK * config["depth"]
        summed = config["hidden_size"] * config["mlp_ratio"]
        return 2 * 0.42 * UNIT_ROUNDOFF[self.setting.precision] * roundings**0.5 + 2 * 2.0**-24 * summed**0.5

    def _reference(self) -> tuple[float, float]:
        """Loss and gradient norm of the first batch in float32 and eager, two samples at a time to save memory."""
        with torch.device("meta"):
            reference = SiT(**{**self.sit.config(), "implementation": "eager"}).train()
        reference.load_state_dict(self.sit.state_dict(), assign=True)  # the same memory; gradients of its own
        plain = copy.copy(self)
        plain.setting = Setting(**{**vars(self.setting), "precision": "fp32"})
        plain.encode, plain.teacher = self.encoder, reference if self.row == "sra" else None
        matmul_precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        total, count = 0.0, self.setting.batch_size
        try:
            for start in range(0, count, 2):
                part = self.batches[0].part(slice(start, start + 2))
                share = len(part.labels) / count
                loss = share * plain.loss(reference, part)
                loss.backward()
                total += float(loss.detach())
        finally:
            torch.set_float32_matmul_precision(matmul_precision)
        return total, grad_norm(reference)

    def check_after(self, last_loss: torch.Tensor) -> None:
        """Raises RuntimeError unless the last loss and all weights are finite and the weights have moved."""
        if not bool(torch.isfinite(last_loss)):
            raise RuntimeError(f"step_time: row {self.row}: the loss became {float(last_loss)}")
        weight = self.sit.final_layer.linear.weight
        if not bool(torch.isfinite(weight).all()) or not bool((weight != self._weight_before).any()):
            raise RuntimeError(f"step_time: row {self.row}: the timed steps did not train the model")

    def remember(self) -> None:
        """Keep one weight, so that `check_after` sees whether the steps trained."""
        self._weight_before = self.sit.final_layer.linear.weight.detach().clone()


def fill_zeros(model: nn.Module) -> None:
    """N(0, 0.02) into every trained parameter that is all zeros (adaLN, output layer, biases)."""
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad and not bool(param.any()):
                param.normal_(std=0.02)


def grad_norm(model: nn.Module) -> float:
    """The norm of all gradients, summed in float64."""
    squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


def check_setting(setting: Setting) -> None:
    """Raises InputError for a precision that the device has not got, or a model that cannot be built."""
    if setting.precision == "tf32" and setting.device.type != "cuda":
        raise InputError("step_time: --precision tf32 is for a GPU; use fp32 or bf16 on the CPU")
    plain_model(setting)


def plain_model(setting: Setting) -> SiT:
    """The setting's model without a projector and without memory, to ask it for its sizes."""
    build, sizes = model_arguments(setting.model)
    with torch.device("meta"):
        return build(**sizes, learn_sigma=False, implementation=setting.implementation)
