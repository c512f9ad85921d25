"""Which run a run goes on from, and what has to be the same: one line that names the option."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_runs import assert_same_checkpoint, final, tiny

from sra2_fast import load_checkpoint
from sra2_fast.data.layouts.shards import shard_name, write_index, write_shard
from sra2_fast.errors import InputError
from sra2_fast.train.loop import train

pytestmark = pytest.mark.training


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    train(tiny(tmp_path / "run", steps=4))
    return tmp_path / "run"


def make_latents(folder: Path, seed: int = 0, classes: int = 3) -> Path:
    """Sixteen latents of 4x8x8 in one shard."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    moments = draw.standard_normal((16, 8, 8, 8), dtype=np.float32)
    moments[:, 4:] = 0.1
    shards = [write_shard(folder, shard_name(0, 1), moments, np.arange(16) % classes, key="test")]
    about: dict[str, Any] = {"shape": [4, 8, 8], "num_classes": classes, "class_names": None, "vae": None}
    write_index(folder, shards, shift=[0.0] * 4, scale=[1.0] * 4, **about)
    return folder


def test_a_run_folder_means_its_newest_checkpoint(finished: Path, tmp_path: Path) -> None:
    train(tiny(tmp_path / "branch", steps=6, resume=str(finished)))
    train(tiny(tmp_path / "named", steps=6, resume=str(final(finished, 4))))
    assert_same_checkpoint(final(tmp_path / "branch", 6), final(tmp_path / "named", 6))


def test_other_latents_under_the_same_path_are_refused(tmp_path: Path) -> None:
    """They passed: only sizes were compared, and the loss jumped from 2.1 to 10."""
    data = make_latents(tmp_path / "latents")
    train(tiny(tmp_path / "run", steps=2, data=str(data), model="16,2,2,2"))
    shutil.rmtree(data)
    make_latents(data, seed=1)
    changed = tiny(tmp_path / "run", steps=4, data=str(data), model="16,2,2,2")
    with pytest.raises(InputError, match=r"other options \(--data holds other latents than it was trained on\)"):
        train(changed)
    on_purpose = dataclasses.replace(changed, resume=str(final(tmp_path / "run", 2)))
    assert train(on_purpose).step == 4


def test_the_same_latents_by_another_path_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_latents(tmp_path / "latents")
    train(tiny(tmp_path / "run", steps=2, data=str(data), model="16,2,2,2"))
    monkeypatch.chdir(tmp_path)
    assert train(tiny(tmp_path / "run", steps=3, data="latents/", model="16,2,2,2")).step == 3
    shutil.copytree(data, tmp_path / "copy")
    assert train(tiny(tmp_path / "run", steps=4, data=str(tmp_path / "copy"), model="16,2,2,2")).step == 4


@pytest.mark.parametrize("named", [False, True], ids=["auto", "named"])
def test_another_number_of_classes_blames_its_option(finished: Path, named: bool) -> None:
    """It blamed --model and --align, which were the same."""
    resume = str(final(finished, 4)) if named else "auto"
    with pytest.raises(InputError, match=r"step-00000004 was trained with --num-classes 10, not 12; give the same"):
        train(tiny(finished, steps=6, num_classes=12, resume=resume))
    with pytest.raises(InputError, match=r"was trained with --model 16,3,2,4, not 32,3,2,4; give the same"):
        train(tiny(finished, steps=6, model="32,3,2,4", resume=resume))


def test_data_with_other_classes_blame_the_data(tmp_path: Path) -> None:
    data = make_latents(tmp_path / "latents")
    train(tiny(tmp_path / "run", steps=2, data=str(data), num_classes=5, model="16,2,2,2"))
    other = make_latents(tmp_path / "other", classes=4)
    with pytest.raises(InputError, match=r"--data 16 x \[4, 8, 8\], 3 classes -> 16 x \[4, 8, 8\], 4 classes"):
        train(tiny(tmp_path / "run", steps=4, data=str(other), num_classes=5, model="16,2,2,2"))


def test_more_steps_of_a_linear_decay_say_what_happens(tmp_path: Path) -> None:
    train(tiny(tmp_path, steps=4, align_schedule="linear"))
    message = (
        r"\(--align-schedule-steps 4 -> 8\).*; --align-schedule-steps 4 ends the decay where it was to end, "
        r"more --steps stretch it"
    )
    with pytest.raises(InputError, match=message):
        train(tiny(tmp_path, steps=8, align_schedule="linear"))
    result = train(tiny(tmp_path, steps=8, align_schedule="linear", align_schedule_steps=4))
    assert result.step == 8 and result.last_record is not None and result.last_record["align_weight"] == 0


def test_a_checkpoint_that_recorded_less_still_goes_on(finished: Path) -> None:
    """As the first version wrote it: the data's path in its description, no fingerprint, no newer options."""
    state = final(finished, 4) / "state.json"
    written = json.loads(state.read_text())
    del written["seal"], written["sha256"]
    run = written["run"]
    run["data"] = f"somewhere/else: {run['data']}"
    run["num_classes"] = None
    for name in ("data_fingerprint", "latent_scale", "latent_shift", "ignore_labels"):
        run.pop(name)
    state.write_text(json.dumps(written))
    assert train(tiny(finished, steps=6)).step == 6


def test_unlabelled_training_is_an_option(tmp_path: Path) -> None:
    result = train(tiny(tmp_path, steps=2, ignore_labels=True))
    assert result.step == 2
    table = load_checkpoint(final(tmp_path, 2)).model["y_embedder.embedding_table.weight"]
    assert table.shape == (2, 16)  # the one class, and "no label"


def test_microbatches_train_as_the_whole_batch_does(tmp_path: Path) -> None:
    train(tiny(tmp_path / "whole", steps=4))
    train(tiny(tmp_path / "cut", steps=4, microbatch=3))
    whole, cut = (load_checkpoint(final(tmp_path / name, 4)).model for name in ("whole", "cut"))
    different = [name for name in whole if not torch.equal(whole[name], cut[name])]
    assert different, "the order of sums must show somewhere"
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-3, atol=1e-5)


def test_out_of_memory_may_be_answered_as_its_line_says(tmp_path: Path) -> None:
    """The line says to lower --microbatch, and the run was then refused as one with other options."""
    train(tiny(tmp_path / "run", steps=2))
    assert train(tiny(tmp_path / "run", steps=4, microbatch=3)).step == 4


def test_under_torchrun_the_line_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It said that the folder was in use by another process: the second rank's, which was itself."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"train: runs on one process and one device as yet, not under torchrun"):
        train(tiny(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    for steps, alone in enumerate(("1", ""), start=1):
        monkeypatch.setenv("WORLD_SIZE", alone)
        assert train(tiny(tmp_path / "run", steps=steps)).step == steps


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_too_little_memory_is_one_line_with_what_to_lower(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("sra2_fast.train.step.TrainStep.__call__", fail)
    with pytest.raises(InputError, match=r"out of memory on cpu; lower .*--microbatch \(now 8\), or use --check"):
        train(tiny(tmp_path / "run"))


def test_other_errors_of_torch_are_not_called_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("expected scalar type Float but found Double")

    monkeypatch.setattr("sra2_fast.train.step.TrainStep.__call__", fail)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        train(tiny(tmp_path / "run"))
