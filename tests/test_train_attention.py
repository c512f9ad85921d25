"""The attention of a run: said in its first line, kept in its checkpoints, the same when it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_runs import assert_same_checkpoint, final, records, tiny

from sra2_fast import backends, choices, cli, load_checkpoint
from sra2_fast.schemas import sealed
from sra2_fast.train.loop import train
from sra2_fast.train.options import TrainOptions, add_arguments, read_options

pytestmark = pytest.mark.training


def fastest(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine it is, from here on, whatever was measured before."""
    monkeypatch.setattr(choices, "_read", lambda: ({}, ""))
    monkeypatch.setattr(choices, "_add", lambda *entry: None)
    monkeypatch.setattr(choices, "measure", lambda op, runs, device: {one: 1.0 + (one != name) for one in runs})


def run(folder: Path, capsys: pytest.CaptureFixture[str], **changes: Any) -> str:
    """Train; the first line of what it said."""
    train(tiny(folder, precision="bf16", log_every=2, **changes))
    return capsys.readouterr().out.splitlines()[0]


def test_a_resumed_run_keeps_its_attention_and_its_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fastest("matmul", monkeypatch)
    said = run(tmp_path / "whole", capsys, steps=4)
    assert "bf16 on cpu, fused, attention matmul (measured: sdpa 2, matmul 1 ms); --out" in said
    run(tmp_path / "cut", capsys, steps=2)
    assert load_checkpoint(final(tmp_path / "cut", 2)).state["choices"] == {"attention": "matmul"}
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["choices"] == {"attention": "matmul"}
    fastest("sdpa", monkeypatch)
    assert "fused, attention matmul (as before); --out" in run(tmp_path / "cut", capsys, steps=4)
    assert_same_checkpoint(final(tmp_path / "whole", 4), final(tmp_path / "cut", 4))
    assert records(tmp_path / "whole") == records(tmp_path / "cut")
    assert "fused, attention sdpa (as asked)" in run(tmp_path / "cut", capsys, steps=6, attention="sdpa")
    assert load_checkpoint(final(tmp_path / "cut", 6)).state["choices"] == {"attention": "sdpa"}


def test_a_checkpoint_from_before_there_was_a_choice_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fastest("sdpa", monkeypatch)
    run(tmp_path / "run", capsys, steps=2)
    state = final(tmp_path / "run", 2) / "state.json"
    about = json.loads(state.read_text())
    del about["choices"]
    state.write_text(json.dumps(sealed(about)))
    assert "attention sdpa (measured: " in run(tmp_path / "run", capsys, steps=4)


def test_a_teacher_runs_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str], trainer: Any) -> None:
    one = trainer(target="teacher", precision="bf16", attention="matmul")
    networks = (one.model, one.teacher)
    assert {block.attn.backend.name for network in networks for block in network.blocks} == {"matmul"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--attention", "flash-attn"],
            "--attention must be one of auto, sdpa, matmul here, got flash-attn (not for cpu)",
        ),
        (
            ["--attention", "matmul", "--precision", "fp32"],
            "--attention must be one of auto, sdpa here, got matmul (needs bf16)",
        ),
        (["--attention", "fast"], "argument --attention: invalid choice: 'fast' (choose from"),
    ],
)
def test_an_attention_that_cannot_run_is_one_line_and_exit_code_2(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["train", "--out", str(tmp_path / "run"), "--device", "cpu", "--model", "16,1,2,4", "--precision", "bf16"]
    assert cli.main([*common, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (tmp_path / "run").exists()


def test_the_option_knows_every_name() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name in ("auto", *(name for names in backends.ATTENTION.values() for name in names)):
        assert read_options(parser.parse_args(["--out", "x", "--attention", name])).attention == name
    assert TrainOptions(out="x").attention == "auto"
