"""The stages of gpu_suite.py: what each runs on a GPU, and what of the same code its rehearsal runs on a CPU.

A stage takes eight minutes at most and needs none of the others. Its parts are processes, the most wanted first, and
rows of whole steps are processes of their own, so that never more than two SiT-XL/2 are in memory. Rehearsed, a part is
the same command with small sizes, run by cuda_stand_in.py; kernels go through Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from .suite_parts import Part
from .timing import ROOT

PYTHON = sys.executable
SANITIZER_FOUND = 99
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
INTERPRETED = (("TRITON_INTERPRET", "1"),)
XL = ("--model", "SiT-XL/2", "--batch-size", "32")
TINY = ("--model", "64,2,2,8", "--batch-size", "2")
LAUNCHED, COMPILED = ("--no-compile",), ("--compile",)
CAPTURED = (*COMPILED, "--graph")
MOST_PROCESSES = 12  # of tests: each compiles its own kernels, and holds half a gigabyte of the GPU


@dataclass(frozen=True)
class Plan:
    """Where the record is, and whether this is a rehearsal."""

    records: Path
    is_rehearsal: bool = False

    @property
    def _runner(self) -> tuple[str, ...]:
        stand_in = (str(ROOT / "benchmarks" / "lib" / "cuda_stand_in.py"),) if self.is_rehearsal else ()
        return (PYTHON, *stand_in)

    def script(self, name: str, *options: str) -> tuple[str, ...]:
        return (*self._runner, str(ROOT / "benchmarks" / f"{name}.py"), *options)

    def pytest(self, *options: str) -> tuple[str, ...]:
        return (*self._runner, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options)

    def gpu_tests(self, *names: str, options: tuple[str, ...] = (), is_alone: bool = False) -> tuple[str, ...]:
        """Tests of tests/gpu, in several processes where pytest-xdist is there, since Triton compiles on one core."""
        files = [str(ROOT / "tests" / "gpu" / f"test_{name}.py") for name in names]
        has_xdist = importlib.util.find_spec("xdist") is not None
        processes = min(MOST_PROCESSES, os.cpu_count() or 1)
        is_spread = has_xdist and not (is_alone or self.is_rehearsal)  # a worker does not start with the stand-in
        spread = ("-n", str(processes), "--dist", "worksteal") if is_spread else ("-p", "no:xdist")
        return self.pytest(*spread, "--maxfail=20", *options, *files)

    def step(self, *options: str, steps: int) -> tuple[str, ...]:
        """Options of a whole step's script."""
        size, steps = (TINY, 1) if self.is_rehearsal else (XL, steps)
        return (*size, "--device", "cuda", "--steps", str(steps), "--json", str(self.records), *options)


def kernels(plan: Plan) -> list[Part]:
    """The kernels are right: Triton's first, which need no build."""
    interpreted = INTERPRETED if plan.is_rehearsal else ()
    parts = [Part("kernel tests", plan.gpu_tests("kernels"), 150, environment=interpreted)]
    if plan.is_rehearsal:
        ahead = plan.script("aot_table", "--arch", "90", "--sizes", "SiT-XL", "--out", str(plan.records.parent))
        step_tests = plan.gpu_tests("gpu_step", options=("-k", "agrees and (baseline or cosine) and bf16"))
        parts += [
            Part("kernels compiled for sm_90", (PYTHON, *ahead[2:]), 400),  # for a GPU that need not be there
            Part("step tests, interpreted kernels", step_tests, 400, environment=interpreted),
        ]
    else:
        parts.append(build())
    return [
        *parts,
        Part("extension and optimizer tests", plan.gpu_tests("gpu_extension", "gpu_optim"), 100),
        Part("attention and product tests", plan.gpu_tests("gpu_attention", "gpu_linear"), 110),
        Part("step, trainer and prepare tests", plan.gpu_tests("gpu_step", "gpu_train", "gpu_prepare"), 150),
        Part("timer tests", plan.gpu_tests("gpu_timing", is_alone=True), 60),
    ]


def build() -> Part:
    """The extension, in place. Its rehearsal is every install of the package."""
    return Part("build", (PYTHON, str(ROOT / "setup.py"), "build_ext", "--inplace"), 150)


def peaks(plan: Plan) -> Part:
    size = ("--size", "256", "--copy-mib", "8") if plan.is_rehearsal else ()
    command = plan.script("peak", "--device", "cuda", "--json", str(plan.records), *size)
    return Part("peaks", command, 40, is_shown=True)


