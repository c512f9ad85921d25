"""The one timer of every whole-step and op comparison: variants interleaved A B A B, medians with 20/80 % quantiles.

Interleaving puts slow minutes of the machine on all variants alike, so ratios of one run hold where absolute times do
not. On a GPU every call starts with a cold L2 (a buffer of twice its size is zeroed before it) and is timed by events
on the stream; `graphed` turns a call into the replay of its CUDA graph, which takes launch gaps out. On the CPU the
caches are left as the variant before left them, and the clock is `perf_counter_ns`. Callers allocate inputs and draw
random numbers beforehand: nothing but the variant runs between the two clock readings. The garbage collector is off.

Left out: any choice of what to compare (the benches) and any drawing (plot.py).
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from sra2_fast import backends

ROOT = Path(__file__).resolve().parents[2]
L2_BYTES_IF_UNKNOWN = 64 << 20
PROFILER_CHATTER = (b"USDT:", b"Memory block of unknown size")


@dataclass(frozen=True)
class Timing:
    """Samples of one variant in ms, in the order of the rounds, so that two variants' samples pair up by round."""

    samples_ms: tuple[float, ...]

    @property
    def ms_median(self) -> float:
        return quantile(self.samples_ms, 0.5)

    @property
    def ms_p20(self) -> float:
        return quantile(self.samples_ms, 0.2)

    @property
    def ms_p80(self) -> float:
        return quantile(self.samples_ms, 0.8)

    def quantiles(self) -> dict[str, float]:
        """The three figures under the names every JSON line uses."""
        return {"ms_median": self.ms_median, "ms_p20": self.ms_p20, "ms_p80": self.ms_p80}


def quantile(samples: tuple[float, ...] | list[float], q: float) -> float:
    """The q quantile of the samples, linear between neighbours."""
    return float(np.quantile(np.asarray(samples, dtype=np.float64), q))


def paired_ratio(timing: Timing, baseline: Timing) -> float:
    """median over rounds of time / baseline's time in the same round; 1.10 is 10 % slower than the baseline."""
    if len(timing.samples_ms) != len(baseline.samples_ms):
        raise ValueError(
            f"paired_ratio: timing must have {len(baseline.samples_ms)} samples, got {len(timing.samples_ms)}"
        )
    return quantile([a / b for a, b in zip(timing.samples_ms, baseline.samples_ms, strict=True)], 0.5)


def interleave(
    variants: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    rounds: int | None = None,
    warmup: int = 2,
    max_seconds: float = 4.0,
    cold_l2: bool = True,
    on_call: Callable[[str], None] | None = None,
) -> dict[str, Timing]:
    """Time the variants in turn, one call each a round, after `warmup` rounds that are not counted.

    variants: name -> call without arguments; what it returns is dropped after its clock has stopped.
    rounds: counted rounds; None takes as many as fit into `max_seconds` by the last warm-up round, 5 to 200.
    cold_l2: on a GPU, zero a buffer of twice the L2 before every call.
    on_call: called with the variant's name after each call, outside the timed region (progress bars).
    Returns name -> Timing.
    """
    device = torch.device(device)
    if not variants or (rounds is not None and rounds < 1) or warmup < 0:
        raise ValueError("interleave: variants, rounds >= 1 and warmup >= 0 are needed")
    if rounds is None and warmup < 1:
        raise ValueError("interleave: rounds=None needs warmup >= 1 to measure how many fit")
    measure = _cuda_round if device.type == "cuda" else _cpu_round
    flush = l2_flush_buffer(device) if device.type == "cuda" and cold_l2 else None
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        round_seconds = 0.0
        for _ in range(warmup):
            begin = time.perf_counter()
            measure(variants, flush, on_call)
            round_seconds = time.perf_counter() - begin
        if rounds is None:
            rounds = max(5, min(200, int(max_seconds / max(round_seconds, 1e-9))))
        taken = [measure(variants, flush, on_call) for _ in range(rounds)]
    finally:
        if was_enabled:
            gc.enable()
    return {name: Timing(tuple(one[name] for one in taken)) for name in variants}


def _cpu_round(
    variants: Mapping[str, Callable[[], object]], flush: None, on_call: Callable[[str], None] | None
) -> dict[str, float]:
    taken = {}
    for name, call in variants.items():
        begin = time.perf_counter_ns()
        result = call()
        end = time.perf_counter_ns()
        del result
        taken[name] = (end - begin) * 1e-6
        if on_call is not None:
            on_call(name)
    return taken


def _cuda_round(
    variants: Mapping[str, Callable[[], object]], flush: torch.Tensor | None, on_call: Callable[[str], None] | None
) -> dict[str, float]:
    events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in variants}
    torch.cuda.synchronize()
    for name, call in variants.items():
        if flush is not None:
            flush.zero_()
        events[name][0].record()
        result = call()
        events[name][1].record()
        del result
        if on_call is not None:
            on_call(name)
    torch.cuda.synchronize()
    return {name: begin.elapsed_time(end) for name, (begin, end) in events.items()}


def l2_flush_buffer(device: torch.device) -> torch.Tensor:
    """A buffer of twice the device's L2; zeroing it evicts what a variant left there."""
    l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", L2_BYTES_IF_UNKNOWN)
    return torch.empty(2 * (l2_bytes or L2_BYTES_IF_UNKNOWN), dtype=torch.int8, device=device)


@lru_cache(maxsize=1)
def capture_stream() -> torch.cuda.Stream:
    """The stream of every capture; a backward can only be captured where its forward ran, so bench forwards use it."""
    return torch.cuda.Stream()


def graphed(call: Callable[[], object], warmup: int = 3) -> Callable[[], object]:
    """The replay of `call` captured in a CUDA graph, after `warmup` calls on the capture stream.

    The call must take no input that changes address and must not synchronise; its memory stays in the graph's pool.
    """
    side = capture_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        kept = call()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def peak_memory_bytes(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most bytes torch's allocator held at once while `call` ran, above what it held at the start.

    CUDA: `max_memory_allocated` less the level at entry. CPU: the running sum of the allocator's own profiling events,
    which is the same quantity; scratch that a library takes from malloc itself (oneDNN, MKL) is in neither. Inputs
    are not counted. On the CPU a block freed during the call but allocated before it counts as still held.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        at_entry = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - at_entry
    activities = [torch.profiler.ProfilerActivity.CPU]
    with without_profiler_chatter(), torch.profiler.profile(activities=activities, profile_memory=True) as profiled:
        result = call()
        del result
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profiled.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    if not changes:
        return 0
    held = np.cumsum([nbytes for _, nbytes in sorted(changes, key=lambda change: change[0])])
    return max(0, int(held.max()))


@contextmanager
def without_profiler_chatter() -> Iterator[None]:
    """Drop the profiler's own lines from stderr; pass everything else on when done."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            caught.seek(0)
            for line in caught:
                if not any(chatter in line for chatter in PROFILER_CHATTER):
                    os.write(saved, line)
            os.close(saved)


def commit() -> str:
    """The checkout's short commit, `+changes` when tracked files differ from it, `unknown` outside git."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def environment(device: torch.device | str) -> dict[str, object]:
    """The part of a JSON line that says where and with what it was measured."""
    return {"commit": commit(), "device": backends.device_name(device), "versions": backends.versions()}


def append_json_line(path: str | Path, record: Mapping[str, object]) -> None:
    """Append `record` to `path` as one line of JSON, creating the folder; NaN and infinities are refused."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(record, allow_nan=False) + "\n")
