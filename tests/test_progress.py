"""One progress bar: lively on a terminal, rare in a log file."""

from __future__ import annotations

import io
import sys

import pytest

from sra2_fast.progress import LOG_INTERVAL_S, TERMINAL_INTERVAL_S, progress_bar


class Screen(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.mark.parametrize(("is_terminal", "interval"), [(True, TERMINAL_INTERVAL_S), (False, LOG_INTERVAL_S)])
def test_a_log_file_gets_few_lines(monkeypatch: pytest.MonkeyPatch, is_terminal: bool, interval: float) -> None:
    """`prepare` wrote ten lines a second into a log file."""
    screen = Screen(is_terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_bar(total=500, desc="counting", file=screen) as bar:
        assert bar.mininterval == interval and (is_terminal or interval >= 5.0), (
            "a line a tenth of a second is too many"
        )
        for _ in range(500):
            bar.update()
    assert "counting: 100%" in screen.getvalue()
    if not is_terminal:
        assert screen.getvalue().count("\r") <= 3  # the first, the last, and the clearing between


def test_options_of_the_caller_win() -> None:
    with progress_bar(total=1, mininterval=3.0, file=io.StringIO()) as bar:
        assert bar.mininterval == 3.0
