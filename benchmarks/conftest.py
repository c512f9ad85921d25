"""Options and the `compare` fixture of the op benchmarks: `pytest benchmarks/bench_<op>.py [--bench-device cuda]`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from lib.op_bench import Comparison, OpCase, compare_variants  # noqa: E402  (found on the path set just above)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sra2_fast benchmarks")
    group.addoption("--bench-device", default="cpu", help="cpu or cuda")
    group.addoption("--bench-small", action="store_true", help="sizes that show that it runs, and no more")
    group.addoption("--bench-json", default=None, help="append one JSON line a variant to this file")
    group.addoption("--bench-slow", action="store_true", help="also rivals that take minutes to compile")
    group.addoption("--bench-seconds", default=3.0, type=float, help="time for the counted rounds of one comparison")


@pytest.fixture
def bench_device(request: pytest.FixtureRequest) -> torch.device:
    """The device the benchmarks run on."""
    device = torch.device(request.config.getoption("--bench-device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return device


@pytest.fixture
def bench_size(request: pytest.FixtureRequest, bench_device: torch.device) -> str:
    """Which sizes of a bench to take: "cpu", "cuda" or "small"."""
    return "small" if request.config.getoption("--bench-small") else bench_device.type


@pytest.fixture
def compare(
    request: pytest.FixtureRequest,
    benchmark: Callable[..., object],
    bench_device: torch.device,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Comparison]:
    """`compare(case, variants, check=..., **options of compare_variants)`: one interleaved run, printed and recorded.

    The variant `fused` (or the first) is then given to pytest-benchmark, so that its own options work on it.
    """

    def run(case: OpCase, variants: Mapping[str, Callable[[], object]], **options: object) -> Comparison:
        options = {
            "device": bench_device,
            "max_seconds": request.config.getoption("--bench-seconds"),
            "json_path": request.config.getoption("--bench-json"),
            **options,
        }
        compared = compare_variants(case, variants, **options)  # type: ignore[arg-type]
        with capsys.disabled():
            print("\n" + compared.table())
        measured = "fused" if "fused" in variants else next(iter(variants))

        def call() -> None:
            variants[measured]()
            if bench_device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(call, rounds=5, warmup_rounds=1)  # type: ignore[attr-defined]
        benchmark.extra_info.update(  # type: ignore[attr-defined]
            {"variant": measured, **{name: timing.quantiles() for name, timing in compared.timings.items()}}
        )
        return compared

    return run
