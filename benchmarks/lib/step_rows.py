"""The rows of the step-time table: what one training step of each method consists of, and the check that it is right.

Every row is the step that trains (`sra2_fast.train.step.TrainStep`) on the same prepared batches. `eager` is the style
of the public repositories: PyTorch's own ops and `public_optimizer.py`. `fused` is ours. Weights that start at zero are
made random, since products of zeros run faster than training does.
"""

from __future__ import annotations

import copy
import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from sra2_fast import SiT, SRA2Loss, backends, recipe
from sra2_fast.data import Batch
from sra2_fast.errors import InputError, must_be
from sra2_fast.models import compile_blocks, model_sizes
from sra2_fast.optim import AdamWEMA
from sra2_fast.train.allocator import keep_freed_memory
from sra2_fast.train.diagnosis import StepHistory
from sra2_fast.train.step import TrainStep

from .counting import count_parameters, projector_forward_flops, sit_forward_flops, training_flops
from .outcome import WrongStep
from .public_optimizer import PublicOptimizer
from .timing import peak_memory_bytes

METHODS = {  # row: what is aligned with what, and how
    "baseline": ("vae", None),
    "sra2-cosine": ("vae", "cosine"),
    "sra2-smooth-l1": ("vae", "smooth_l1"),
    "sra": ("teacher", "cosine"),
    "repa": ("features", "cosine"),
}
ROWS = tuple(METHODS)
PRECISIONS = ("fp32", "tf32", "bf16")
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
UNIT_ROUNDOFF = {"fp32": 2.0**-24, "tf32": 2.0**-11, "bf16": 2.0**-8}
BATCHES = 4
LOG_EVERY = 50  # steps whose figures are kept on the device, as the trainer's default has it
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
    attention: str = "auto"  # a backend of `backends.ATTENTION`
    is_captured: bool = False  # ours as one CUDA graph

    def config(self) -> dict[str, Any]:
        """The model's configuration, projector left out. Raises InputError for one that cannot be built."""
        with torch.device("meta"):
            return SiT(**self._arguments()).config()

    def build(self, method: tuple[str, str | None], feature_dim: int) -> SiT:
        """The model of a row, training, its weights drawn on the device: a CPU takes ten seconds over SiT-XL/2's."""
        target, align = method
        sizes = self._arguments()
        if align is not None:
            sizes["align_depth"] = recipe.align_depth(self.model, sizes["depth"], target)
            sizes.update(recipe.projector(target, sizes["hidden_size"], feature_dim))
        with self.device:
            return SiT(**sizes).train()

    def _arguments(self) -> dict[str, Any]:
        return dict(model_sizes(self.model, "step_time"), learn_sigma=False, implementation=self.implementation)


def add_setting_arguments(parser: ArgumentParser, cpu_batch_size: int) -> None:
    """The options that make a Setting."""
    parser.add_argument("--model", help="registry name or 'D,depth,heads,patch' [SiT-S/2; on a GPU SiT-XL/2]")
    parser.add_argument("--batch-size", type=int, help=f"images a step [{cpu_batch_size}; on a GPU 32]")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    compiled = "torch.compile the networks [on a GPU, as training does]"
    parser.add_argument("--compile", action=BooleanOptionalAction, default=None, help=compiled)
    parser.add_argument("--graph", action="store_true", help="on a GPU: our step as one CUDA graph")
    add_attention_argument(parser)
    parser.add_argument("--device", help="cpu or cuda [cuda where there is one]")
    parser.add_argument("--steps", type=int, help="timed rounds, one step of each")
    parser.add_argument("--json", metavar="FILE", help="append the records as JSON lines")
    parser.set_defaults(cpu_batch_size=cpu_batch_size)


def add_attention_argument(parser: ArgumentParser) -> None:
    names = dict.fromkeys(name for names in backends.ATTENTION.values() for name in names)
    parser.add_argument("--attention", choices=("auto", *names), default="auto", help="[auto: the fastest]")