def step(plan: Plan) -> list[Part]:
    """Ours against the public style, eager and compiled; SRA 2 against the baseline."""

    def timed(name: str, implementation: str, limit_s: float, *options: str) -> Part:
        given = plan.step("--implementation", implementation, *options, steps=20)
        return Part(name, plan.script("step_time", *given), limit_s, is_shown=True)

    both, bf16 = ("--rows", "baseline,sra2-cosine"), ("--precision", "bf16")
    one = ("--rows", "baseline")
    return [
        peaks(plan),
        timed("ours, captured", "fused", 140, *both, *bf16, *CAPTURED),
        timed("public, bf16", "eager", 70, *one, *bf16, *LAUNCHED),
        timed("public, bf16, compiled", "eager", 180, *one, *bf16, *COMPILED),
        timed("ours, compiled", "fused", 120, *both, *bf16, *COMPILED),
        timed("ours, launched one by one", "fused", 80, *both, *bf16, *LAUNCHED),
        timed("public, tf32", "eager", 70, *one, "--precision", "tf32", *LAUNCHED),
        timed("public, float32", "eager", 80, *one, "--precision", "fp32", *LAUNCHED),
        timed("ours, tf32", "fused", 70, *one, "--precision", "tf32", *LAUNCHED),
        timed("smooth-L1, SRA, REPA", "fused", 120, "--rows", "sra2-smooth-l1,sra,repa", *bf16, *LAUNCHED),
    ]


def profile(plan: Plan) -> list[Part]:
    """Where the time of the step goes: a trace, its kernels, and the budget of each part."""
    rows = ("sra2-cosine", "baseline")
    trace = str(plan.records.with_name("step_trace.json.gz"))
    trace_options = plan.step("--row", rows[0], "--precision", "bf16", *CAPTURED, "--out", trace, steps=3)
    budgets = [
        Part(f"budget, {row}", plan.script("step_budget", *plan.step("--row", row, steps=10)), 120, is_shown=True)
        for row in rows
    ]
    return [Part("trace", plan.script("step_trace", *trace_options), 150, is_shown=True), *budgets]


def ops(plan: Plan) -> list[Part]:
    """Every op at the types of training and others, against eager, torch.compile and the best known libraries."""
    options = ["--bench-device", "cuda", "--bench-json", str(plan.records), "--bench-seconds", "0.3", "-p", "no:xdist"]
    if plan.is_rehearsal:
        options += ["--bench-small", "-k", "training or adamw"]
    benches = sorted((ROOT / "benchmarks").glob("bench_*.py"))
    parts = [Part(bench.stem, plan.pytest(str(bench), *options), 150, is_shown=True) for bench in benches]
    return [peaks(plan), *([] if plan.is_rehearsal else [build()]), *parts]


def memory(plan: Plan) -> list[Part]:
    """Peak memory and throughput by batch, ours and the public style."""
    batches = "1,2" if plan.is_rehearsal else "8,16,32,64,128,256"
    model = TINY[:2] if plan.is_rehearsal else XL[:2]
    given = (*model, "--batches", batches, "--device", "cuda", "--precision", "bf16", "--json", str(plan.records))
    given += LAUNCHED  # compiling for every batch takes the time
    return [
        Part(f"memory, {name}", plan.script("step_memory", *given, "--implementation", name), 200, is_shown=True)
        for name in ("fused", "eager")
    ]


def sample(plan: Plan) -> list[Part]:
    """Images a second, against the public loops."""
    size = (*TINY, "--sampling-steps", "2", "--steps", "1") if plan.is_rehearsal else ("--steps", "3")
    command = plan.script("sample_time", *size, "--device", "cuda", "--json", str(plan.records))
    return [Part("sample_time", command, 200, is_shown=True)]


def sanitize(plan: Plan) -> list[Part]:
    """compute-sanitizer over small shapes of every kernel, where it is there; without torch's caching of memory."""
    tests = plan.gpu_tests(
        "kernels", "gpu_extension", options=("-k", "one_row or without_a_norm or 130"), is_alone=True
    )
    environment = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    if plan.is_rehearsal:
        return [Part("what is sanitized", tests, 200, environment=INTERPRETED)]
    sanitizer = shutil.which("compute-sanitizer", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin")
    if sanitizer is None:
        return []
    common = (sanitizer, "--error-exitcode", str(SANITIZER_FOUND), "--target-processes", "all")
    under = [
        Part(tool, (*common, "--tool", tool, *tests), 150, environment=environment, failing_code=SANITIZER_FOUND)
        for tool in SANITIZER_TOOLS
    ]
    return [build(), *under]


STAGES: dict[str, Callable[[Plan], list[Part]]] = {
    "kernels": kernels,
    "step": step,
    "profile": profile,
    "ops": ops,
    "memory": memory,
    "sample": sample,
    "sanitize": sanitize,
}


def parts_of(stage: str, plan: Plan) -> list[Part]:
    """The parts of a stage. A rehearsal is no faster than its machine, and what it measures belongs in no cache."""
    parts = STAGES[stage](plan)
    if not plan.is_rehearsal:
        return parts
    caches = ("XDG_CACHE_HOME", str(plan.records.with_name("cache")))
    return [replace(part, limit_s=1200, environment=(*part.environment, caches)) for part in parts]
