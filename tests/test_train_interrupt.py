"""Signals: a step or a sampler step later the run is saved, whatever was under way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_checkpoint, final, tiny

from sra2_fast.train.interrupt import Interrupt, Interrupted
from sra2_fast.train.loop import Trainer, train

pytestmark = pytest.mark.training


def signal_in_the_middle_of_a_grid(run: Trainer, number: signal.Signals) -> list[int]:
    """The signal comes at the third model call of the first grid; returns where the calls are counted."""
    calls: list[int] = []

    def count(module: torch.nn.Module, inputs: Any) -> None:
        if not module.training:
            calls.append(run.step)
            if len(calls) == 3:
                os.kill(os.getpid(), number)

    run.model.register_forward_pre_hook(count)
    return calls


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_grid_is_answered_and_the_step_saved(
    trainer: Callable[..., Trainer], tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    """The grid was drawn to its end, nothing was saved, and the line said "saved None"."""
    run = trainer(sample_every=12, sample_steps=50, sample_cfg=1.5)
    calls = signal_in_the_middle_of_a_grid(run, number)
    result = run.train()
    assert (result.step, result.exit_code) == (12, 128 + number)
    assert result.checkpoint == final(tmp_path / "run", 12) and result.checkpoint.is_dir()
    assert len(calls) == 3, "the model call in which it comes must be the last"
    told = capfd.readouterr()
    assert f"{number.name} after step 12: saved {result.checkpoint}" in told.out
    assert "left out the samples of step 12" in told.out
    assert not (tmp_path / "run" / "samples").exists()
    for parameter, average in zip(run.model.parameters(), run.optimizer.ema_state_dict().values(), strict=True):
        assert parameter.requires_grad is False or not torch.equal(parameter, average)  # its own weights are back
    run.directory.close()
    train(tiny(tmp_path / "run"))
    train(tiny(tmp_path / "whole"))
    assert_same_checkpoint(final(tmp_path / "run"), final(tmp_path / "whole"))


def test_a_step_that_is_saved_already_is_not_saved_again(
    trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal during the grid of a checkpoint step: the checkpoint was there before the grid began."""
    run = trainer(sample_every=12, checkpoint_every=12)
    signal_in_the_middle_of_a_grid(run, signal.SIGINT)
    written: list[int] = []
    real = run.optimizer.state_dict
    monkeypatch.setattr(run.optimizer, "state_dict", lambda: (written.append(run.step), real())[1])
    assert run.train().checkpoint == final(tmp_path / "run", 12)
    assert written == [12]


def test_the_first_signal_says_what_happens_and_the_second_acts(capfd: pytest.CaptureFixture[str]) -> None:
    with Interrupt(lambda: 7) as interrupt:
        interrupt.check()
        os.kill(os.getpid(), signal.SIGINT)
        assert "SIGINT: finishing step 8 and saving; again to leave at once" in capfd.readouterr().err
        with pytest.raises(Interrupted):
            interrupt.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_picture_that_cannot_be_written_costs_a_line_not_the_run(
    trainer: Callable[..., Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer(steps=2, sample_every=1, sample_steps=2)
    (tmp_path / "run" / "samples").write_text("a file where the folder should be")
    result = run.train()
    assert (result.step, result.exit_code) == (2, 0) and result.checkpoint == final(tmp_path / "run", 2)
    told = capsys.readouterr().out
    assert "no samples of step 1: train: " in told and "no samples of step 2: train: " in told
