"""TensorBoard is optional in deed: its records are read by TensorBoard, and its failures cost a line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from training_runs import final, tiny

from sra2_fast.train.loop import train
from sra2_fast.train.scalars import Scalars

pytestmark = pytest.mark.training

pytest.importorskip("tensorboard")


def read_back(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_what_is_written(tmp_path: Path) -> None:
    """Records of a run that went further and was resumed earlier are purged, as its own writer has it."""
    first = Scalars(tmp_path, 1)
    for step in (10, 20, 30):
        first.log({"step": step, "loss": step / 8, "lr": 0.5})
    second = Scalars(tmp_path, 21)
    second.log({"step": 30, "loss": 9.0, "lr": 0.25})
    assert read_back(tmp_path) == {"loss": [(10, 1.25), (20, 2.5), (30, 9.0)], "lr": [(10, 0.5), (20, 0.5), (30, 0.25)]}


def test_a_run_writes_every_number_of_its_records(tmp_path: Path) -> None:
    train(tiny(tmp_path, steps=10, log_every=5))
    found = read_back(tmp_path / "tensorboard")
    assert {"loss", "velocity", "align", "grad_norm", "lr", "images_per_s"} <= set(found)
    assert [step for step, _ in found["loss"]] == [5, 10]


def test_a_folder_that_vanished_is_made_again(tmp_path: Path) -> None:
    scalars = Scalars(tmp_path / "tensorboard", 1)
    shutil.rmtree(tmp_path / "tensorboard")
    scalars.log({"step": 5, "loss": 1.0})
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_folder_that_cannot_be_written_costs_one_line_and_not_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It was ninety lines of traceback from a thread, and the end of the run."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "tensorboard").write_text("a file where the folder should be")
    result = train(tiny(out, steps=10, log_every=2))
    assert result.exit_code == 0 and result.checkpoint == final(out, 10)
    told = capfd.readouterr()
    assert told.out.count("no more TensorBoard") == 1 and "metrics.jsonl goes on" in told.out
    assert "Traceback" not in told.out + told.err
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 5


def test_a_full_disk_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scalars = Scalars(tmp_path, 1)
    scalars.path = Path("/dev/full")
    for step in (1, 2, 3):
        scalars.log({"step": step, "loss": 1.0})
    assert capsys.readouterr().out.count("no more TensorBoard: /dev/full (No space left on device)") == 1
