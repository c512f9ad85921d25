"""`sra2-fast sample` on what it cannot use: one line that names the file or the option, exit code 2, nothing left."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photos import save_vae
from recorded.recording import load_recording
from sampled import COUNT, command, contents, sample, save_run

from sra2_fast.checkpoints import load_checkpoint, save_checkpoint
from sra2_fast.cli import main
from sra2_fast.errors import EXIT_TEMPORARY
from sra2_fast.sample.store import SampleFolder

pytest_plugins = ["sampled"]
Harm = Callable[[Path], Any]


def refused(capsys: pytest.CaptureFixture[str], words: list[str], match: str, exit_code: int = 2) -> None:
    capsys.readouterr()
    assert main(words) == exit_code
    error = capsys.readouterr().err.rstrip("\n").splitlines()[-1]  # a bar may stand before it
    assert error.startswith("sra2-fast sample: ") and re.search(match, error), error


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--num-images", "0"], r"--num-images must be 1 or more, got 0"),
        (["--batch-size", "0"], r"--batch-size must be 1 or more, got 0"),
        (["--steps", "0"], r"--steps must be 1 or more, got 0"),
        (["--method", "sde", "--steps", "1"], r"--steps must be 2 or more, got 1"),
        (["--method", "dopri5"], r"--steps is for --method euler or heun or sde, not dopri5; leave it out"),
        (["--method", "rk4"], r"argument --method: invalid choice: 'rk4'"),
        (["--last-step", "0.1"], r"--last-step is for --method sde, not euler; leave it out"),
        (["--method", "sde", "--last-step", "1"], r"--last-step must be between 0 and 1, got 1\.0"),
        (["--rtol", "0.1"], r"--rtol is for --method dopri5, not euler"),
        (["--seed", "-1"], r"--seed must be from 0 to 2\^64 - 1, got -1"),
        (["--cfg-scale", "nan"], r"--cfg-scale must be a finite number, 0 or more, got nan"),
        (["--guidance-interval", "0.5"], r"--guidance-interval must be two numbers LOW,HIGH, got '0\.5'"),
        (["--guidance-interval", "0.8,0.2"], r"--guidance-interval must be LOW,HIGH with 0 <= LOW <= HIGH <= 1"),
        (["--guided-channels", "2"], r"--guided-channels must be from 1 to 1, got 2"),
        (["--labels", "3,10"], r"the labels of --labels 3,10 must be 0 to 9 for this model, got 10"),
        (["--labels", "-1"], r"the labels of --labels -1 must be 0 to 9 for this model, got -1"),
        (["--labels", "cats"], r"--labels must be balanced, random, labels such as 207,360, or a \.npy or \.txt file"),
        (["--labels", "no.npy"], r"--labels no\.npy cannot be read \(No such file or directory\); give another"),
        (["--vae", "some/vae"], r"the data are grayscale pixels, which need no autoencoder; leave out some/vae"),
        (["--device", "cuda:77"], r"--device cuda:77 cannot be used \(.*\); try --device cpu"),
        (["--precision", "fp16"], r"argument --precision: invalid choice: 'fp16'"),
    ],
)
def test_an_option_that_cannot_be_is_named(
    more: list[str],
    match: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, command(run, tmp_path / "out", *more), match)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (
            np.array([0.5]),
            r"the labels of --labels .*l\.npy must be whole numbers \(n,\), one for each image, got float64",
        ),
        (np.array([[1]]), r"must be whole numbers \(n,\), one for each image, got int64 \(1, 1\)"),
        (np.array([], dtype=np.int64), r"must be whole numbers \(n,\), one for each image, got int64 \(0,\)"),
        (np.array([3, 11]), r"must be 0 to 9 for this model, got 11"),
    ],
)
def test_a_file_of_labels_that_cannot_be_is_named(
    values: np.ndarray, match: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "l.npy", values)
    refused(capsys, command(run, tmp_path / "out", "--labels", str(tmp_path / "l.npy")), match)
    (tmp_path / "l.txt").write_text("a dog")
    refused(
        capsys, command(run, tmp_path / "out", "--labels", str(tmp_path / "l.txt")), r"l\.txt holds no whole numbers"
    )
    assert not (tmp_path / "out").exists()


def checkpoint_of(run: Path) -> Path:
    return next((run / "checkpoints").iterdir())


def written_anew(run: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> None:
    """Whole, and with its checksums: what is wrong is what was written, not what became of it."""
    checkpoint = load_checkpoint(checkpoint_of(run))
    state = {name: checkpoint.state[name] for name in ("model", "run", "latents")}
    weights = dict(checkpoint.ema or {})
    change(state, weights)
    shutil.rmtree(checkpoint.path)
    save_checkpoint(checkpoint.path.parent, checkpoint.step, model=checkpoint.model, ema=weights, state=state)


def change_state(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    written_anew(run, lambda state, weights: change(state))


def change_weights(run: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    written_anew(run, lambda state, weights: change(weights))


def nan_in_a_bias(weights: dict[str, torch.Tensor]) -> None:
    weights["final_layer.linear.bias"][0] = float("nan")


@pytest.mark.parametrize(
    ("harm", "match"),
    [
        (shutil.rmtree, r"run"),
        (lambda run: shutil.rmtree(checkpoint_of(run)), r"run.*has no checkpoint yet; give another one"),
        (lambda run: shutil.rmtree(run / "checkpoints"), r"run"),
        (lambda run: (checkpoint_of(run) / "state.json").write_text("{"), r"step-00000005: state\.json cannot be read"),
        (lambda run: change_state(run, lambda state: state.pop("model")), r"step-00000005.* has no model"),
        (
            lambda run: change_state(run, lambda state: state["model"].update(hidden_size=48)),
            r"step-00000005.*pos_embed.*\(1, 16, 32\)",
        ),
        (
            lambda run: change_state(run, lambda state: state["latents"].update(scale=[0.5, 0.5])),
            r"step-00000005 has latents of shift \[8\.0\] and scale \[0\.5, 0\.5\], where 1 finite numbers each",
        ),
        (
            lambda run: change_state(run, lambda state: state["latents"].update(scale=[0.0])),
            r"step-00000005 has latents of shift .* no scale of 0, are needed; its state\.json is damaged",
        ),
        (
            lambda run: change_state(run, lambda state: state["latents"].update(kind="vae")),
            r"step-00000005 names no autoencoder; give --vae NAME_OR_PATH, or --vae none for colours",
        ),
        (
            lambda run: change_state(run, lambda state: state["latents"].update(kind="vae", vae="/no/such/vae")),
            r"/no/such/vae does not exist; give a folder with an autoencoder, or a hub name",
        ),
        (
            lambda run: change_weights(run, lambda weights: weights.pop("x_embedder.proj.bias")),
            r"step-00000005.*x_embedder\.proj\.bias",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_named(
    harm: Harm, match: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path(shutil.copytree(run, tmp_path / "run"))
    harm(own)
    refused(capsys, command(own, tmp_path / "out"), match)
    assert not (tmp_path / "out").exists()


def test_without_a_checkpoint_or_under_torchrun_it_says_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(capsys, ["sample", "--out", str(tmp_path / "out")], r"--checkpoint is missing; give a run or a checkpoint")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(capsys, command(run, tmp_path / "out"), r"runs on one process and one device as yet, not under torchrun")


def test_a_public_file_that_does_not_tell_enough_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"ema": load_recording("sit").state()}, tmp_path / "0400000.pt")
    refused(capsys, command(tmp_path / "0400000.pt", tmp_path / "out"), r"0400000\.pt.*heads")
    (tmp_path / "empty").mkdir()
    refused(capsys, command(tmp_path / "empty", tmp_path / "out"), r"checkpoint .*empty")
    match = r"source must be auto or sra2_fast or sit or .*, got 'dit'"
    refused(capsys, command(tmp_path / "0400000.pt", tmp_path / "out", "--source", "dit"), match)
    assert not (tmp_path / "out").exists()


def test_nan_from_the_model_is_told_with_the_images(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path(shutil.copytree(run, tmp_path / "run"))
    change_weights(own, nan_in_a_bias)
    match = (
        r"step-00000005 gives NaN or infinity for 3 of 3 images, such as 0 \(label 0\), 1 \(label 1\), 2 \(label 2\);"
    )
    refused(capsys, command(own, tmp_path / "out"), match)
    assert not list((tmp_path / "out" / "images").iterdir())


def test_a_model_without_a_null_label_is_not_guided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_run(tmp_path / "run", class_dropout_prob=0.0)
    match = r"--cfg-scale must be 1 for a model without a null label; train with --label-dropout above 0 to guide"
    refused(capsys, command(run, tmp_path / "out", "--cfg-scale", "2"), match)


def test_the_sde_asks_for_a_path_that_is_not_recorded(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path(shutil.copytree(run, tmp_path / "run"))
    change_state(own, lambda state: state.pop("run"))
    match = r"--method sde needs the path .* records none; give --path linear or --path cosine"
    refused(capsys, command(own, tmp_path / "out", "--method", "sde"), match)
    sample(own, tmp_path / "out", "--method", "sde", "--path", "linear")


def test_a_vae_of_other_channels_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae = save_vae(tmp_path / "vae")
    run = save_run(tmp_path / "run", {"kind": "vae", "shift": [0.0], "scale": [1.0], "vae": str(vae)})
    refused(capsys, command(run, tmp_path / "out"), r"vae has 4 latent channels, the data 1; give the VAE it was made")
    assert sample(run, tmp_path / "out", "--vae", "none").shape == (COUNT, 8, 8, 3)


def test_a_folder_of_something_else_is_left_as_it_is(
    run: Path, whole_sampled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(whole_sampled)
    match = r"holds other samples \(seed 0 -> 3; cfg_scale 2\.0 -> 1\.0; .*\); give the same options, or choose another"
    refused(capsys, command(run, whole_sampled, "--seed", "3"), match)
    assert contents(whole_sampled) == before
    own = Path(shutil.copytree(whole_sampled, tmp_path / "own"))
    for text, match in (
        ("{", r"sample\.json is damaged; choose another --out"),
        (json.dumps({"format": 99, "plan": {}}), r"written by a newer sra2_fast \(format 99\); upgrade sra2_fast"),
    ):
        (own / "sample.json").write_text(text)
        refused(capsys, command(run, own), match)
    (own / "sample.json").unlink()
    refused(capsys, command(run, own), r"own/images holds files, and .*own no sample\.json that says of what")
    refused(capsys, command(run, Path("/dev/null/out")), r"cannot write into /dev/null/out \(Not a directory\)")


def test_two_processes_do_not_share_a_folder(
    run: Path, whole_sampled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is nobody's mistake: the exit code says that the same command may go on later."""
    with open(whole_sampled / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        match = r"--out .* is in use by another process; choose another folder"
        refused(capsys, command(run, whole_sampled), match, EXIT_TEMPORARY)


def test_a_full_disk_keeps_the_images(
    run: Path, whole_sampled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    read = SampleFolder.read_image

    def full(self: SampleFolder, index: int) -> np.ndarray:
        if index == 6 and (out / "grid.png").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return read(self, index)

    words = command(run, out, "--cfg-scale", "2", "--guidance-interval", "0.1,0.8")
    with monkeypatch.context() as patch:
        patch.setattr(SampleFolder, "read_image", full)
        refused(capsys, words, r"samples\.npz cannot be written \(No space left on device\); make room, then run the")
    assert len(list((out / "images").iterdir())) == COUNT and not list(out.glob("*npz*"))
    assert main(words) == 0 and contents(out) == contents(whole_sampled)


def test_out_of_memory_says_what_to_lower(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("sra2_fast.sample.draw.sample_ode", exhausted)
    refused(capsys, command(run, tmp_path / "out"), r"out of memory; lower --batch-size \(now 3\)")
