"""Everything that needs a GPU, in one command and under eight minutes: build, test, bench, time whole steps.

    python benchmarks/gpu_suite.py --out DIR

Works from a checkout with no network and nothing installed but torch, pytest and pytest-benchmark: the extension is
built in place and the children find the package through PYTHONPATH. Each part is a process of its own with a time
limit, so that a crash or a hang costs that part only; what no longer fits into the time is listed as not run. DIR gets
`gpu_suite.jsonl` (one line a part, a bench variant, a step-time row) and `gpu_suite.log` (all their output). Without a
GPU it says so and exits 0. Exit code 1: some part failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from lib import peers
from lib.timing import ROOT, append_json_line, environment
from peak import copy_bytes_per_s, product_flop_per_s
from tqdm import tqdm

from sra2_fast import backends

TOTAL_SECONDS = 460.0
LEAST_SECONDS = 15.0
TAIL_LINES = 30
SANITIZER_FOUND = 99


@dataclass(frozen=True)
class Part:
    """One process: its command, and the most seconds it may take of the time that is left.

    failing_code: the only exit code that counts against the run, for a tool that does not work on every machine; None
    where anything but 0 does, running out of time included.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    failing_code: int | None = None


@dataclass(frozen=True)
class Outcome:
    """How a part ended: `passed`, `failed (exit code N)`, `out of time`, or `not run: WHY`."""

    name: str
    result: str
    seconds: float
    tail: str = ""

    @property
    def is_failure(self) -> bool:
        return self.result.startswith(("failed", "out of time"))


def parts(records: Path) -> list[Part]:
    """What to run, the most wanted first; benches and step times append to `records`."""
    python = sys.executable
    benches = sorted(str(path) for path in (ROOT / "benchmarks").glob("bench_*.py"))
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    xl = ("--model", "SiT-XL/2", "--batch-size", "32", "--precision", "bf16", "--json", str(records))
    step_time = (python, str(ROOT / "benchmarks" / "step_time.py"), "--device", "cuda", *xl, "--steps", "10")
    speedup = (python, str(ROOT / "benchmarks" / "fused_speedup.py"), *xl, "--compile")
    sampling = (python, str(ROOT / "benchmarks" / "sample_time.py"), "--device", "cuda", "--json", str(records))
    planned = [
        Part("build", (python, str(ROOT / "setup.py"), "build_ext", "--inplace"), 150),
        Part("tests", (*pytest, "--maxfail=20", str(ROOT / "tests" / "gpu")), 100),
        Part("step_time fused", (*step_time, "--implementation", "fused"), 80),
        Part("step_time eager", (*step_time, "--implementation", "eager"), 80),
        Part("fused_speedup compiled", speedup, 120),
        Part("sample_time", (*sampling, "--steps", "3"), 90),
    ]
    options = ("--bench-device", "cuda", "--bench-json", str(records), "--bench-seconds", "0.4")
    planned += [Part(Path(bench).stem, (*pytest, bench, *options), 60) for bench in benches]
    sanitizer = shutil.which("compute-sanitizer", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin")
    if sanitizer is not None:
        found = str(SANITIZER_FOUND)
        under = (sanitizer, "--tool", "memcheck", "--error-exitcode", found, "--target-processes", "all")
        few = (*pytest, str(ROOT / "tests" / "gpu" / "test_gpu_extension.py"), "-k", "130")
        planned.append(Part("compute-sanitizer", (*under, *few), 90, failing_code=SANITIZER_FOUND))
    return planned


def run_part(part: Part, seconds_left: float, log: Path, environment: dict[str, str]) -> Outcome:
    """Run one part within its limit and the time left; its output is added to `log`."""
    limit = min(part.limit_s, seconds_left)
    if limit < LEAST_SECONDS:
        return Outcome(part.name, "not run: no time left", 0.0)
    begin = time.monotonic()
    with log.open("ab") as output:
        output.write(f"\n== {part.name}: {' '.join(part.command)}\n".encode())
        output.flush()
        start = output.tell()
        process = subprocess.Popen(
            part.command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit)
            result = "passed" if code == 0 else f"failed (exit code {code})"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # its own session: its compile workers go with it
            process.wait()
            result = f"out of time ({limit:.0f} s)"
    if part.failing_code is not None and result != f"failed (exit code {part.failing_code})" and result != "passed":
        result = f"unmeasured: {result}"
    text = log.read_bytes()[start:].decode("utf-8", errors="replace").replace("\r", "\n")
    lines = [line for line in text.splitlines() if line.strip()]
    return Outcome(part.name, result, time.monotonic() - begin, "\n".join(lines[-TAIL_LINES:]))


def run_all(planned: list[Part], records: Path, total_seconds: float, about: dict[str, object]) -> list[Outcome]:
    """Run the parts in order, one JSON line each, and print how each ended."""
    end = time.monotonic() + total_seconds
    child = dict(os.environ, PYTHONUNBUFFERED="1")
    child["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    outcomes = []
    for part in tqdm(planned, desc="gpu_suite", unit="part"):
        outcome = run_part(part, end - time.monotonic(), records.with_suffix(".log"), child)
        outcomes.append(outcome)
        line = {"part": part.name, "result": outcome.result, "seconds": round(outcome.seconds, 1)}
        append_json_line(records, {**line, **about})
        tqdm.write(f"{part.name}: {outcome.result}, {outcome.seconds:.0f} s")
        if part.name.startswith(("step_time", "fused_speedup", "sample_time", "bench_")) or outcome.is_failure:
            tqdm.write(outcome.tail)
    return outcomes


def measure_peaks() -> dict[str, object]:
    """The ceilings of this GPU, measured."""
    return {
        "part": "peaks",
        "product_tflop_per_s_bf16": product_flop_per_s("cuda", torch.bfloat16) * 1e-12,
        "product_tflop_per_s_fp32": product_flop_per_s("cuda", torch.float32, rounds=3, size=4096) * 1e-12,
        "copy_gb_per_s": copy_bytes_per_s("cuda") * 1e-9,
    }


def main(argv: list[str] | None = None, plan: Callable[[Path], list[Part]] = parts) -> int:
    """Exit code 0 where all parts passed or there is no GPU, 1 where one failed, 2 where --out cannot be written."""
    parser = argparse.ArgumentParser(prog="gpu_suite", description="Build, test and benchmark on a GPU.")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for gpu_suite.jsonl and .log")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all parts together [%(default)s]")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_suite: torch sees no GPU here; nothing was run")
        return 0
    begin = time.monotonic()
    out = Path(args.out).resolve()
    records = out / "gpu_suite.jsonl"
    try:
        out.mkdir(parents=True, exist_ok=True)
        about = environment("cuda")
        append_json_line(records, {**measure_peaks(), **about})
    except OSError as error:
        print(f"gpu_suite: --out {out} cannot be written: {error}", file=sys.stderr)
        return 2
    told = peers.report()
    append_json_line(records, {"part": "peers", "peers": told, "backends": backends.status(), **about})
    torch.cuda.empty_cache()
    outcomes = run_all(plan(records), records, args.seconds - (time.monotonic() - begin), about)
    print("\n".join(f"{one.name:<48} {one.result:<24} {one.seconds:6.0f} s" for one in outcomes))
    print("\n".join(f"peer {name}: {why}" for name, why in told.items()))
    print(f"{time.monotonic() - begin:.0f} s in all; {records}")
    return 1 if any(one.is_failure for one in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
