"""One progress bar for every command: lively on a terminal, a line every ten seconds in a log file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

TERMINAL_INTERVAL_S = 0.2
LOG_INTERVAL_S = 10.0


def progress_bar(**options: Any) -> tqdm:
    """tqdm(**options), redrawn on stderr as often as its reader can use; what `options` says goes before that."""
    interval = TERMINAL_INTERVAL_S if sys.stderr.isatty() else LOG_INTERVAL_S
    return tqdm(**{"dynamic_ncols": True, "mininterval": interval, **options})
