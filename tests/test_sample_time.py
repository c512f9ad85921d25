"""benchmarks/sample_time.py: its rows compute the same, its figures, its exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sra2_fast import backends

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import sample_time

TINY = ["--model", "32,2,2,8", "--batch-size", "2", "--device", "cpu", "--steps", "2", "--sampling-steps", "4"]


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_every_row_draws_the_same_images(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.jsonl"
    interval = ["--guidance-interval", "0.2,0.6"]
    assert sample_time.main([*TINY, *interval, "--method", method, "--json", str(file)]) == 0
    records = {one["row"]: one for one in map(json.loads, file.read_text().splitlines())}
    expected = {"doubled", "repa", "ours"} | ({"ours bf16"} if backends.is_bf16_fast("cpu") else set())
    assert set(records) == expected
    assert all(records[name]["difference"] < 1e-5 for name in ("doubled", "repa", "ours"))
    assert records["doubled"]["speedup_over_doubled"] == records["repa"]["speedup_over_repa"] == 1.0
    for one in records.values():
        assert one["images_per_s"] == pytest.approx(2e3 / one["ms_median"])
        assert one["guidance_interval"] == [0.2, 0.6] and one["commit"]
    told = capsys.readouterr().out
    assert "guided for 0.2 <= t <= 0.6" in told and all(f"  {name} " in told for name in records)


def test_the_public_loop_doubles_always_or_inside_the_interval() -> None:
    seen: list[int] = []

    def model(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return y.to(x.dtype)[:, None, None, None].expand_as(x)

    model.num_classes = 10  # type: ignore[attr-defined]
    given: dict[str, Any] = {"steps": 4, "method": "euler", "cfg_scale": 2.0, "interval": (0.0, 0.5)}
    made = [
        sample_time.public_sampler(model, torch.zeros(1, 1, 2, 2), torch.tensor([3]), always_doubled=doubled, **given)
        for doubled in (True, False)
    ]
    assert seen == [2, 2, 2, 2, 1, 1, 2, 2]
    assert torch.equal(*made) and made[0][0, 0, 0, 0] == -(3 + 3 - 4 - 4) / 4


def test_a_row_that_draws_something_else_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = sample_time.sample_ode
    monkeypatch.setattr(sample_time, "sample_ode", lambda *args, **given: right(*args, **{**given, "cfg_scale": 1.0}))
    assert sample_time.main(TINY) == 1
    assert "sample_time: row ours differs from repa by" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--batch-size", "0"], "sample_time: --batch-size must be 1 or more, got 0"),
        (["--model", "SiT-Q/2"], "sample_time: --model SiT-Q/2 is not known"),
        (["--guidance-interval", "1,0"], "sample_time: --guidance-interval must be LOW,HIGH with 0 <= LOW"),
        (["--device", "tpu"], "sample_time: --device must be cpu or cuda, got tpu"),
        (["--json", "."], "sample_time: --json . cannot be written (Is a directory)"),
    ],
)
def test_bad_input_is_one_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample_time.main([*TINY, *words]) == 2
    last = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert last.startswith(line), last
