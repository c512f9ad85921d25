"""`SRA2Loss(reduction="none")`: the losses of each sample, for code that weights them."""

from __future__ import annotations

import copy

import pytest
import torch
from models import loss_batch, random_model, small_model
from recorded.recording import assert_same
from tolerance import assert_close

from sra2_fast import SRA2Loss
from sra2_fast.errors import InputError


def each_alone(loss_fn: SRA2Loss, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The losses of every sample as a batch of its own."""
    count = len(batch["labels"])
    parts = [loss_fn(model, **{name: one[k : k + 1] for name, one in batch.items()}) for k in range(count)]
    return [torch.stack(values) for values in zip(*parts, strict=True)]


@pytest.mark.parametrize("align", ("cosine", "smooth_l1", "mse", "l1", None))
def test_a_sample_s_losses_are_those_of_a_batch_of_that_sample(align: str | None) -> None:
    model, batch = random_model().eval(), loss_batch()
    losses = SRA2Loss(align=align, reduction="none")(model, **batch)
    for got, want in zip(losses, each_alone(SRA2Loss(align=align), model, batch), strict=True):
        assert got.shape == (3,) and got.dtype == want.dtype
        assert_close(got, want, torch.float64, roundings=64)
    assert len(set(losses.velocity.tolist())) == 3  # or the test could not tell samples apart


@pytest.mark.parametrize("target", ("features", "teacher"))
def test_other_targets_have_them_too(target: str) -> None:
    width = 20 if target == "features" else 48
    model, batch = random_model(projection_dim=width).eval(), loss_batch()
    given = {"features": torch.randn(3, 16, 20).double()} if target == "features" else {"teacher": copy.deepcopy(model)}
    if target == "teacher":
        batch["teacher_gap"] = torch.tensor([0.1, 0.2, 0.0], dtype=torch.float64)
    single = SRA2Loss(target=target, reduction="none")(model, **batch, **given)
    mean = SRA2Loss(target=target)(model, **batch, **given)
    for got, want in zip(single, mean, strict=True):
        assert got.shape == (3,)
        assert_close(got.mean(), want, torch.float64, roundings=64)


@pytest.mark.parametrize("implementation", ("eager", "fused"))
def test_weighted_gradients_are_the_weighted_sum_of_the_samples_gradients(implementation: str) -> None:
    model = small_model(implementation=implementation, align_depth=2, learn_sigma=False).eval()
    batch = {name: one.float() if one.is_floating_point() else one for name, one in loss_batch().items()}
    weights = torch.tensor([0.5, 0.0, 2.0])
    total = SRA2Loss(reduction="none")(model, **batch).total
    (total * weights).sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for k in (0, 2):
        one = SRA2Loss()(model, **{name: value[k : k + 1] for name, value in batch.items()})
        (one.total * weights[k]).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None
            assert_same(got[name], p.grad.double(), name)


def test_an_unknown_reduction_is_named() -> None:
    with pytest.raises(InputError, match=r"SRA2Loss: reduction must be mean or none, got 'sum'"):
        SRA2Loss(reduction="sum")
