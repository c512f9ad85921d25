"""Ctrl-C and SIGTERM become a flag that the loop reads between two steps, so that it can save and leave."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

STDERR = 2


class Interrupted(Exception):
    """Raised inside work that can be dropped (a sample grid), never inside a step or a save."""


class Interrupt:
    """Within `with Interrupt(step) as interrupt`, the first signal sets `interrupt.signal`; a second one acts as usual.

    step: the one under way, asked for at the first signal, for the line that says what happens now.
    Outside the main thread Python allows no handlers: then nothing is caught.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, step: Callable[[], int]) -> None:
        self.signal: signal.Signals | None = None
        self._step = step
        self._before: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as a shell reports it; 0 without one."""
        return 128 + self.signal if self.signal is not None else 0

    def check(self) -> None:
        """Raises Interrupted once a signal has come."""
        if self.signal is not None:
            raise Interrupted

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()
        line = f"\n{self.signal.name}: finishing step {self._step()} and saving; again to leave at once\n"
        os.write(STDERR, line.encode())  # not print: a handler may run in the middle of one

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
