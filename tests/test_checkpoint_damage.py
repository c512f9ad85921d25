"""Damage to a checkpoint: a flipped bit anywhere is refused by name, and so is what a hand changed in an older one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import final, tiny

from sra2_fast.checkpoints import (
    list_checkpoints,
    load_checkpoint,
    newest_whole,
    prune_checkpoints,
    save_checkpoint,
)
from sra2_fast.checkpoints import training as ck
from sra2_fast.errors import InputError
from sra2_fast.schemas import Damaged
from sra2_fast.train.loop import train

pytestmark = pytest.mark.training


def save(folder: Path, step: int) -> Path:
    weights = {"w": torch.randn(4, 3), "b": torch.randn(3)}
    moments = {f"{name}/{key}": value.clone() for name, value in weights.items() for key in ("exp_avg", "exp_avg_sq")}
    return save_checkpoint(folder, step, model=weights, ema=weights, optimizer=moments, state={"run": {"lr": 1e-4}})


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """443 of 444 flips in tensor data loaded without a word, and so did a changed step in state.json."""
    path = save(tmp_path, 40)
    for file in sorted(path.iterdir()):
        data = bytearray(file.read_bytes())
        for bit in range(0, 8 * len(data), 8 * len(data) // 150 + 1):
            data[bit // 8] ^= 1 << bit % 8
            file.write_bytes(data)
            with pytest.raises(InputError, match=r"step-00000040: \w+\.(safetensors|json) ") as caught:
                load_checkpoint(path)
            assert file.name in str(caught.value) and "\n" not in str(caught.value)
            data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
    assert load_checkpoint(path).step == 40


def test_the_moments_may_stay_unread_and_unchecked(tmp_path: Path) -> None:
    path = save(tmp_path, 40)
    (path / "optimizer.safetensors").write_bytes(bytes((path / "optimizer.safetensors").stat().st_size))
    assert load_checkpoint(path, weights_only=True).optimizer == {}


def test_the_advice_names_a_checkpoint_only_if_it_is_whole(tmp_path: Path) -> None:
    """It said to resume from the one before, whatever that one was."""
    paths = [save(tmp_path, step) for step in (10, 20, 30)]
    os.truncate(paths[2] / "ema.safetensors", 10)
    with pytest.raises(InputError, match=r"delete that folder and go on from step-00000020, which is whole"):
        load_checkpoint(paths[2])
    file = paths[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=r"go on from step-00000010, which is whole"):
        load_checkpoint(paths[2])
    assert newest_whole(tmp_path) == paths[0]
    (paths[0] / "state.json").unlink()
    with pytest.raises(InputError, match=r"no other checkpoint beside it is whole; start anew with another --out"):
        load_checkpoint(paths[2])


def test_a_folder_under_another_step_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, 40).rename(tmp_path / "step-00000041")
    with pytest.raises(InputError, match=r"state\.json is damaged \(it says step 40\)"):
        load_checkpoint(path)
    assert load_checkpoint(path.rename(tmp_path / "best")).step == 40


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"step": 4.5}, r"state\.json is damaged \(step: input should be a valid integer, got 4\.5\)"),
        ({"step": float("inf")}, r"step: input should be a valid integer, got inf"),
        ({"step": True}, r"step: input should be a valid integer, got True"),
        ({"step": -1}, r"step: input should be greater than or equal to 0, got -1"),
        ({"step": 10**400}, r"step: "),
        ({"format": "1"}, r"format: input should be a valid integer, got '1'"),
        ({"files": []}, r"files: input should be a valid dictionary, got \[\]"),
        ({"files": {"../x": 3}}, r"files"),
        ({"files": {"x.safetensors": 3}}, r"no file of a checkpoint is called x\.safetensors"),
        ({"files": {"model.safetensors": "9"}}, r"files\.model\.safetensors: input should be a valid integer"),
        ({"run": 3}, r"run: input should be a valid dictionary, got 3"),
        ({"model": "SiT"}, r"model: input should be a valid dictionary"),
        ({"pending": [[1, 2, None]]}, r"pending\[0\]\[2\]: input should be a valid number, got None"),
        ({"optimizer": {"param_groups": []}}, r"optimizer\.param_groups: "),
        ({"optimizer": {"param_groups": [{}]}}, r"optimizer\.param_groups\[0\]\.params is missing"),
        (None, r"state\.json is damaged \(no JSON object\)"),
    ],
)
def test_what_may_not_stand_in_state_json_is_named(tmp_path: Path, change: dict[str, Any] | None, match: str) -> None:
    """Tracebacks of a dozen kinds."""
    path = save(tmp_path, 40)
    state = json.loads((path / "state.json").read_text())
    del state["seal"]
    (path / "state.json").write_text(json.dumps([1] if change is None else {**state, **change}))
    with pytest.raises(Damaged, match=match) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_state_json_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 40)
    for text in (b"[" * 100_000, b"\xff\xfe{", b""):
        (path / "state.json").write_bytes(text)
        with pytest.raises(Damaged, match=r"state\.json (is nested too deeply|cannot be read)"):
            load_checkpoint(path)
    (path / "state.json").unlink()
    os.mkfifo(path / "state.json")  # reading it would wait for ever
    with pytest.raises(Damaged, match=r"state\.json is no regular file"):
        load_checkpoint(path)


def test_pruning_takes_a_folder_from_its_name_before_it_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in the middle left half a checkpoint under the name of a whole one."""
    for step in (10, 20):
        save(tmp_path, step)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: None)
    prune_checkpoints(tmp_path, 1)
    monkeypatch.undo()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000020"]
    ck.remove_partial_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020"]


