"""benchmarks/gpu_suite.py without a GPU: what it says, its stages, its parts limited and recorded, and the stand-in."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_suite
from lib import suite_parts
from lib.suite_parts import Part, run_parts
from lib.suite_report import step_report
from lib.suite_stages import STAGES, Plan, parts_of

BENCHMARKS = ROOT / "benchmarks"
STAND_IN = BENCHMARKS / "lib" / "cuda_stand_in.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--out", str(tmp_path / "out")]) == 0
    assert "torch sees no GPU here; nothing was run (--rehearse runs" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "kernels,everything"], "gpu_suite: --stage must be some of kernels,step,.*, got everything"),
        (["--stage", ","], "gpu_suite: --stage must be some of .*, got ','"),
        (["--seconds", "0"], r"gpu_suite: --seconds must be above 0, got 0\.0"),
        (["--rehearse"], r"gpu_suite: --out .*/file cannot be written \(.*\); name another folder"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert gpu_suite.main(["--out", str(tmp_path / "file"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(message, line), line


def python(name: str, code: str, limit_s: float = 60, **options: Any) -> Part:
    return Part(name, (sys.executable, "-c", code), limit_s, **options)


def test_parts_run_with_the_package_on_their_path_and_are_recorded(tmp_path: Path) -> None:
    records = tmp_path / "gpu_suite.jsonl"
    planned = [
        python("good", "import os, sra2_fast; print('hello from', os.environ['WHO'])", environment=(("WHO", "good"),)),
        python("bad", "raise SystemExit(3)"),
    ]
    outcomes = run_parts("kernels", planned, records, 120, {"device": "x"})
    assert [one.result for one in outcomes] == ["passed", "failed (exit code 3)"]
    assert [one.is_failure for one in outcomes] == [False, True]
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert [(line["stage"], line["part"], line["device"]) for line in lines] == [
        ("kernels", "good", "x"),
        ("kernels", "bad", "x"),
    ]
    assert outcomes[0].tail == "hello from good" and "hello from good" in (tmp_path / "gpu_suite.log").read_text()


def test_a_part_that_hangs_is_ended_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_parts, "LEAST_SECONDS", 0.1)
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    planned = [python("hangs", child, limit_s=1.0), python("next", "pass")]
    outcomes = run_parts("step", planned, tmp_path / "gpu_suite.jsonl", 60, {})
    assert [one.result for one in outcomes] == ["out of time (1 s)", "passed"]
    assert outcomes[0].is_failure and outcomes[0].seconds < 10


@pytest.mark.parametrize(
    ("code", "result"), [(0, "passed"), (99, "failed (exit code 99)"), (1, "unmeasured: failed (exit code 1)")]
)
def test_a_tool_that_does_not_work_here_is_unmeasured(code: int, result: str, tmp_path: Path) -> None:
    tool = python("tool", f"raise SystemExit({code})", failing_code=99)
    (outcome,) = run_parts("sanitize", [tool], tmp_path / "gpu_suite.jsonl", 60, {})
    assert outcome.result == result and outcome.is_failure == (code == 99)


def test_what_no_longer_fits_is_not_run_and_is_no_failure(tmp_path: Path) -> None:
    planned = [python("late", "raise SystemExit(1)")]
    (outcome,) = run_parts("step", planned, tmp_path / "gpu_suite.jsonl", suite_parts.LEAST_SECONDS - 1, {})
    assert outcome.result == "not run: no time left" and not outcome.is_failure


@pytest.mark.parametrize("is_rehearsal", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stages_parts_name_files_that_are_there(stage: str, is_rehearsal: bool, tmp_path: Path) -> None:
    for part in parts_of(stage, Plan(tmp_path / "gpu_suite.jsonl", is_rehearsal)):
        assert all(Path(word).is_file() for word in part.command if word.endswith(".py"))
        assert is_rehearsal or part.limit_s <= 200
        assert (str(STAND_IN) in part.command) == (is_rehearsal and "sm_90" not in part.name)


def test_every_bench_and_every_gpu_test_is_in_a_stage(tmp_path: Path) -> None:
    """The plan names test files; one that is added later must not stay out."""
    plan = Plan(tmp_path / "gpu_suite.jsonl")
    words = {Path(word).stem for stage in STAGES for part in parts_of(stage, plan) for word in part.command}
    assert {path.stem for path in BENCHMARKS.glob("bench_*.py")} <= words
    assert {path.stem for path in (ROOT / "tests" / "gpu").glob("test_*.py")} <= words
    assert gpu_suite.STAGE_SECONDS < 8 * 60


def test_the_report_sets_every_step_beside_the_public_one(tmp_path: Path) -> None:
    records = tmp_path / "gpu_suite.jsonl"
    common = {"row": "baseline", "precision": "bf16", "mfu": 0.5, "images_per_s": 320.0, "peak_memory_bytes": 2**30}
    common |= {"captured": False}
    steps = [("eager", False, 120.0), ("eager", True, 75.0), ("fused", True, 999.0), ("fused", True, 50.0)]
    lines = [
        {**common, "implementation": how, "compiled": is_compiled, "ms_median": ms, "device": "card"}
        for how, is_compiled, ms in steps
    ]
    lines.append({**lines[-1], "captured": True, "ms_median": 40.0})
    lines.append({"stage": "step", "part": "peaks", "result": "passed"})
    records.write_text("\n".join(map(json.dumps, lines)))
    table = step_report(records).splitlines()
    assert table[1] == "card" and len(table) == 7  # the last measurement of a row stands for it
    assert table[-2].split()[:4] == ["baseline", "fused,", "compiled", "bf16"]
    assert table[-2].split()[4:] == ["50.0", "320", "50", "%", "1.0", "2.40x", "1.50x"]
    assert "fused, compiled, captured" in table[-1] and table[-1].split()[-2:] == ["3.00x", "1.88x"]


def stand_in(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, str(STAND_IN), *command], cwd=ROOT, env=environ, capture_output=True, text=True
    )


CUDA_CODE = """
import torch
device = torch.device("cuda")
x = torch.ones(3, device=device)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = x * 2
    x += y
