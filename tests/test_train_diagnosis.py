"""Losses and gradients that are not finite: noticed late, named, and the weights are those of before."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import final, records, tiny

from sra2_fast.train.diagnosis import Fetch, NonFiniteLoss, StepHistory, name_terms
from sra2_fast.train.loop import Trainer, train

pytestmark = pytest.mark.training


def test_a_loss_that_is_not_finite_stops_the_run_with_the_weights_of_before(trainer: Callable[..., Trainer]) -> None:
    """lr 1e30 makes weights of 1e30 in step 1, so the loss of step 2 overflows; the host looks at step 10 only."""
    good = trainer("good", lr=1e30, steps=1)
    good.train()
    bad = trainer("bad", lr=1e30)
    message = r"step 2: velocity.* is not finite \(.*\); .*; largest \|activation\| by block: 1:\S+ 2:\S+ 3:\S+; try"
    with pytest.raises(NonFiniteLoss, match=message) as caught:
        bad.train()
    assert "\n" not in str(caught.value)
    assert bad.step == 10
    for one, other in zip(good.model.parameters(), bad.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not (bad.directory.checkpoints).exists()


def test_the_checkpoint_before_a_bad_loss_is_intact_and_named(tmp_path: Path) -> None:
    train(tiny(tmp_path, steps=20))
    saved = {path.name: path.read_bytes() for path in final(tmp_path, 20).iterdir()}
    resumed = tiny(tmp_path, lr=1e30, resume=str(final(tmp_path, 20)))
    with pytest.raises(NonFiniteLoss, match=r"step 22: .*go on from .*step-00000020 with --resume and a lower --lr"):
        train(resumed)
    assert {path.name: path.read_bytes() for path in final(tmp_path, 20).iterdir()} == saved
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000020"]


def test_an_infinite_gradient_is_named_as_such(trainer: Callable[..., Trainer]) -> None:
    run = trainer()
    weight = run.model.final_layer.linear.weight
    weight.register_hook(lambda gradient: gradient * math.inf if run.step == 4 else gradient)
    with pytest.raises(
        NonFiniteLoss,
        match=r"step 5: gradient is not finite \(velocity 1\.\d+, align -0\.\d+, gradient norm (nan|inf)\)",
    ):
        run.train()


def test_an_infinite_alignment_is_named_as_such(trainer: Callable[..., Trainer]) -> None:
    run = trainer()
    real = run.take_step.loss_fn

    class Spoiled:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def __call__(self, *args: Any, step: int, **kwargs: Any) -> Any:
            out = real(*args, step=step, **kwargs)
            return out if step != 12 else out._replace(total=out.total + math.inf, align=out.align + math.inf)

    run.take_step.loss_fn = Spoiled()  # type: ignore[assignment]
    with pytest.raises(NonFiniteLoss, match=r"step 13: align is not finite"):
        run.train()
    assert [record["step"] for record in records(Path(run.options.out))] == [10]


def test_the_flag_multiplies_gradients_by_exactly_one_until_it_is_set() -> None:
    history = StepHistory(4, torch.device("cpu"))
    weight = torch.randn(5, requires_grad=True)
    history.backward(weight.square().sum())
    assert weight.grad is not None and torch.equal(weight.grad, 2 * weight.detach())
    history.record(*torch.tensor([1.0, 2.0, math.inf]))
    history.record(*torch.tensor([1.0, 2.0, 3.0]))
    weight.grad = None
    history.backward(weight.square().sum())
    assert weight.grad is not None and weight.grad.isnan().all()
    assert history.read() == [[1.0, 2.0, math.inf], [1.0, 2.0, 3.0]]


def test_terms_are_named_by_their_loss_first() -> None:
    nan = math.nan
    assert name_terms([nan, nan, nan]) == "velocity and align"
    assert name_terms([1.0, nan, nan]) == "align"
    assert name_terms([1.0, 1.0, nan]) == "gradient"


class Late(Fetch):
    """Figures that arrive some steps after they were sent for, as a GPU's do; on a CPU they are here at once."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__(rows)
        self.polls = 0

    def has_arrived(self) -> bool:
        self.polls += 1
        return self.polls > 3


@pytest.mark.parametrize("options", [{}, {"checkpoint_every": 7}, {"log_every": 2}], ids=str)
def test_figures_that_arrive_late_are_the_same_metrics(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same order, each once; a checkpoint and a log point wait for those before them."""
    train(tiny(tmp_path / "at once", steps=12, **options))
    monkeypatch.setattr("sra2_fast.train.diagnosis.Fetch", Late)
    train(tiny(tmp_path / "late", steps=12, **options))
    at_once, late = (
        [{k: v for k, v in one.items() if k != "images_per_s"} for one in records(tmp_path / name)]
        for name in ("at once", "late")
    )
    assert at_once == late and at_once[-1]["step"] == 12


def test_a_loss_that_is_not_finite_is_found_late_with_the_weights_of_before(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sra2_fast.train.diagnosis.Fetch", Late)
    good = trainer("good", lr=1e30, steps=1)
    good.train()
    bad = trainer("bad", lr=1e30, steps=20)
    with pytest.raises(NonFiniteLoss, match=r"step 2: velocity"):
        bad.train()
    assert bad.step == 13  # the log point after step 10 arrived after three more
    for one, other in zip(good.model.parameters(), bad.model.parameters(), strict=True):
        assert torch.equal(one, other)