def resolve_setting(args: Namespace, op: str, implementation: str | None, rounds: tuple[int, int]) -> Setting:
    """The Setting, and args.steps, with every default filled in; rounds: of a CPU and of a GPU.

    Raises InputError naming the option, for a missing device, precision or kernel, or a model that cannot be built.
    """
    has_gpu = torch.cuda.is_available()
    name = args.device or ("cuda" if has_gpu else "cpu")
    if name not in ("cpu", "cuda"):
        raise must_be(op, "--device", "cpu or cuda", name)
    if name == "cuda" and not has_gpu:
        raise InputError(f"{op}: --device cuda: torch sees no GPU here; leave the option out or use cpu")
    on_gpu = name == "cuda"
    batch_size = (32 if on_gpu else args.cpu_batch_size) if args.batch_size is None else args.batch_size
    args.steps = rounds[on_gpu] if args.steps is None else args.steps
    for option, value in (("--batch-size", batch_size), ("--steps", args.steps)):
        if value < 1:
            raise must_be(op, option, "1 or more", value)
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if backends.is_bf16_fast(name) else "fp32"
    if precision == "tf32" and not on_gpu:
        raise InputError(f"{op}: --precision tf32 is for a GPU; use fp32 or bf16 on the CPU")
    model = args.model or ("SiT-XL/2" if on_gpu else "SiT-S/2")
    chosen = chosen_implementation(implementation, name, op)
    backends.check_attention(op, "--attention", args.attention, name, precision == "bf16")
    is_compiled = on_gpu if args.compile is None else args.compile
    if args.graph and not on_gpu:
        raise InputError(f"{op}: --graph captures a CUDA graph, a CPU has none; leave it out")
    setting = Setting(
        model, batch_size, precision, chosen, is_compiled, torch.device(name), args.attention, is_captured=args.graph
    )
    setting.config()
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    return setting


def chosen_implementation(asked: str | None, device_type: str, op: str) -> str:
    """`fused` where its kernels are there, else `eager`, with a line that says so.

    Raises InputError where `fused` was asked for and is not there.
    """
    choice = backends.choose("layer_norm_modulate", device_type)
    if choice.backend != backends.PYTORCH or asked == "eager":
        return asked or "fused"
    missing = f"on {device_type} there are no kernels ({choice.why_not_better})"
    if asked == "fused":
        raise InputError(f"{op}: --implementation fused: {missing}; use eager")
    print(f"{op}: {missing}; measuring --implementation eager", file=sys.stderr)
    return "eager"


