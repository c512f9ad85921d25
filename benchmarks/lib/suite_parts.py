"""The parts of a suite: commands with a time limit each, run in order, every outcome a line of the record.

A part is a process of its own, so that a crash or a hang costs that part only; what no longer fits into the time is
listed as not run. What the parts are: suite_stages.py.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from .timing import ROOT, append_json_line

LEAST_SECONDS = 15.0
TAIL_LINES = 40


@dataclass(frozen=True)
class Part:
    """One process: its command, and the most seconds it may take of the time that is left.

    environment: (name, value) pairs on top of ours. is_shown: print the end of its output though it passed.
    failing_code: the only exit code that counts against the run, for a tool that does not work on every machine; None
    where anything but 0 does, running out of time included.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    environment: tuple[tuple[str, str], ...] = ()
    is_shown: bool = False
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


def run_part(part: Part, seconds_left: float, log: Path) -> Outcome:
    """Run one part within its limit and the time left; its output is added to `log`."""
    limit = min(part.limit_s, seconds_left)
    if limit < LEAST_SECONDS:
        return Outcome(part.name, "not run: no time left", 0.0)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **dict(part.environment)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
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
            result = f"out of time ({limit:.0f} s)"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)  # its own session: its compile workers go with it
                process.wait()
    if part.failing_code is not None and result != f"failed (exit code {part.failing_code})" and result != "passed":
        result = f"unmeasured: {result}"
    text = log.read_bytes()[start:].decode("utf-8", errors="replace").replace("\r", "\n")
    lines = [line for line in text.splitlines() if line.strip()]
    return Outcome(part.name, result, time.monotonic() - begin, "\n".join(lines[-TAIL_LINES:]))


def run_parts(
    stage: str, planned: Sequence[Part], records: Path, total_seconds: float, about: dict[str, object]
) -> list[Outcome]:
    """Run the parts of a stage in order, one JSON line each, and print how each ended."""
    end = time.monotonic() + total_seconds
    outcomes = []
    for part in tqdm(planned, desc=stage, unit="part"):
        outcome = run_part(part, end - time.monotonic(), records.with_suffix(".log"))
        outcomes.append(outcome)
        line = {"stage": stage, "part": part.name, "result": outcome.result, "seconds": round(outcome.seconds, 1)}
        append_json_line(records, {**line, **about})
        tqdm.write(f"{stage}: {part.name}: {outcome.result}, {outcome.seconds:.0f} s")
        if part.is_shown or outcome.is_failure:
            tqdm.write(outcome.tail)
    return outcomes
