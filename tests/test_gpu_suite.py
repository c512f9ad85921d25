"""benchmarks/gpu_suite.py without a GPU: it says so; and its parts, which need none to be run, limited and recorded."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu_suite
from gpu_suite import Part


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--out", str(tmp_path / "out")]) == 0
    assert "torch sees no GPU here; nothing was run" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def python(name: str, code: str, limit_s: float = 60) -> Part:
    return Part(name, (sys.executable, "-c", code), limit_s)


def test_parts_run_with_the_package_on_their_path_and_are_recorded(tmp_path: Path) -> None:
    records = tmp_path / "gpu_suite.jsonl"
    planned = [
        python("good", "import sra2_fast; print('hello from good')"),
        python("bad", "raise SystemExit(3)"),
    ]
    outcomes = gpu_suite.run_all(planned, records, 120, {"device": "x"})
    assert [one.result for one in outcomes] == ["passed", "failed (exit code 3)"]
    assert [one.is_failure for one in outcomes] == [False, True]
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert [(line["part"], line["device"]) for line in lines] == [("good", "x"), ("bad", "x")]
    assert outcomes[0].tail == "hello from good" and "hello from good" in (tmp_path / "gpu_suite.log").read_text()


def test_a_part_that_hangs_is_ended_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "LEAST_SECONDS", 0.1)
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    planned = [python("hangs", child, limit_s=1.0), python("next", "pass")]
    outcomes = gpu_suite.run_all(planned, tmp_path / "gpu_suite.jsonl", 60, {})
    assert [one.result for one in outcomes] == ["out of time (1 s)", "passed"]
    assert outcomes[0].is_failure and outcomes[0].seconds < 10


@pytest.mark.parametrize(
    ("code", "result"), [(0, "passed"), (99, "failed (exit code 99)"), (1, "unmeasured: failed (exit code 1)")]
)
def test_a_tool_that_does_not_work_here_is_unmeasured(code: int, result: str, tmp_path: Path) -> None:
    tool = Part("tool", (sys.executable, "-c", f"raise SystemExit({code})"), 60, failing_code=99)
    (outcome,) = gpu_suite.run_all([tool], tmp_path / "gpu_suite.jsonl", 60, {})
    assert outcome.result == result and outcome.is_failure == (code == 99)


def test_what_no_longer_fits_is_not_run_and_is_no_failure(tmp_path: Path) -> None:
    planned = [python("late", "raise SystemExit(1)")]
    (outcome,) = gpu_suite.run_all(planned, tmp_path / "gpu_suite.jsonl", gpu_suite.LEAST_SECONDS - 1, {})
    assert outcome.result == "not run: no time left" and not outcome.is_failure


def test_the_plan_builds_first_and_fits_eight_minutes(tmp_path: Path) -> None:
    planned = gpu_suite.parts(tmp_path / "gpu_suite.jsonl")
    names = [part.name for part in planned]
    assert names[:2] == ["build", "tests"] and "step_time fused" in names and "step_time eager" in names
    benches = sorted(path.stem for path in Path(gpu_suite.__file__).parent.glob("bench_*.py"))
    assert set(benches) <= set(names)
    for part in planned:
        assert all(Path(word).exists() for word in part.command if word.endswith(".py") or word.endswith("gpu"))
    assert gpu_suite.TOTAL_SECONDS < 8 * 60