assert x.tolist() == [1, 1, 1]  # a capture runs nothing
graph.replay()
assert y.tolist() == [2, 2, 2] and x.tolist() == [3, 3, 3]
x.fill_(5)
graph.replay()
assert y.tolist() == [10, 10, 10] and x.tolist() == [15, 15, 15]
begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
begin.record()
end.record()
assert begin.elapsed_time(end) > 0
assert torch.cuda.get_device_capability() == (9, 0) and x.pin_memory().device.type == "cpu"
with torch.autocast("cuda", torch.bfloat16):
    assert (torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda:0")).dtype == torch.bfloat16
try:
    torch.cuda.get_device_properties()
    torch.cuda.mem_get_info(1, 2)
except TypeError:
    print("as torch has it")
"""


@pytest.mark.slow
def test_the_stand_in_does_what_cuda_does_and_refuses_what_torch_does(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CUDA_CODE)
    done = stand_in(str(script))
    assert done.returncode == 0 and done.stdout == "as torch has it\n", done.stderr


@pytest.mark.slow
def test_a_part_of_the_rehearsal_passes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cheapest one; the others are too long for a test: `gpu_suite.py --rehearse`."""
    monkeypatch.setattr(gpu_suite, "parts_of", lambda stage, plan: parts_of(stage, plan)[:1])
    assert gpu_suite.main(["--out", str(tmp_path), "--stage", "memory", "--rehearse"]) == 0, capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "rehearsal.jsonl").read_text().splitlines()]
    measured = [(one["implementation"], one["batch_size"]) for one in lines if one.get("bench") == "step_memory"]
    assert measured == [("fused", 1), ("fused", 2)]
    assert {one["device"] for one in lines if "bench" in one} == {"a CPU in a GPU's place"}
