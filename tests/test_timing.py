"""The timer: interleaving, quantiles, pairing, memory, and the JSON lines."""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from lib import op_bench, timing


def test_interleave_calls_variants_in_turn_and_counts_only_rounds_after_the_warmup() -> None:
    order: list[str] = []
    seen: list[str] = []
    taken = timing.interleave(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=2, on_call=seen.append
    )
    assert order == ["a", "b"] * 5 == seen
    assert [len(taken[name].samples_ms) for name in "ab"] == [3, 3]


def test_interleave_measures_the_call_and_not_what_happens_around_it() -> None:
    taken = timing.interleave(
        {"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.010)},
        rounds=5,
        warmup=1,
        on_call=lambda name: time.sleep(0.02),
    )
    assert 2 <= taken["short"].ms_median < 10 <= taken["long"].ms_median < 30
    assert timing.paired_ratio(taken["long"], taken["short"]) > 1.5


def test_interleave_chooses_its_rounds_from_the_time_allowed() -> None:
    calls = {"sleep": lambda: time.sleep(0.005)}
    assert len(timing.interleave(calls, warmup=1, max_seconds=0.1)["sleep"].samples_ms) in range(5, 21)
    assert len(timing.interleave(calls, warmup=1, max_seconds=0.0)["sleep"].samples_ms) == 5


def test_interleave_keeps_the_garbage_collector_off_and_turns_it_on_again() -> None:
    states: list[bool] = []
    timing.interleave({"a": lambda: states.append(gc.isenabled())}, rounds=2, warmup=0)
    assert states == [False, False] and gc.isenabled()

    def fails() -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        timing.interleave({"a": fails}, rounds=1)
    assert gc.isenabled()


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"rounds": 1, "warmup": -1}, {"warmup": 0}])
def test_interleave_refuses_what_cannot_be_measured(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="interleave"):
        timing.interleave({"a": lambda: None}, **wrong)


def test_quantiles_and_paired_ratio() -> None:
    ours = timing.Timing((1.0, 2.0, 3.0, 4.0, 100.0))
    assert (ours.ms_median, ours.ms_p20, ours.ms_p80) == pytest.approx((3.0, 1.8, 23.2))
    drifting = timing.Timing((2.0, 4.0, 6.0, 8.0, 100.0))
    # Pairing by round: a drift common to both cancels, which the ratio of medians of unequal rounds would not show.
    assert timing.paired_ratio(drifting, ours) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="must have 5 samples, got 1"):
        timing.paired_ratio(timing.Timing((1.0,)), ours)


def test_peak_memory_is_the_most_held_at_once() -> None:
    x = torch.randn(256, 1024)  # 1 MiB
    kept: list[torch.Tensor] = []

    def call() -> None:
        a = x + x
        b = a + x
        del a
        kept.append(b + x)

    call()
    kept.clear()
    assert timing.peak_memory_bytes(call) == 2 << 20  # a and b, then b and the result; never three
    assert timing.peak_memory_bytes(lambda: x.add_(x)) == 0


def test_peak_memory_sees_what_autograd_keeps_for_the_backward() -> None:
    x = torch.randn(64, 4096, requires_grad=True)  # 1 MiB
    backward = timing.peak_memory_bytes(lambda: torch.autograd.grad(x.exp().exp().sum(), x))
    assert backward >= 3 << 20  # two saved results and a gradient


def test_peak_memory_passes_on_what_the_call_writes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    def call() -> None:
        sys.stderr.write("from the call\n")
        torch.ones(8)

    timing.peak_memory_bytes(call)
    assert capfd.readouterr().err == "from the call\n"


def test_json_lines_append_and_refuse_nan(tmp_path: Path) -> None:
    file = tmp_path / "results" / "a.jsonl"
    timing.append_json_line(file, {"a": 1})
    timing.append_json_line(file, {"a": None})
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"a": 1}, {"a": None}]
    with pytest.raises(ValueError, match="JSON compliant"):
        timing.append_json_line(file, {"a": float("nan")})


def test_environment_names_commit_device_and_versions() -> None:
    where = timing.environment("cpu")
    assert where["commit"] and "threads" in str(where["device"])
    assert where["versions"]["torch"] == torch.__version__  # type: ignore[index]


def test_commit_outside_git_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(timing, "ROOT", tmp_path)
    assert timing.commit() == "unknown"


def _square_shifted(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * x + y


@pytest.mark.parametrize("direction", op_bench.DIRECTIONS)
def test_passes_compute_what_they_say(direction: str) -> None:
    x, y = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    dz = torch.randn(5, 3)
    call = op_bench.passes(_square_shifted, (x, y), (dz,), direction)
    for _ in range(2):  # the backward's graph is kept
        (got,) = call()  # type: ignore[misc]
        want = _square_shifted(x, y) if direction == "forward" else 2 * x * dz
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_passes_refuse_an_unknown_direction() -> None:
    with pytest.raises(ValueError, match="must be one of forward, backward, both, got 'sideways'"):
        op_bench.passes(_square_shifted, (), (), "sideways")


def test_comparison_records_every_variant_and_checks_before_and_after(tmp_path: Path) -> None:
    x = torch.randn(64, 64)
    checks: list[int] = []
    case = op_bench.OpCase("double", (64, 64), torch.float32, "forward", bytes_moved=2 * 64 * 64 * 4, extra={"note": 1})
    file = tmp_path / "ops.jsonl"
    compared = op_bench.compare_variants(
        case,
        {"eager": lambda: x.add(x), "fused": lambda: x + x},
        check=lambda: checks.append(1),
        rounds=3,
        json_path=str(file),
    )
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["variant"] for line in lines] == ["eager", "fused", "copy"] and len(checks) == 2
    assert lines[0]["speedup_over_eager"] == 1 and lines[2]["copy_share"] == 1
    assert lines[0]["peak_memory_bytes"] == 64 * 64 * 4 and lines[0]["note"] == 1
    assert {"commit", "device", "versions", "shape", "dtype", "ms_median", "ms_p20", "ms_p80"} <= set(lines[0])
    assert compared.speedup("fused", "eager") == pytest.approx(lines[1]["speedup_over_eager"])
    assert "fused" in compared.table()


def test_a_failed_check_stops_a_comparison() -> None:
    def check() -> None:
        raise AssertionError("fused is wrong")

    case = op_bench.OpCase("double", (1,), torch.float32, "forward", bytes_moved=8)
    with pytest.raises(AssertionError, match="fused is wrong"):
        op_bench.compare_variants(case, {"fused": lambda: None}, check=check, rounds=1)
