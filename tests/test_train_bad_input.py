"""Bad input to a training run: one line that names the thing and what to do, and nothing lost or half-written."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_runs import assert_same_checkpoint

from sra2_fast.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from sra2_fast.data import LatentSource
from sra2_fast.data.layouts.digits import DigitsSource
from sra2_fast.errors import InputError
from sra2_fast.train import TrainOptions, build, loop
from sra2_fast.train.loop import train
from sra2_fast.train.run_directory import RunDirectory

pytestmark = pytest.mark.training

BASE = TrainOptions(
    out="unset", model="16,2,2,4", batch_size=4, steps=4, sample_every=0, precision="fp32", device="cpu", log_every=2
)


def options(out: Path, **changes: Any) -> TrainOptions:
    return dataclasses.replace(BASE, out=str(out), **changes)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run of four steps."""
    train(options(tmp_path / "run"))
    return tmp_path / "run"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "SiT-B/3"}, r"--model SiT-B/3 is not known; did you mean SiT-B/\d\?"),
        ({"model": "128,6,4"}, r"--model 128,6,4 is not known.*'hidden_size,depth,heads,patch' such as 128,6,4,2"),
        ({"model": "0,6,4,2"}, r"--model 0,6,4,2 is not known\. Names are"),
        ({"model": "sit-b/2"}, r"--model sit-b/2 is not known; did you mean SiT-B/2\?"),
        ({"model": "16,2,3,4"}, r"num_heads"),
        (
            {"model": "16,2,2,3"},
            r"digits has latents of 8x8, which the patch size 3 of --model 16,2,2,3 does not divide",
        ),
        (
            {"optimizer": "apex"},
            r'implementation="apex" needs NVIDIA apex with its CUDA kernels',
        ),
        ({"num_classes": 5}, r"label out of range: digits has 10 classes, the model 5; set num_classes to 10 or more"),
        (
            {"sample_every": 2, "sample_cfg": 2.0, "label_dropout": 0.0},
            r"--sample-cfg 2\.0 needs --label-dropout above 0",
        ),
        ({"align_depth": 3}, r"--align-depth must be a block from 1 to 2, the depth of --model 16,2,2,4, got 3"),
        ({"target": "teacher", "teacher_depth": 3}, r"--teacher-depth must be a block from 1 to 2, .* got 3"),
        ({"vae": "/no/such/vae", "sample_every": 1}, r"vae: the data are grayscale pixels.*leave out /no/such/vae"),
        ({"data": "/no/such/folder"}, r"/no/such/folder does not exist"),
        ({"target": "features"}, r"data: digits holds no features; compute them with"),
        ({"resume": "/no/such/checkpoint"}, r"checkpoint /no/such/checkpoint: no state\.json there"),
        ({"vae": "/no/such/vae", "data": "digits", "device": "cuda"}, r"--device cuda: this torch sees no GPU"),
    ],
)
def test_what_cannot_be_trained_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(InputError, match=message) as caught:
        train(options(tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_empty_data_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match=r"data is empty"):
        train(options(tmp_path / "run", data=str(tmp_path / "data")))


class SpoiledDigits(DigitsSource):
    """The digits with a NaN in sample 100."""

    def __init__(self) -> None:
        super().__init__()
        self._values[100, 0, 3, 3] = np.nan


@pytest.mark.parametrize("workers", [0, 1])
def test_a_latent_with_nan_is_named_and_the_steps_before_it_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were lost: up to --checkpoint-every steps for one bad sample."""
    train(options(tmp_path / "whole", batch_size=256, steps=1))
    monkeypatch.setattr(loop, "open_data", lambda spec, num_classes, **told: SpoiledDigits())
    with pytest.raises(InputError, match=r"data: NaN or infinity in sample 100 of digits"):
        train(options(tmp_path / "run", steps=20, batch_size=256, workers=workers))
    (saved,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert f"saved {saved} before leaving" in capsys.readouterr().out
    monkeypatch.undo()
    step = load_checkpoint(saved).step
    train(options(tmp_path / "whole", steps=step, batch_size=256, resume=str(tmp_path / "whole")))
    assert 1 <= step < 8
    assert_same_checkpoint(saved, tmp_path / "whole" / "checkpoints" / saved.name)


def test_latents_that_the_patch_does_not_divide_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source: LatentSource = DigitsSource()
    source.shape = (1, 8, 6)
    monkeypatch.setattr(loop, "open_data", lambda spec, num_classes, **told: source)
    with pytest.raises(InputError, match=r"digits has latents of 8x6, which the patch size 4 of --model 16,2,2,4 does"):
        train(options(tmp_path / "run"))


def test_an_out_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--out .*file/run cannot be written \(Not a directory\); choose another"):
        train(options(tmp_path / "file" / "run"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_out_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match=r"cannot be written \(Permission denied\)"):
        train(options(tmp_path / "run"))


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    with pytest.raises(InputError, match=r"is in use by another process; choose another folder"):
        train(options(tmp_path))
    directory.close()


def test_another_run_in_the_folder_is_not_continued(finished: Path) -> None:
    before = snapshot(finished / "checkpoints")
    with pytest.raises(InputError, match=r"other options \(--seed 0 -> 5; --lr 0\.0001 -> 0\.1\); give the same ones"):
        train(options(finished, steps=8, lr=0.1, seed=5))
    with pytest.raises(
        InputError, match=r"already holds a run \(step-00000004\); choose another folder, or go on with"
    ):
        train(options(finished, steps=8, resume="never"))
    assert snapshot(finished / "checkpoints") == before


def test_a_change_is_taken_from_a_named_checkpoint_and_said(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = finished / "checkpoints" / "step-00000004"
    result = train(options(finished, steps=6, lr=0.1, weight_decay=0.5, resume=str(checkpoint)))
    assert result.step == 6 and result.last_record is not None and result.last_record["lr"] == 0.1
    assert "--lr 0.0001 -> 0.1; --weight-decay 0.0 -> 0.5" in capsys.readouterr().out


def test_a_named_checkpoint_must_be_the_newest_of_the_folder(finished: Path, tmp_path: Path) -> None:
    train(options(finished, steps=6))
    older = finished / "checkpoints" / "step-00000004"
    with pytest.raises(InputError, match=r"already holds step-00000006, and --resume starts from step-00000004"):
        train(options(finished, steps=8, resume=str(older)))
    train(options(tmp_path / "other"))
    with pytest.raises(InputError, match=r"already holds another run \(step-00000004\)"):
        train(options(tmp_path / "other", steps=8, resume=str(older)))
    result = train(options(tmp_path / "branch", steps=8, resume=str(older)))
    assert result.step == 8


def test_a_checkpoint_of_another_model_is_named(finished: Path, tmp_path: Path) -> None:
    checkpoint = finished / "checkpoints" / "step-00000004"
    with pytest.raises(InputError, match=r"was trained with --model 16,2,2,4, not 32,2,2,4; give the same"):
        train(options(tmp_path / "other", model="32,2,2,4", resume=str(checkpoint)))
    with pytest.raises(InputError, match=r"of another model: projector\.\d\.\w+ is .* there and absent here"):
        train(options(tmp_path / "third", align="none", resume=str(checkpoint)))


def test_a_truncated_checkpoint_is_named_and_left(finished: Path) -> None:
    file = finished / "checkpoints" / "step-00000004" / "model.safetensors"
    os.truncate(file, 100)
    with pytest.raises(
        InputError, match=r"step-00000004: model\.safetensors is truncated .*; no other checkpoint beside it is whole"
    ):
        train(options(finished, steps=8))
    assert file.exists()


def test_a_checkpoint_that_no_run_saved_is_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "made", 4, model={"weight": torch.zeros(2)}, state={})
    with pytest.raises(InputError, match=r"step-00000004: not of sra2-fast train .* no 'run'\); choose another"):
        train(options(tmp_path / "run", resume=str(path)))


def test_lines_of_metrics_that_are_no_records_are_dropped(finished: Path) -> None:
    metrics = finished / "metrics.jsonl"
    metrics.write_bytes(b'\xff\x00}\n[1]}\n{"loss": 1}\n' + metrics.read_bytes())
    train(options(finished, steps=8))
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [2, 4, 6, 8]


def test_metrics_that_were_removed_go_on_in_a_new_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run wrote on into a file that nobody could find any more, and ended as if all was well."""
    directory = RunDirectory(tmp_path / "run")
    directory.open_metrics(0)
    directory.log({"step": 1, "loss": 1.0})
    shutil.rmtree(tmp_path / "run")
    for step in (2, 3):
        directory.log({"step": step, "loss": 1.0})
    assert capsys.readouterr().out.count("metrics.jsonl was removed; the records go on in a new file") == 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 3]
    directory.close()


