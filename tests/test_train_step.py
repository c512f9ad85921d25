"""The one training step: microbatches add up to the batch, and the figures are the losses'."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import small_model
from tolerance import allowed, relative_error

from sra2_fast import SRA2Loss
from sra2_fast.data import Batch
from sra2_fast.optim import AdamWEMA
from sra2_fast.recipe import UpdateSchedule
from sra2_fast.train.diagnosis import StepHistory
from sra2_fast.train.step import StepResult, TrainStep

pytestmark = pytest.mark.training

CPU = torch.device("cpu")


def make_batch(size: int = 8, seed: int = 3) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, size, 4, 8, 8, generator=draw)
    uniform = torch.rand(4, size, generator=draw)
    return Batch(latents, torch.randint(10, (size,), generator=draw), noise, *uniform)


def make_step(**changes: Any) -> TrainStep:
    model = small_model(learn_sigma=False, align_depth=1, projector_layers=2)
    optimizer = AdamWEMA(model.named_parameters(), lr=1e-3, ema_decay=0.9)
    settings = {"device": CPU, "label_dropout": 0.3, **changes}
    return TrainStep(model, SRA2Loss(), optimizer, StepHistory(8, CPU), **settings)


def gradients_of(step: TrainStep, microbatches: list[Batch]) -> tuple[StepResult, dict[str, torch.Tensor]]:
    """The step's result, and the gradients its optimizer was given."""
    found: dict[str, torch.Tensor] = {}

    def note(optimizer: Any, args: Any, kwargs: Any) -> None:
        found.update({n: p.grad.clone() for n, p in step.network.named_parameters() if p.grad is not None})

    step.optimizer.register_step_pre_hook(note)
    return step(microbatches), found


@pytest.mark.parametrize("sizes", [(4, 4), (1, 2, 5)], ids=str)
def test_microbatches_give_the_gradient_of_the_batch(sizes: tuple[int, ...]) -> None:
    """Uneven ones too: each counts by its samples. Only the order of float32 sums differs."""
    batch = make_batch()
    whole, want = gradients_of(make_step(), [batch])
    ends = torch.tensor(sizes).cumsum(0).tolist()
    parts = [batch.map(lambda one, a=a, b=b: one[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    cut, got = gradients_of(make_step(), parts)
    for name, value in want.items():
        error, _ = relative_error(got[name], value.double())
        assert error < allowed(torch.float32, 8, 8 * 16), f"{name}: {error:.2e}"
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_figures_are_those_of_the_loss_and_are_kept() -> None:
    step, batch = make_step(), make_batch()
    losses = step.losses(step.network, batch, 0)
    result = step([batch])
    assert torch.equal(result.total, losses.total.detach()) and not result.total.requires_grad
    assert torch.equal(result.velocity, losses.velocity) and torch.equal(result.align, losses.align)
    assert torch.equal(result.grad_norm, step.optimizer.grad_norm) and float(result.grad_norm) > 0
    assert step.step == 1 and len(step.history) == 1
    assert step.history.read() == [[float(result.velocity), float(result.align), float(result.grad_norm)]]
    assert all(p.grad is None for p in step.network.parameters())


def test_the_schedule_sets_rate_and_decay_before_the_update() -> None:
    step = make_step(schedule=UpdateSchedule(lr=0.5, lr_warmup=4, ema_decay=0.9), step=1)
    step([make_batch()])
    group = step.optimizer.param_groups[0]
    assert group["lr"] == 0.25 and group["ema_decay"] == 3 / 12


def test_dropped_labels_are_those_of_the_batch() -> None:
    """The share of the step decides, not the model's own dropout: the keyed uniforms alone say which."""
    batch = make_batch()
    seen = []
    for share in (0.0, 0.3, 0.99):
        step = make_step(label_dropout=share)
        seen.append(float(step.losses(step.network, batch, 0).velocity))
    assert len(set(seen)) == 3


def test_autocast_covers_the_forward_only() -> None:
    step = make_step(autocast_dtype=torch.bfloat16)
    types = []
    step.network.blocks[0].attn.qkv.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    step([make_batch()])
    assert types == [torch.bfloat16] and not torch.is_autocast_enabled("cpu")
    assert all(p.dtype == torch.float32 for p in step.network.parameters())


def test_a_teacher_and_an_encoder_are_asked_once_a_microbatch() -> None:
    batch = make_batch()
    teacher = copy.deepcopy(small_model(learn_sigma=False)).eval()
    student = small_model(learn_sigma=False, align_depth=1, projector_layers=2, projection_dim=48)
    step = make_step(teacher=teacher)
    step.network, step.loss_fn = student, SRA2Loss(target="teacher", teacher_depth=2)
    assert step([batch]).align.isfinite()
    images = torch.zeros(8, 3, 4, 4, dtype=torch.uint8)
    asked: list[torch.Size] = []

    def encode(given: torch.Tensor) -> torch.Tensor:
        asked.append(given.shape)
        return torch.randn(len(given), 16, 48)

    step = make_step(encoder=encode)
    step.network, step.loss_fn = student, SRA2Loss(target="features")
    parts = [batch._replace(images=images).map(lambda one, i=i: one[4 * i : 4 * i + 4]) for i in range(2)]
    assert step(parts).align.isfinite() and asked == [(4, 3, 4, 4), (4, 3, 4, 4)]
