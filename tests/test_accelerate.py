"""SiT, SRA2Loss and AdamWEMA under accelerate: prepare, accumulate, clip_grad_norm_ and save_state give our losses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_transformer import aligner_of, transformer
from models import small_model
from tolerance import allowed

from sra2_fast import SiT, SRA2Loss
from sra2_fast.data import Batch, make_loader, open_data
from sra2_fast.ops.patchify import patchify
from sra2_fast.optim import AdamWEMA
from sra2_fast.train.diagnosis import StepHistory
from sra2_fast.train.step import TrainStep

accelerate = pytest.importorskip("accelerate")
pytestmark = [pytest.mark.slow, pytest.mark.training]

STEPS = 4
SETTINGS: dict[str, Any] = {"lr": 1e-2, "ema_decay": 0.9}
DROPOUT = 0.25


@pytest.fixture(autouse=True)
def _state_of_its_own() -> Iterator[None]:
    """accelerate keeps its settings in the process; another precision is refused until they are forgotten."""
    accelerate.state.AcceleratorState._reset_state(True)
    yield
    accelerate.state.AcceleratorState._reset_state(True)


@pytest.fixture
def batches() -> list[Batch]:
    return list(make_loader(open_data("digits"), batch_size=8, seed=0, num_steps=STEPS))


def model() -> SiT:
    return small_model(in_channels=1, align_depth=1, learn_sigma=False, class_dropout_prob=DROPOUT).train()


def accelerated(
    batches: list[Batch],
    out: Path | None = None,
    *,
    precision: str = "no",
    clip: str = "accelerate",
    resume: bool = False,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of a loop as accelerate's users write it, two microbatches a step, and the averaged weights."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    net, loss_fn = model(), SRA2Loss()
    optimizer = AdamWEMA(net.named_parameters(), max_grad_norm=1.0 if clip == "own" else None, **SETTINGS)
    prepared, wrapped = accelerator.prepare(net, optimizer)
    if resume:
        accelerator.load_state(str(out))
    history = []
    for batch in batches:
        for part in batch.split(4):
            uniforms = {"time_uniform": part.time_uniform, "label_uniform": part.label_uniform}
            draws = loss_fn.draws(part.latents, DROPOUT, noise=part.noise, **uniforms)
            with accelerator.accumulate(prepared):
                losses = loss_fn(prepared, part.latents, part.labels, **draws._asdict())
                accelerator.backward(losses.total)
                if accelerator.sync_gradients and clip == "accelerate":
                    accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                wrapped.step()
                wrapped.zero_grad()
            history.append(losses.total.item())
    if out is not None and not resume:
        accelerator.save_state(str(out))
    return history, {name: value.clone() for name, value in optimizer.ema_state_dict().items()}


def ours(batches: list[Batch], precision: str = "no") -> tuple[list[float], dict[str, torch.Tensor]]:
    """The trainer's own step on the same batches: the mean loss of each, and the averaged weights."""
    net, device = model(), torch.device("cpu")
    optimizer = AdamWEMA(net.named_parameters(), max_grad_norm=1.0, **SETTINGS)
    dtype = torch.bfloat16 if precision == "bf16" else None
    step = TrainStep(
        net,
        SRA2Loss(),
        optimizer,
        StepHistory(STEPS, device),
        device=device,
        autocast_dtype=dtype,
        label_dropout=DROPOUT,
    )
    return [step(batch.split(4)).total.item() for batch in batches], optimizer.ema_state_dict()


def assert_same_losses(got: list[float], want: list[float]) -> None:
    """The mean of two microbatches; after each step weights differ by the rounding of the clip's factor and AdamW."""
    for first, second, total in zip(got[::2], got[1::2], want, strict=True):
        assert (first + second) / 2 == pytest.approx(total, rel=allowed(torch.float32, 8 * STEPS, row_size=1))


def test_the_losses_are_ours(batches: list[Batch]) -> None:
    assert_same_losses(accelerated(batches)[0], ours(batches)[0])


@pytest.mark.parametrize("precision", ("no", "bf16"))
def test_clipped_by_the_optimizer_everything_is_ours(batches: list[Batch], precision: str) -> None:
    """accelerate's autocast lies around the model's forward, in which the loss is computed; targets stay float32."""
    got, want = accelerated(batches, precision=precision, clip="own"), ours(batches, precision)
    assert_same_losses(got[0], want[0])
    for name, value in want[1].items():
        assert torch.equal(got[1][name], value), name


def test_without_the_clip_they_would_not_be(batches: list[Batch]) -> None:
    with pytest.raises(AssertionError):
        assert_same_losses(accelerated(batches, clip="none")[0], ours(batches)[0])


def test_save_state_and_load_state_go_on_bitwise(batches: list[Batch], tmp_path: Path) -> None:
    whole = accelerated(batches)
    first = accelerated(batches[:2], tmp_path)
    second = accelerated(batches[2:], tmp_path, resume=True)
    assert first[0] + second[0] == whole[0]
    for name, value in whole[1].items():
        assert torch.equal(second[1][name], value), name


@pytest.mark.parametrize("precision", ("no", "bf16"))
def test_an_aligner_is_prepared_like_a_model(precision: str) -> None:
    """Its loss and gradients with accelerate's autocast around the model and around itself are those of the loop."""
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    z, found = torch.randn(3, 4, 8, 8), []
    for is_prepared in (False, True):
        net = transformer()
        aligner = aligner_of(net)
        optimizer = torch.optim.AdamW([*net.parameters(), *aligner.parameters()])
        called: Any = (net, aligner)
        if is_prepared:
            *called, optimizer = accelerator.prepare(net, aligner, optimizer)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16" and not is_prepared):
            losses = called[1](z, called[0](z), patchify(z.flip(0), 2))
        accelerator.backward(losses.total)
        found.append([losses.total.detach(), *(p.grad for one in (net, aligner) for p in one.parameters())])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want) if got is not None else want is None