def test_a_full_disk_for_metrics_is_named(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.open_metrics(0)
    directory.metrics = open("/dev/full", "w", buffering=1)  # noqa: SIM115 - the device whose writes fail
    with pytest.raises(InputError, match=r"metrics\.jsonl cannot be written \(No space left on device\); free some"):
        directory.log({"step": 1, "loss": 1.0})
    directory.close()


def test_precision_auto_is_what_the_machine_is_good_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for is_fast, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(build.backends, "is_bf16_fast", lambda device, is_fast=is_fast: is_fast)
        assert build.resolve(options(tmp_path, precision="auto")).precision == precision


@pytest.mark.parametrize(
    ("model", "target", "depth"),
    [
        ("SiT-S/2", "vae", 2),
        ("SiT-B/4", "vae", 2),
        ("SiT-L/2", "vae", 8),
        ("SiT-XL/2", "vae", 8),
        ("128,6,4,2", "vae", 1),
        ("128,3,4,2", "vae", 1),
        ("SiT-B/2", "teacher", 4),
        ("SiT-XL/2", "teacher", 8),
    ],
)
def test_the_aligned_block_follows_the_model(tmp_path: Path, model: str, target: str, depth: int) -> None:
    assert build.resolve(options(tmp_path, model=model, target=target)).align_depth == depth
    assert build.resolve(options(tmp_path, model=model, target=target, align="none")).align_depth is None
