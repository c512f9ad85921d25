"""What a record of gpu_suite.py says of the whole step: every way of training beside the public one.

The ways were measured one after another, in processes of their own, so that one GPU's memory holds each. A ratio is one
of medians; the part "ours" that was measured with its baseline in one run has the exact cost of SRA 2 in its own table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PUBLIC = ("baseline", "eager", "bf16", False, False)
PUBLIC_COMPILED = ("baseline", "eager", "bf16", True, False)
COLUMNS = ("row", "implementation", "precision", "ms a step", "img/s", "MFU", "peak GiB", "over public", "compiled")


def latest_steps(records: Path) -> dict[str, dict[tuple[Any, ...], dict[str, Any]]]:
    """{card: {(row, implementation, precision, is compiled, is captured): its last line}} of step_time's lines."""
    found: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for text in records.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if "images_per_s" in line and "mfu" in line:
            key = tuple(line[name] for name in ("row", "implementation", "precision", "compiled", "captured"))
            found.setdefault(line["device"], {})[key] = line
    return found


def step_report(records: Path) -> str:
    """One table a card; its last two columns: times faster than the public bf16 step, and than that compiled."""
    lines = []
    for card, steps in latest_steps(records).items():
        cells = [list(COLUMNS)]
        for (row, implementation, precision, is_compiled, is_captured), one in steps.items():
            how = ", ".join([implementation, *["compiled"] * is_compiled, *["captured"] * is_captured])
            rivals = [steps.get(key) for key in (PUBLIC, PUBLIC_COMPILED)]
            ratios = ["-" if r is None else f"{r['ms_median'] / one['ms_median']:.2f}x" for r in rivals]
            peak = f"{one['peak_memory_bytes'] / 2**30:.1f}"
            figures = [f"{one['ms_median']:.1f}", f"{one['images_per_s']:.0f}", f"{100 * one['mfu']:.0f} %", peak]
            cells.append([row, how, precision, *figures, *ratios])
        widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
        lines += ["", card]
        lines += ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join(lines)
