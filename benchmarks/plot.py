"""Plots of recorded benchmarks. They read JSON lines and nothing else: what is drawn was measured before, elsewhere.

python benchmarks/plot.py step_time benchmarks/results/step_time.jsonl step_time.png
python benchmarks/plot.py ops benchmarks/results/ops.jsonl ops.png
python benchmarks/plot.py step_budget benchmarks/results/step_budget.jsonl step_budget.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lib.outcome import check_can_write

from sra2_fast.errors import InputError, must_be

COLOURS = {"eager": "#9aa5b1", "compile": "#5b8db8", "fused": "#c8553d", "copy": "#3f7d58"}
OTHER_COLOUR = "#8a6fa8"
SUFFIXES = (".png", ".svg", ".pdf")
BESIDE = "launches, or between operators"
Record = dict[str, Any]


def check_can_plot(op: str, option: str, target: str) -> None:
    """Raises InputError where `target` cannot be drawn: no matplotlib, a suffix it does not know, no such place."""
    _import_pyplot(op)
    if Path(target).suffix.lower() not in SUFFIXES:
        raise must_be(op, option, f"a file ending in {', '.join(SUFFIXES)}", target)
    check_can_write(op, option, target)


def read_records(path: str | Path, keys: Iterable[str]) -> list[Record]:
    """The JSON lines of a file that have all `keys`.

    Raises InputError: no such file, a broken line, none with the keys.
    """
    path, keys = Path(path), tuple(keys)
    if not path.exists():
        raise InputError(f"plot: {path} does not exist; a benchmark writes it with --json {path}")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(f"plot: {path}, line {number}: not JSON ({error.msg})") from error
    records = [one for one in records if isinstance(one, dict) and all(key in one for key in keys)]
    if not records:
        raise InputError(f"plot: {path} has no line with {', '.join(keys)}")
    return records


def newest_of_each(records: list[Record], keys: tuple[str, ...]) -> list[Record]:
    """The last record of each combination of `keys`, in order of first appearance."""
    return list({tuple(str(one.get(key)) for key in keys): one for one in records}.values())


def plot_step_time(source: str | Path, target: str | Path) -> None:
    """One group of bars a setting, one bar a row: median ms a step, the 20-80 % range, the overhead written on top.

    Raises InputError for a file that cannot be read or written.
    """
    records = read_records(source, ("row", "model", "ms_median", "ms_p20", "ms_p80"))
    setting = ("model", "batch_size", "implementation", "precision", "compiled", "device")
    records = newest_of_each(records, (*setting, "row"))
    groups: dict[tuple[str, ...], list[Record]] = {}
    for one in records:
        groups.setdefault(tuple(str(one.get(key)) for key in setting), []).append(one)
    figure, axes = _axes(len(groups), height=2.6)
    widest = max(one["ms_p80"] for one in records)  # of all panels, so that their bars compare
    for axis, members in zip(axes, groups.values(), strict=True):
        first = members[0]
        medians = [one["ms_median"] for one in members]
        ranges = [
            [one["ms_median"] - one["ms_p20"] for one in members],
            [one["ms_p80"] - one["ms_median"] for one in members],
        ]
        colour = COLOURS.get(first.get("implementation", ""), OTHER_COLOUR)
        axis.barh([one["row"] for one in members], medians, xerr=ranges, color=colour, ecolor="#333333", capsize=2)
        for place, one in enumerate(members):
            overhead = one.get("overhead_percent")
            text = f"{one['ms_median']:.0f} ms" + (f", {overhead:+.1f} %" if overhead is not None else "")
            axis.text(one["ms_p80"], place, "  " + text, va="center", fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.3 * widest)
        compiled = ", compiled" if first.get("compiled") else ""
        axis.set_title(
            f"{first['model']}, batch {first.get('batch_size')}, {first.get('implementation')}, "
            f"{first.get('precision')}{compiled}, {first.get('device')}",
            fontsize=9,
        )
        axis.set_xlabel("ms a training step (median, 20-80 %)", fontsize=8)
    _save(figure, target)


def plot_ops(source: str | Path, target: str | Path) -> None:
    """One panel a case of an op, one bar a variant: the median time.

    Raises InputError for a file that cannot be read or written.
    """
    records = read_records(source, ("op", "variant", "shape", "dtype", "direction", "ms_median"))
    case = ("op", "shape", "dtype", "direction", "device")
    records = newest_of_each(records, (*case, "variant"))
    groups: dict[tuple[str, ...], list[Record]] = {}
    for one in records:
        groups.setdefault(tuple(str(one.get(key)) for key in case), []).append(one)
    figure, axes = _axes(len(groups), height=1.7)
    for axis, (name, members) in zip(axes, groups.items(), strict=True):
        colours = [COLOURS.get(one["variant"], OTHER_COLOUR) for one in members]
        axis.barh([one["variant"] for one in members], [one["ms_median"] for one in members], color=colours)
        axis.invert_yaxis()
        axis.set_title(" ".join(name), fontsize=8)
        axis.set_xlabel("ms", fontsize=8)
    _save(figure, target)


def plot_step_budget(source: str | Path, target: str | Path) -> None:
    """Two stacked bars a step: its parts' floors, and their predicted or measured times with what lies beside them.

    Raises InputError for a file that cannot be read or written.
    """
    records = read_records(source, ("parts", "beside_ms", "is_measured", "mfu"))
    records = newest_of_each(records, ("model", "batch_size", "precision", "row", "device", "is_measured"))
    names = list(dict.fromkeys(part for one in records for part in one["parts"]))
    figure, axes = _axes(len(records), height=3.4)
    from matplotlib import colormaps

    colours = dict(zip([*names, BESIDE], colormaps["tab20"].colors * 2, strict=False))
    for axis, one in zip(axes, records, strict=True):
        what = "measured" if one["is_measured"] else "predicted"
        beside = max(0.0, one["beside_ms"])  # a profiled step may be slower than the step
        for place, key in enumerate(("floor_ms", "ms")):
            left = 0.0
            for name in [*one["parts"], *([BESIDE] if key == "ms" else [])]:
                width = beside if name == BESIDE else one["parts"][name][key]
                axis.barh(place, width, left=left, color=colours[name], label=name if key == "ms" else None)
                left += width
            axis.text(left, place, f" {left:.4g} ms", va="center", fontsize=8)
        axis.set_yticks([0, 1], ["floor", what])
        axis.set_xlim(0, 1.15 * left)
        axis.set_title(
            f"{one['row']}, {one['model']}, batch {one['batch_size']}, {one['precision']}, {one['device']}: "
            f"MFU {100 * one['mfu']:.1f} %, {what}",
            fontsize=9,
        )
        axis.legend(fontsize=6, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    _save(figure, target)


def _import_pyplot(op: str) -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise InputError(f"{op}: a plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _axes(count: int, height: float) -> tuple[Any, list[Any]]:
    figure, axes = _import_pyplot("plot").subplots(
        count, 1, figsize=(7.5, height * count), squeeze=False, layout="constrained"
    )
    return figure, list(axes[:, 0])


def _save(figure: Any, target: str | Path) -> None:
    try:
        figure.savefig(target, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(f"plot: cannot write {target}: {error}") from error
    finally:
        _import_pyplot("plot").close(figure)


PLOTS = {"step_time": plot_step_time, "ops": plot_ops, "step_budget": plot_step_budget}


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line."""
    parser = argparse.ArgumentParser(prog="plot", description="Draw recorded benchmarks.")
    parser.add_argument("kind", choices=tuple(PLOTS))
    parser.add_argument("source", help="JSON lines")
    parser.add_argument("target", help="PNG, SVG or PDF to write")
    args = parser.parse_args(argv)
    try:
        PLOTS[args.kind](args.source, args.target)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
