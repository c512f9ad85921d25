"""Checkpoints: whole or not there, bitwise, and one line when they are not what they should be."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from sra2_fast.checkpoints import training as ck
from sra2_fast.errors import InputError
from sra2_fast.optim import AdamWEMA


def small_model(width: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, 2))


def tree_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = small_model()
    weights = model.state_dict()
    return ck.save_checkpoint(
        tmp_path / "checkpoints",
        40,
        model=weights,
        ema={name: value * 0.5 for name, value in weights.items()},
        optimizer={"0.weight/exp_avg": torch.randn(5, 3)},
        state={"run": {"lr": 1e-4}},
    )


def test_what_is_read_is_what_was_written(saved: Path) -> None:
    loaded = ck.load_checkpoint(saved)
    torch.manual_seed(0)
    expected = small_model().state_dict()
    assert saved.name == "step-00000040" and loaded.step == 40
    assert loaded.state["run"] == {"lr": 1e-4}
    assert loaded.ema is not None and list(loaded.optimizer) == ["0.weight/exp_avg"]
    for name, value in expected.items():
        assert torch.equal(loaded.model[name], value)
        assert torch.equal(loaded.ema[name], value * 0.5)
    assert {path.name for path in saved.iterdir()} == {
        "model.safetensors",
        "ema.safetensors",
        "optimizer.safetensors",
        "state.json",
    }


def test_training_on_loaded_tensors_leaves_the_files_alone(saved: Path) -> None:
    before = tree_bytes(saved)
    loaded = ck.load_checkpoint(saved)
    for value in loaded.optimizer.values():
        value.add_(1.0)
    assert tree_bytes(saved) == before


def test_weights_only_leaves_the_moments_unread(saved: Path) -> None:
    assert ck.load_checkpoint(saved, weights_only=True).optimizer == {}


def test_a_saved_step_is_not_written_again(saved: Path) -> None:
    before = tree_bytes(saved)
    again = ck.save_checkpoint(saved.parent, 40, model={"other": torch.ones(1)}, state={})
    assert again == saved and tree_bytes(saved) == before


def test_checkpoints_are_listed_by_step_and_partial_ones_are_not(tmp_path: Path) -> None:
    for step in (100_000_000, 20, 40):
        ck.save_checkpoint(tmp_path, step, model={"w": torch.ones(1)}, state={})
    (tmp_path / ".step-00000060.partial").mkdir()
    (tmp_path / "step-notes").mkdir()
    assert [path.name for path in ck.list_checkpoints(tmp_path)] == ["step-00000020", "step-00000040", "step-100000000"]
    ck.remove_partial_checkpoints(tmp_path)
    assert not (tmp_path / ".step-00000060.partial").exists()
    assert ck.list_checkpoints(tmp_path / "absent") == []


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        ck.save_checkpoint(tmp_path, step, model={"w": torch.ones(1)}, state={})
    ck.prune_checkpoints(tmp_path, 0)
    assert len(ck.list_checkpoints(tmp_path)) == 3
    ck.prune_checkpoints(tmp_path, 2)
    assert [path.name for path in ck.list_checkpoints(tmp_path)] == ["step-00000020", "step-00000030"]


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors"])
def test_a_truncated_file_is_named(saved: Path, name: str) -> None:
    os.truncate(saved / name, (saved / name).stat().st_size - 8)
    with pytest.raises(InputError, match=rf"step-00000040: {name} is truncated \(\d+ bytes of \d+\); no other"):
        ck.load_checkpoint(saved)


def test_a_damaged_header_is_named(saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(
        InputError,
        match=r"model\.safetensors is damaged \(its SHA-256 is not the one in state\.json\); no other checkpoint",
    ):
        ck.load_checkpoint(saved)


def test_missing_and_damaged_parts_are_named(saved: Path) -> None:
    (saved / "ema.safetensors").unlink()
    with pytest.raises(InputError, match=r"ema\.safetensors is missing"):
        ck.load_checkpoint(saved)
    (saved / "state.json").write_text('{"format": 1, "st')
    with pytest.raises(InputError, match=r"state\.json cannot be read"):
        ck.load_checkpoint(saved)
    (saved / "state.json").write_text(json.dumps({"format": 1, "step": 40, "files": {}}))
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        ck.load_checkpoint(saved)
    (saved / "state.json").write_text(json.dumps({"format": 99, "step": 40, "files": {}}))
    with pytest.raises(InputError, match=r"newer sra2_fast \(format 99\); upgrade"):
        ck.load_checkpoint(saved)


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no state\.json there; give a folder such as"):
        ck.load_checkpoint(tmp_path)


def test_weights_of_another_model_are_refused_by_name(saved: Path) -> None:
    weights = ck.load_checkpoint(saved).model
    with pytest.raises(InputError, match=r"of another model: 0\.weight is \(5, 3\) there and \(7, 3\) here"):
        ck.load_weights(small_model(7), weights, saved)
    with pytest.raises(InputError, match=r"of another model: 3\.weight is absent there and \(1, 2\) here"):
        ck.load_weights(nn.Sequential(*small_model(), nn.Linear(2, 1)), weights, saved)
    with pytest.raises(InputError, match=r"of another model: 2\.bias is \(2,\) there and absent here"):
        ck.load_weights(nn.Sequential(nn.Linear(3, 5)), weights, saved)


@pytest.mark.parametrize("fails_at", ["save_file", "fsync"])
def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_else(
    saved: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    """Simulated at two places: while the tensors are written, and when what was written is flushed."""
    before = tree_bytes(saved.parent)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ck, fails_at, full)
    message = (
        r"step-00000060: could not be written \(.*No space left.*\); the last whole checkpoint is .*step-00000040;"
    )
    with pytest.raises(InputError, match=message):
        ck.save_checkpoint(saved.parent, 60, model={"w": torch.ones(4)}, state={})
    assert tree_bytes(saved.parent) == before
    assert [path.name for path in saved.parent.iterdir()] == ["step-00000040"]


def test_a_file_that_the_system_cuts_short_is_noticed(saved: Path) -> None:
    """A real failing write: the process may not make files above 64 KiB."""
    before = tree_bytes(saved.parent)
    script = (
        "import sys, torch\n"
        "from sra2_fast.checkpoints import save_checkpoint\n"
        "from sra2_fast.errors import InputError\n"
        "try:\n"
        "    save_checkpoint(sys.argv[1], 60, model={'w': torch.ones(100_000)}, state={})\n"
        "except InputError as error:\n"
        "    sys.exit(f'refused: {error}')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(saved.parent)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)),
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        check=False,
    )
    assert done.returncode == 1 and "refused: checkpoint" in done.stderr and "File too large" in done.stderr
    assert tree_bytes(saved.parent) == before
    assert [path.name for path in saved.parent.iterdir()] == ["step-00000040"]


def test_an_interrupt_while_saving_leaves_nothing_half_written(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ck, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ck.save_checkpoint(saved.parent, 60, model={"w": torch.ones(4)}, state={})
    assert [path.name for path in saved.parent.iterdir()] == ["step-00000040"]


def test_a_folder_that_cannot_be_made_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"could not be written .*there is no earlier checkpoint; free some space or"):
        ck.save_checkpoint(tmp_path / "file" / "checkpoints", 1, model={"w": torch.ones(4)}, state={})


def test_an_optimizer_comes_back_bitwise_through_safetensors_and_json(tmp_path: Path) -> None:
    model = small_model()
    optimizer = AdamWEMA(model.named_parameters(), lr=0.1, betas=(0.85, 0.999), ema_decay=0.9)
    for _ in range(3):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    names = [name for name, _ in model.named_parameters()]
    tensors, rest = ck.split_optimizer(get_optimizer_state_dict(model, optimizer))
    path = ck.save_checkpoint(tmp_path, 3, model=model.state_dict(), optimizer=tensors, state={"optimizer": rest})
    loaded = ck.load_checkpoint(path)
    joined = ck.join_optimizer(loaded.optimizer, loaded.state["optimizer"], names)
    assert joined["param_groups"][0]["lr"] == 0.1 and tuple(joined["param_groups"][0]["betas"]) == (0.85, 0.999)
    assert list(joined["state"]) == names
    fresh = AdamWEMA(model.named_parameters(), lr=0.5, ema_decay=0.9)
    set_optimizer_state_dict(model, fresh, joined)
    assert fresh.param_groups[0]["lr"] == 0.1 and not fresh.skipped_steps
    for parameter in model.parameters():
        want, got = optimizer.state[parameter], fresh.state[parameter]
        assert set(got) == set(want) == {"step", "exp_avg", "exp_avg_sq", "ema"}
        assert all(torch.equal(got[key], value) for key, value in want.items())


def test_the_state_of_a_checkpoint_with_numbered_parameters_still_loads() -> None:
    """The first checkpoints numbered the parameters of a group; their names stood beside."""
    model = small_model()
    optimizer = AdamWEMA(model.named_parameters(), lr=0.1)
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    packed = optimizer.state_dict()
    names = packed["param_groups"][0]["param_names"]
    tensors = {f"{names[i]}/{key}": value for i, entry in packed["state"].items() for key, value in entry.items()}
    rest = {"param_groups": packed["param_groups"], "numbers": {}}
    fresh = AdamWEMA(model.named_parameters(), lr=0.5)
    set_optimizer_state_dict(model, fresh, ck.join_optimizer(tensors, rest, names))
    for parameter in model.parameters():
        assert all(torch.equal(fresh.state[parameter][key], v) for key, v in optimizer.state[parameter].items())


def test_the_state_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match=r"no parameter is named blocks\.9\.weight"):
        ck.join_optimizer({"blocks.9.weight/exp_avg": torch.ones(1)}, {"param_groups": []}, ["blocks.0.weight"])
