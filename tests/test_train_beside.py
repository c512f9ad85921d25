"""What stands beside the training (loading processes, pictures, records) never costs the steps that were trained."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_runs import assert_same_checkpoint, final, records, tiny

from sra2_fast.checkpoints import list_checkpoints, load_checkpoint
from sra2_fast.errors import InputError, TemporaryFailure
from sra2_fast.train import loop
from sra2_fast.train.loop import Trainer, train
from sra2_fast.train.run_directory import RunDirectory

pytestmark = pytest.mark.training


@pytest.mark.slow
def test_a_loading_process_that_is_killed_in_a_save_costs_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's handler of SIGCHLD raised in the middle of the save, and the run ended with nothing saved."""
    real = loop.save_checkpoint

    def kill_and_save(*args: Any, **kwargs: Any) -> Path:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid or 0, signal.SIGKILL)
        time.sleep(0.2)
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "save_checkpoint", kill_and_save)
    match = r"data: a loading process was ended by SIGKILL, by the system if memory ran out; run the same command again"
    with pytest.raises(TemporaryFailure, match=match):
        train(tiny(tmp_path / "run", checkpoint_every=3, workers=1))
    monkeypatch.undo()
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert saved[0] == final(tmp_path / "run", 3)
    train(tiny(tmp_path / "run"))
    train(tiny(tmp_path / "whole"))
    assert_same_checkpoint(final(tmp_path / "run"), final(tmp_path / "whole"))
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_a_full_disk_for_the_metrics_costs_no_step_and_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: RunDirectory, record: dict[str, float]) -> None:
        if record["step"] == 20:
            raise InputError("train: metrics.jsonl cannot be written (No space left on device); free some space")
        write(self, record)

    write = RunDirectory.log
    monkeypatch.setattr(RunDirectory, "log", full)
    with pytest.raises(InputError, match=r"metrics.jsonl cannot be written"):
        train(tiny(tmp_path / "run"))
    assert f"saved {final(tmp_path / 'run', 20)} before leaving" in capsys.readouterr().out
    monkeypatch.undo()
    train(tiny(tmp_path / "run"))
    train(tiny(tmp_path / "whole"))
    assert_same_checkpoint(final(tmp_path / "run"), final(tmp_path / "whole"))
    assert records(tmp_path / "run") == records(tmp_path / "whole")


@pytest.mark.parametrize(
    "error", [RuntimeError("decoder failed\nin a page"), MemoryError(), OSError(errno.EIO, "I/O error")]
)
def test_a_picture_that_cannot_be_made_costs_a_line(
    trainer: Callable[..., Trainer], error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only those that could not be written did; an autoencoder's error ended the run."""
    run = trainer(steps=2, sample_every=1, sample_steps=1)

    def fail(latents: Any) -> Any:
        raise error

    run.grid._decode = fail
    assert run.train().step == 2
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no samples of step")]
    assert len(said) == 2 and said[0].startswith("no samples of step 1: ") and not said[0].endswith(": ")


def test_the_grid_that_a_kill_took_is_drawn_by_the_run_that_goes_on(tmp_path: Path) -> None:
    """It was never drawn: its checkpoint was there, and the run went on after it."""
    changes = {"sample_every": 2, "sample_steps": 1, "checkpoint_every": 2}
    train(tiny(tmp_path, steps=4, **changes))
    samples = tmp_path / "samples"
    whole = {path.name: path.read_bytes() for path in samples.iterdir()}
    assert sorted(whole) == ["step-00000002.png", "step-00000004.png"]
    (samples / "step-00000004.png").rename(samples / "step-00000004.png.partial")
    (samples / ".step-00000002.png.partial").touch()
    train(tiny(tmp_path, steps=4, **changes))  # it has all steps already
    assert {path.name: path.read_bytes() for path in samples.iterdir()} == whole
    (samples / "step-00000004.png").unlink()
    train(tiny(tmp_path, steps=5, **changes))
    assert (samples / "step-00000004.png").read_bytes() == whole["step-00000004.png"]
    (samples / "step-00000005.png").unlink()
    train(tiny(tmp_path / "branch", steps=6, resume=str(tmp_path), **changes))  # another run's checkpoint: not its own
    assert sorted(path.name for path in (tmp_path / "branch" / "samples").iterdir()) == ["step-00000006.png"]


def test_what_a_kill_left_half_written_is_removed(tmp_path: Path) -> None:
    for name in (".metrics.jsonl.partial", "config.json.partial", "samples/.step-00000001.png.partial"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    RunDirectory(tmp_path).close()
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".partial")]


def test_metrics_are_on_the_disk_before_the_checkpoint(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut could leave a checkpoint whose records were gone."""
    run = trainer(steps=1)
    calls: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    run.train()
    names = [Path(call).name for call in calls]
    assert names.index("metrics.jsonl") < names.index("state.json")
    assert "config.json.partial" in names and load_checkpoint(run.checkpoint).step == 1