def make_batches(setting: Setting, with_images: bool, seed: int = 0) -> list[Batch]:
    """A few random batches, the same for every row; images are uint8, 16 pixels a token."""
    config, generator = setting.config(), torch.Generator().manual_seed(seed)
    b, channels, side = setting.batch_size, config["in_channels"], config["input_size"]
    pixels = 16 * (side // config["patch_size"])

    def draw() -> Batch:
        latents, noise = torch.randn(2, b, channels, side, side, generator=generator)
        uniform = torch.rand(4, b, generator=generator)
        labels = torch.randint(0, config["num_classes"], (b,), generator=generator)
        images = torch.randint(0, 256, (b, 3, pixels, pixels), dtype=torch.uint8, generator=generator)
        batch = Batch(latents, labels, noise, *uniform, images=images if with_images else None)
        return batch.map(lambda tensor: tensor.to(setting.device))

    return [draw() for _ in range(BATCHES)]


class StepRow:
    """One row: calling it runs one training step on the next batch and returns its 0-d loss, without synchronising.

    Raises InputError for a model that cannot be built.
    """

    def __init__(self, row: str, setting: Setting, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.row, self.setting = row, setting
        target, align = METHODS[row]
        config = setting.config()
        grid = config["input_size"] // config["patch_size"]
        self.encoder: Any = None
        frozen_flops = feature_dim = 0
        if target == "features":
            from .dinov2 import HIDDEN_SIZE, DINOv2Encoder

            feature_dim = HIDDEN_SIZE
            with setting.device:
                self.encoder = DINOv2Encoder(grid)
            frozen_flops = self.encoder.forward_flops()
        self.sit = setting.build(METHODS[row], feature_dim)
        fill_zeros(self.sit)
        if target == "teacher":
            blocks = recipe.teacher_depth(config["depth"], self.sit.align_depth or 0)
            frozen_flops = sit_forward_flops(config, stop_at_block=blocks)
        self.params_head = count_parameters(self.sit.projector)
        self.params_external = count_parameters(self.encoder)
        head_flops = projector_forward_flops(self.sit.projector, grid * grid)
        self.flops_per_image = training_flops(sit_forward_flops(config) + head_flops, frozen_flops)
        self.batches = make_batches(setting, with_images=self.encoder is not None)
        if setting.device.type == "cpu":
            keep_freed_memory()  # as sra2-fast train does; it helps every row and implementation
        self.optimizer: Any = self._optimizer()
        self.average = self._average() if target == "teacher" else getattr(self.optimizer, "average", None)
        self.step = TrainStep(
            self._compiled(self.sit),
            SRA2Loss(align=align, target=target),
            self.optimizer,
            StepHistory(LOG_EVERY, setting.device),
            device=setting.device,
            schedule=recipe.UpdateSchedule(),
            autocast_dtype=torch.bfloat16 if setting.precision == "bf16" else None,
            label_dropout=config["class_dropout_prob"],
            teacher=self._compiled(self.average) if target == "teacher" else None,
            encoder=self._compiled(self.encoder),
            attention=setting.attention,
            graph=setting.is_captured and setting.implementation == "fused",
        )
        self.chosen = self.step.choose(setting.batch_size)

    def _compiled(self, network: Any) -> Any:
        """As training has it, block by block; what is public is compiled as a whole, the strongest rival."""
        if not self.setting.is_compiled or network is None:
            return network
        is_ours = isinstance(network, SiT) and self.setting.implementation == "fused"
        return compile_blocks(network) if is_ours else torch.compile(network)

    def _optimizer(self) -> AdamWEMA | PublicOptimizer:
        if self.setting.implementation == "eager":
            return PublicOptimizer(self.sit)
        named = [(name, p) for name, p in self.sit.named_parameters() if p.requires_grad]
        return AdamWEMA(named, lr=recipe.LR, ema_decay=recipe.EMA_DECAY, max_grad_norm=recipe.MAX_GRAD_NORM)

    def _average(self) -> SiT:
        """The teacher: the public optimizer's copy, or a view of ours' averages, which move it."""
        if isinstance(self.optimizer, PublicOptimizer):
            return self.optimizer.average  # type: ignore[return-value]
        average = copy.deepcopy(self.sit).requires_grad_(False)
        average.load_state_dict(self.optimizer.ema_state_dict(), strict=False, assign=True)
        return average.requires_grad_(False)

    def __call__(self) -> torch.Tensor:
        if len(self.step.history) == LOG_EVERY:
            self.step.history.clear()
        return self.step([self.batches[self.step.step % len(self.batches)]]).total

    def about(self) -> dict[str, object]:
        """What was timed, as every JSON line of a step has it."""
        setting = self.setting
        return {
            "row": self.row,
            "model": setting.model,
            "batch_size": setting.batch_size,
            "implementation": setting.implementation,
            "precision": setting.precision,
            "compiled": setting.is_compiled,
            "attention": self.step.choices.get("attention"),
            "captured": setting.is_captured,
        }

    def persistent_bytes(self) -> int:
        """Bytes that live between steps: weights, averages, moments, encoder, batches; each storage once."""
        tensors = [*self._module_tensors(), *(tensor for batch in self.batches for tensor in batch)]
        for state in self.optimizer.state.values():
            tensors += state.values()
        shadows = getattr(self.optimizer, "shadows", None)
        tensors += [] if shadows is None else [leaf for _, leaf in shadows.items()]
        storages = {}
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def _module_tensors(self) -> Iterator[torch.Tensor]:
        for module in (self.sit, self.encoder, self.average):
            if module is not None:
                yield from module.parameters()
                yield from module.buffers()

    def check(self) -> None:
        """Hold the step's loss and gradient norm to a float32 eager model of the same weights; before the first step.

        Raises WrongStep where they differ by more than the precision explains. Skipped for what is that model.
        """
        setting = self.setting
        if (setting.implementation, setting.precision, setting.is_compiled) == ("eager", "fp32", False):
            return
        want_loss, want_norm = self.reference()
        with self.step.weights():
            got = self.step.losses(self.step.network, self.batches[0], 0).total
            got.backward()
        norm = grad_norm(self.sit, getattr(self.optimizer, "grad_of", None))
        self.optimizer.zero_grad(set_to_none=True)
        limit = self.allowed_error()
        for what, value, want in (("loss", float(got.detach()), want_loss), ("gradient norm", norm, want_norm)):
            if not abs(value - want) <= limit * abs(want):  # written so that NaN fails
                raise WrongStep(
                    f"row {self.row}: {what} is {value:.6g}, a float32 eager model says {want:.6g}; "
                    f"allowed is a relative difference of {limit:.1e}"
                )

    def allowed_error(self) -> float:
        """Twice 0.42 u sqrt(k) for k roundings (docs/style.md, "Tests"), and float32 sums over the widest layer."""
        config = self.sit.config()
        roundings = ROUNDINGS_A_BLOCK * config["depth"]
        summed = config["hidden_size"] * config["mlp_ratio"]
        return 2 * 0.42 * UNIT_ROUNDOFF[self.setting.precision] * roundings**0.5 + 2 * 2.0**-24 * summed**0.5

    def reference(self) -> tuple[float, float]:
        """Loss and gradient norm of the first batch in float32 and eager, two samples at a time to save memory."""
        with torch.device("meta"):
            reference = SiT(**{**self.sit.config(), "implementation": "eager"}).train()
        reference.load_state_dict(self.sit.state_dict(), assign=True)  # the same memory; gradients of its own
        plain = copy.copy(self.step)
        plain.autocast_dtype, plain.encoder = None, self.encoder
        plain.teacher = None if self.step.teacher is None else reference
        matmul_precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        total, count = 0.0, self.setting.batch_size
        try:
            for start in range(0, count, 2):
                part = self.batches[0].map(lambda tensor, start=start: tensor[start : start + 2])  # type: ignore[misc]
                loss = plain.losses(reference, part, 0).total * (len(part.labels) / count)
                loss.backward()
                total += float(loss.detach())
        finally:
            torch.set_float32_matmul_precision(matmul_precision)
        return total, grad_norm(reference)

    def check_after(self, last_loss: torch.Tensor) -> None:
        """Raises WrongStep unless the last loss and all weights are finite and the weights have moved."""
        if not bool(torch.isfinite(last_loss)):
            raise WrongStep(f"row {self.row}: the loss became {float(last_loss)}")
        weight = self.sit.final_layer.linear.weight
        if not bool(torch.isfinite(weight).all()) or not bool((weight != self._weight_before).any()):
            raise WrongStep(f"row {self.row}: the timed steps did not train the model")

    def remember(self) -> None:
        """Keep one weight, so that `check_after` sees whether the steps trained."""
        self._weight_before = self.sit.final_layer.linear.weight.detach().clone()


def prepared(row: str, setting: Setting, doing: Callable[[str], None]) -> tuple[StepRow, int]:
    """The row, checked, after its first steps: compiled, its optimizer's state there; and its peak memory in bytes.

    doing: told what begins.
    """
    name = f"row {row}, {setting.implementation}"
    doing(f"{name}, building")
    step = StepRow(row, setting)
    doing(f"{name}, checking against the float32 model")
    step.check()
    step.remember()
    doing(f"{name}, first step")
    step()
    doing(f"{name}, memory")
    return step, step.persistent_bytes() + peak_memory_bytes(step, setting.device)


def ways_to_be_faster(setting: Setting) -> str:
    """What to tell who waits."""
    is_emulated = setting.precision == "bf16" and not backends.is_bf16_fast(setting.device)
    precision = "--precision fp32 (this machine emulates bf16), " if is_emulated else ""
    return precision + "a smaller --batch-size or --model, fewer rows or --steps"


def fill_zeros(model: nn.Module) -> None:
    """N(0, 0.02) into every trained parameter that is all zeros (adaLN, output layer, biases); fake ones are left."""
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad and not isinstance(param, FakeTensor) and not bool(param.any()):
                param.normal_(std=0.02)


def grad_norm(model: nn.Module, grad_of: Callable[[torch.Tensor], torch.Tensor | None] | None = None) -> float:
    """The norm of all gradients, summed in float64; grad_of: where a parameter's gradient stands, if not in `grad`."""
    grads = [p.grad if grad_of is None else grad_of(p) for p in model.parameters()]
    squares = [grad.double().square().sum() for grad in grads if grad is not None]
    return float(torch.stack(squares).sum().sqrt())
