"""Signals: a step or a sampler step later the run is saved, whatever was under way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import assert_same_checkpoint, final, tiny

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
    assert f"{number.name}: finishing step 12 and saving" in told.err, "it is step 12's grid, not step 13"
    assert f"{number.name} after step 12: saved {result.checkpoint}" in told.out
    assert "left out the samples of step 12" in told.out
    assert not (tmp_path / "run" / "samples").exists()
    for parameter, average in zip(run.model.parameters(), run.optimizer.ema_state_dict().values(), strict=True):
        assert parameter.requires_grad is False or not torch.equal(parameter, average)  # its own weights are back
    run.directory.close()
    train(tiny(tmp_path / "run"))
    train(tiny(tmp_path / "whole"))
    assert_same_checkpoint(final(tmp_path / "run"), final(tmp_path / "whole"))


def test_a_signal_while_the_pictures_are_decoded_is_answered_after_a_few(
    trainer: Callable[..., Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All forty went through the autoencoder first: minutes on a CPU."""
    run = trainer(sample_every=12, sample_steps=1)
    decode, decoded = run.grid._decode, []

    def decode_slowly(latents: torch.Tensor) -> Any:
        decoded.append(len(latents))
        os.kill(os.getpid(), signal.SIGINT)
        return decode(latents)

    run.grid._decode = decode_slowly
    assert run.train().checkpoint == final(tmp_path / "run", 12)
    assert decoded == [8] and "left out the samples of step 12" in capsys.readouterr().out


def test_sigterm_to_the_whole_group_reaches_the_workers_too_and_the_step_is_saved(tmp_path: Path, root: Path) -> None:
    """As Slurm sends it: the workers died of it, and the run of a traceback, with nothing saved."""
    command = [sys.executable, "-m", "sra2_fast", "train", "--model", "16,2,2,4", "--out", str(tmp_path)]
    command += ["--steps", "1000000", "--batch-size", "8", "--log-every", "5", "--sample-every", "0"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        [*command, "--workers", "2", "--device", "cpu"], env=environment, start_new_session=True, **pipes
    )
    metrics, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 90
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "SIGTERM after step" in out and "Traceback" not in err
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


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
    with Interrupt(lambda: 8) as interrupt:
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
    assert "no samples of step 1: " in told and "no samples of step 2: " in told
