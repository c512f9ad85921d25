"""--log: Weights & Biases has what metrics.jsonl has, and goes on as one run; what cannot begin is one line."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from training_runs import tiny

from sra2_fast.errors import InputError
from sra2_fast.train import build
from sra2_fast.train.loop import train

pytestmark = [pytest.mark.slow, pytest.mark.training]


def logged(folder: Path) -> tuple[Any, list[dict[str, float]]]:
    """The run and the history in a folder that wandb wrote offline; its service closes the file a moment later."""
    deadline = time.monotonic() + 60
    while not (found := list(records(folder))) or found[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < deadline, "wandb did not finish its file"
        time.sleep(0.05)
    (run,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    history = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            history.append({name: value for name, value in items.items() if not name.startswith("_")})
    return run, history


def records(folder: Path) -> Iterator[Any]:
    """Seven bytes, then records behind (crc, length, kind)."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    data, at = path.read_bytes(), 7
    while at + 7 <= len(data):
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if kind != 1 or at + 7 + length > len(data):  # not written to its end yet
            return
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data[at + 7 : at + 7 + length])
        at += 7 + length
        yield record


def test_wandb_has_every_record_and_goes_on_as_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "digits")
    out = tmp_path / "run"
    train(tiny(out, steps=4, log_every=2, log="wandb"))
    time.sleep(1.1)  # wandb names its folders by the second
    train(tiny(out, steps=6, log_every=2, log="wandb"))
    written = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = [logged(folder) for folder in (out / "wandb").glob("offline-run-*")]
    (first, early), (second, late) = sorted(found, key=lambda one: one[1][0]["step"])
    assert early + late == written and [record["step"] for record in written] == [2, 4, 6]
    assert first.run_id == second.run_id and first.project == "digits" and first.display_name == "run"
    config = {item.key: json.loads(item.value_json) for item in first.config.update}
    assert config["model"] == "16,3,2,4" and config["lr"] == 1e-3
    assert not (out / "tensorboard").exists()


def test_what_does_not_begin_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**settings: Any) -> None:
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.\nmore")

    monkeypatch.setattr(wandb, "init", refuse)
    words = r"^train: --log wandb did not begin: No API key .*; run `wandb login`, or set WANDB_MODE=offline$"
    with pytest.raises(InputError, match=words):
        train(tiny(tmp_path / "run", steps=2, log="wandb"))
    assert not (tmp_path / "run").exists()


def test_a_record_that_fails_costs_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    wandb = pytest.importorskip("wandb")

    class Broken:
        def define_metric(self, *names: str, **settings: str) -> None:
            pass

        def log(self, record: dict[str, float]) -> None:
            raise wandb.Error("the service is gone")

    monkeypatch.setattr(wandb, "init", lambda **settings: Broken())
    result = train(tiny(tmp_path, steps=6, log_every=2, log="wandb"))
    assert result.exit_code == 0 and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert capsys.readouterr().out.count("no more wandb: the service is gone; metrics.jsonl goes on") == 1


@pytest.mark.parametrize("name", ("wandb", "tensorboard"))
def test_what_is_not_installed_is_said_and_auto_goes_without(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "find_spec", lambda module: None)
    words = f"train: --log {name}: {name} is not installed; pip install {name}, or use --log none"
    with pytest.raises(InputError, match=words):
        build.resolve(tiny(tmp_path, log=name))
    assert build.resolve(tiny(tmp_path)).log == "none"


def test_none_writes_nothing_besides(tmp_path: Path) -> None:
    train(tiny(tmp_path, steps=2, log_every=2, log="none"))
    assert not {"tensorboard", "wandb"} & {path.name for path in tmp_path.iterdir()}
