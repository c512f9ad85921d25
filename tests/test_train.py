"""Training runs: cut in two they are bitwise one, they leave cleanly, and they stop at the first bad loss."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import TINY, around, assert_same_checkpoint, final, records, tiny

from sra2_fast.checkpoints import load_checkpoint
from sra2_fast.errors import InputError
from sra2_fast.pictures import HEADER
from sra2_fast.train import build, loop
from sra2_fast.train.loop import Trainer, train
from sra2_fast.train.step import TrainStep

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 steps in one go."""
    out = tmp_path_factory.mktemp("whole")
    train(tiny(out))
    return out


def test_twenty_and_twenty_steps_are_forty_bitwise(whole: Path, tmp_path: Path) -> None:
    train(tiny(tmp_path, steps=20))
    result = train(tiny(tmp_path))
    assert result.step == 40 and result.exit_code == 0
    assert_same_checkpoint(final(tmp_path), final(whole))
    assert records(tmp_path) == records(whole)
    assert [record["step"] for record in records(whole)] == [10, 20, 30, 40]


def test_a_run_killed_after_its_checkpoint_does_the_lost_steps_again(whole: Path, tmp_path: Path) -> None:
    """Metrics of steps past the checkpoint, and a half-written line and folder, are what a kill leaves."""
    train(tiny(tmp_path, steps=20))
    with open(tmp_path / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 30, "loss": 1.0}\n{"step": 40, "lo')
    (tmp_path / "checkpoints" / ".step-00000030.partial").mkdir()
    train(tiny(tmp_path))
    assert_same_checkpoint(final(tmp_path), final(whole))
    assert records(tmp_path) == records(whole)
    assert not (tmp_path / "checkpoints" / ".step-00000030.partial").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_was(
    whole: Path,
    trainer: Callable[..., Trainer],
    tmp_path: Path,
    number: signal.Signals,
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At step 23 of log intervals of 10: the losses of steps 21 to 23 must be in the record of step 30."""
    run = trainer()

    def signal_after(take_step: TrainStep, microbatches: Any) -> None:
        take_step(microbatches)
        if run.step == 23:
            os.kill(os.getpid(), number)

    run.take_step = around(run.take_step, signal_after)
    before = signal.getsignal(number)
    result = run.train()
    assert (result.step, result.exit_code) == (23, code)
    assert result.checkpoint == final(tmp_path / "run", 23)
    assert f"{number.name} after step 23: saved" in capsys.readouterr().out
    assert signal.getsignal(number) is before
    run.directory.close()
    train(tiny(tmp_path / "run"))
    assert_same_checkpoint(final(tmp_path / "run"), final(whole))
    assert records(tmp_path / "run") == records(whole)


def test_ctrl_c_in_a_terminal_leaves_with_130_and_one_line(tmp_path: Path, root: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sra2_fast.train",
        "--model",
        TINY.model,
        "--out",
        str(tmp_path),
        "--precision",
        "fp32",
    ]
    command += ["--steps", "1000000", "--batch-size", "8", "--log-every", "5", "--sample-every", "0", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "SIGINT after step" in out and "Traceback" not in err
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_log_points_may_move_when_a_run_goes_on(whole: Path, tmp_path: Path) -> None:
    """25 steps are unread in that checkpoint, more than the new log interval holds."""
    train(tiny(tmp_path / "run", log_every=30, checkpoint_every=25))
    train(tiny(tmp_path / "branch", resume=str(final(tmp_path / "run", 25))))
    assert_same_checkpoint(final(tmp_path / "branch"), final(whole))
    assert records(tmp_path / "branch") == records(whole)[2:]


def test_workers_change_no_number(whole: Path, tmp_path: Path) -> None:
    train(tiny(tmp_path, workers=2))
    assert_same_checkpoint(final(tmp_path), final(whole))


def test_a_finished_run_is_left_alone(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny(tmp_path, steps=20))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    result = train(tiny(tmp_path, steps=20))
    assert result.exit_code == 0 and result.last_record is None
    assert "has all 20 steps already; raise --steps to go on" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_the_run_folder_tells_what_ran(tmp_path: Path) -> None:
    train(
        tiny(tmp_path, steps=10, sample_every=5, sample_steps=2, checkpoint_every=4, keep_checkpoints=2, qk_norm=True)
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["options"]["align_depth"] == 1 and config["options"]["align_weight"] == 0.5
    assert config["options"]["seed"] == 0
    assert config["model"]["qk_norm"] is True and config["versions"]["torch"] == torch.__version__
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert record["loss"] == pytest.approx(record["velocity"] + 0.5 * record["align"], rel=1e-12)
    assert record["images"] == 80 and record["images_per_s"] > 0
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-00000005.png", "step-00000010.png"]
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000008", "step-00000010"]
    assert any((tmp_path / "tensorboard").iterdir())
    latents = load_checkpoint(final(tmp_path, 10)).state["latents"]
    numbers = {"shift": [8.0], "scale": [0.125], "white": 16.0}
    assert latents == {"kind": "grayscale", **numbers, "vae": None, "vae_fingerprint": None}


def test_samples_repeat_their_noise_and_labels(tmp_path: Path) -> None:
    """The same weights give the same picture, bit for bit; the run's own weights come back after drawing."""
    from PIL import Image

    for name in ("a", "b"):
        train(tiny(tmp_path / name, steps=2, sample_every=1, sample_steps=2, ema_decay=0.0))
    first = [(tmp_path / name / "samples" / "step-00000002.png").read_bytes() for name in ("a", "b")]
    assert first[0] == first[1]
    picture = Image.open(tmp_path / "a" / "samples" / "step-00000002.png")
    assert picture.size == (10 * (64 + 4), HEADER + 4 * (64 + 4))
    train(tiny(tmp_path / "c", steps=2, ema_decay=0.0))
    assert_same_checkpoint(final(tmp_path / "a", 2), final(tmp_path / "c", 2))


def test_no_step_waits_for_the_device(trainer: Callable[..., Trainer]) -> None:
    """The loop and the objective read no value of a tensor on the host between two log points.

    The optimizer and the argument checks read some, on the CPU only, where that waits for nobody.
    """
    readers: list[str] = []
    reads = (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero, torch.ops.aten.equal)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket in reads:
                frames = [frame.filename for frame in traceback.extract_stack()[:-1]]
                readers.append(
                    next(name for name in reversed(frames) if f"{os.sep}sra2_fast{os.sep}" in name or name == __file__)
                )
            return func(*args, **(kwargs or {}))

    run = trainer(steps=3, log_every=100)

    def watched(take_step: TrainStep, microbatches: Any) -> None:
        with Watch():
            take_step(microbatches)

    run.take_step = around(run.take_step, watched)
    run.train()
    assert run.step == 3
    assert {Path(name).name for name in readers} <= {"adamw_ema.py", "optim.py", "checks.py"}
    readers.clear()
    with Watch():
        run.optimizer.grad_norm.item()
    assert len(readers) == 1, "the watch itself must see a read"


@pytest.mark.parametrize("align", ["cosine", "smooth_l1", "mse", "l1", "none"])
def test_every_alignment_learns(tmp_path: Path, align: str) -> None:
    train(tiny(tmp_path, steps=60, align=align, log_every=20))
    velocity = [record["velocity"] for record in records(tmp_path)]
    assert velocity[-1] < velocity[0]
    assert (records(tmp_path)[-1]["align"] == 0) == (align == "none")


def test_the_teacher_is_the_average_itself(trainer: Callable[..., Trainer]) -> None:
    run = trainer(target="teacher", steps=3, path="cosine", time="lognormal", align_schedule="linear")
    run.train()
    averages = run.optimizer.ema_state_dict()
    assert run.teacher is not None and not run.teacher.training
    for name, parameter in run.teacher.named_parameters():
        assert parameter.data_ptr() == averages[name].data_ptr() and not parameter.requires_grad
    own = dict(run.model.named_parameters())["final_layer.linear.weight"]
    assert not torch.equal(own, averages["final_layer.linear.weight"])


def test_a_teacher_run_resumes_bitwise(tmp_path: Path) -> None:
    train(tiny(tmp_path / "whole", target="teacher", steps=8))
    train(tiny(tmp_path / "parts", target="teacher", steps=4))
    train(tiny(tmp_path / "parts", target="teacher", steps=8))
    assert_same_checkpoint(final(tmp_path / "parts", 8), final(tmp_path / "whole", 8))


def test_bf16_is_near_float32(tmp_path: Path) -> None:
    """Same seed, same draws: after 20 steps the mean loss differs by roundings only."""
    train(tiny(tmp_path / "fp32", steps=20, log_every=20))
    train(tiny(tmp_path / "bf16", steps=20, log_every=20, precision="bf16"))
    fp32, bf16 = records(tmp_path / "fp32")[0], records(tmp_path / "bf16")[0]
    assert fp32["loss"] != bf16["loss"]
    assert abs(bf16["velocity"] / fp32["velocity"] - 1) < 2.0**-7


def test_the_learning_rate_and_the_average_warm_up() -> None:
    at = build.build_schedule(tiny(Path("unused"), lr_warmup=10, ema_decay=0.9)).at
    assert [at(step)["lr"] for step in (1, 5, 10, 1000)] == [1e-4, 5e-4, 1e-3, 1e-3]
    assert at(1)["ema_decay"] == 2 / 11
    assert at(10_000)["ema_decay"] == 0.9


def test_a_full_disk_at_a_later_checkpoint_keeps_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.save_checkpoint

    def full_later(folder: Path, step: int, **parts: Any) -> Path:
        if step > 10:
            monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left")))
        return real(folder, step, **parts)

    monkeypatch.setattr(loop, "save_checkpoint", full_later)
    match = r"step-00000020: could not be written .*the last whole checkpoint is .*step-00000010;"
    with pytest.raises(InputError, match=match):
        train(tiny(tmp_path, checkpoint_every=10))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]
    assert load_checkpoint(final(tmp_path, 10)).step == 10
