"""What a benchmark is doing: on its progress bar, and on a line of its own once one thing takes longer than a minute.

A step in an emulated type takes minutes, and a bar that stands still does not say why. The minute is watched by a
thread that sleeps through it, so that nothing runs beside what is timed.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence

from tqdm import tqdm

from sra2_fast.progress import progress_bar

NOTICE_SECONDS = 60.0


class Doing:
    """`with Doing(...) as doing: doing("row sra: building")`; what takes too long is told once on stderr.

    op: the benchmark's name. advice: what would make it faster. total: steps of the bar, which `doing.bar` counts.
    """

    def __init__(self, op: str, title: str, total: int, advice: str) -> None:
        self.op, self.advice = op, advice
        self.bar = progress_bar(total=total, desc=title, unit="step", leave=False)
        self._current = ("starting", time.monotonic())
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Doing:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()
        self.bar.close()

    def __call__(self, what: str) -> None:
        """`what` begins now."""
        self._current = (what, time.monotonic())
        self.bar.set_postfix_str(what, refresh=sys.stderr.isatty())  # a refresh is a line in a log file

    def rounds(self, names: Sequence[str], warmup: int, rounds: int, counted: Sequence[str]) -> Callable[[str], None]:
        """An `on_call` for `interleave`: says which of `names` comes next, and counts the `counted` ones on the bar."""
        calls = 0

        def say() -> None:
            number, place = divmod(calls, len(names))
            which = "warming up" if number < warmup else f"timing round {number - warmup + 1} of {rounds}"
            self(f"{which}, {names[place]}")

        def after(name: str) -> None:
            nonlocal calls
            calls += 1
            self.bar.update(name in counted)
            if calls < len(names) * (warmup + rounds):
                say()

        say()
        return after

    def _watch(self) -> None:
        told: tuple[str, float] | None = None
        seconds = NOTICE_SECONDS
        wait = seconds
        while not self._is_over.wait(wait):
            current = self._current
            what, since = current
            wait = seconds - (time.monotonic() - since)
            if wait > 0:
                continue
            if current is not told:
                line = f"{self.op}: {what}: {seconds - wait:.0f} s so far; faster with {self.advice}"
                tqdm.write(line, file=sys.stderr)
            told, wait = current, seconds