# What a hand, or another program, changed in a checkpoint without checksums


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    train(tiny(out, steps=2))
    state = final(out, 2) / "state.json"
    old = {name: value for name, value in json.loads(state.read_text()).items() if name not in ("seal", "sha256")}
    state.write_text(json.dumps(old))
    return out


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    state = json.loads((file.parent / "state.json").read_text())
    state["files"][file.name] = file.stat().st_size
    (file.parent / "state.json").write_text(json.dumps(state))


NAME = "blocks.0.attn.qkv.weight"


@pytest.mark.training
@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        (
            "optimizer",
            lambda t: t.update({f"{NAME}/exp_avgg": t.pop(f"{NAME}/exp_avg")}),
            r"holds .*exp_avgg, which",
        ),
        ("optimizer", lambda t: t.pop(f"{NAME}/exp_avg_sq"), rf"optimizer\.safetensors lacks {NAME}/exp_avg_sq"),
        ("optimizer", lambda t: t.update({f"{NAME}/step": torch.ones(2)}), r"/step must be floats of shape \(\), got"),
        (
            "optimizer",
            lambda t: t.update({f"{NAME}/exp_avg": t[f"{NAME}/exp_avg"].view(torch.int32)}),
            r"exp_avg must be floats of shape \(48, 16\), got torch\.int32",
        ),
        ("ema", lambda t: t.pop(NAME), rf"ema\.safetensors lacks {NAME}; it is damaged"),
        ("ema", lambda t: t.update({NAME: t[NAME].view(torch.int32)}), rf"ema\.safetensors: {NAME} must be floats"),
        ("model", lambda t: t.update({NAME: t[NAME].view(torch.int32)}), rf"{NAME} holds torch\.int32, not floats"),
    ],
)
def test_what_would_restart_without_a_word_is_refused(
    finished: Path, tmp_path: Path, file: str, change: Callable[[dict[str, torch.Tensor]], None], match: str
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    rewrite(final(out, 2) / f"{file}.safetensors", change)
    with pytest.raises(InputError, match=match):
        train(tiny(out, steps=3))


@pytest.mark.training
def test_other_betas_and_eps_are_refused_and_an_old_folder_goes_on(finished: Path, tmp_path: Path) -> None:
    """They were taken from the file, and the run went on as another one."""
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    state = final(out, 2) / "state.json"
    whole = state.read_text()
    for name, value in (("betas", [0.5, 0.999]), ("eps", 1e-3)):
        record = json.loads(whole)
        record["optimizer"]["param_groups"][0][name] = value
        state.write_text(json.dumps(record))
        with pytest.raises(InputError, match=rf"{name} of its optimizer is .*; this version goes on with .* only"):
            train(tiny(out, steps=3))
    record = json.loads(whole)
    record["pending"] = [[1.0, 2.0]]
    state.write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"a row of its pending losses has not 3 numbers"):
        train(tiny(out, steps=3))
    state.write_text(whole)
    assert train(tiny(out, steps=3)).step == 3
