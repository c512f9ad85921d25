"""A step's budget: what each part costs at least, what it is predicted to cost on a GPU, and whether it has grown.

The peaks are measured or published ones, each with its source (benchmarks/results/peaks.json); no datasheet's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sra2_fast.errors import InputError

from .ledger import Operator
from .step_parts import ATTENTION_BACKWARD, ATTENTION_PARTS, OTHER, PARTS, REST

RESULTS = Path(__file__).resolve().parents[1] / "results"
Record = dict[str, Any]


@dataclass(frozen=True)
class Peaks:
    """What a device can do. attention_*: of executed FLOPs; launch_s: the gap between two kernels of a stream."""

    name: str
    flop_per_s: float
    bytes_per_s: float
    attention_forward_flop_per_s: float = 0.0
    attention_backward_flop_per_s: float = 0.0
    launch_s: float = 0.0

    def floor_ms(self, operator: Operator) -> float:
        """The least time of one operator: its FLOPs at the product rate, or its bytes at the bandwidth of a copy."""
        return 1e3 * max(operator.flops / self.flop_per_s, operator.bytes / self.bytes_per_s)

    def predicted_ms(self, operator: Operator) -> float:
        """The floor, but for attention, whose executed FLOPs run at the published rate."""
        if operator.part not in ATTENTION_PARTS:
            return self.floor_ms(operator)
        is_backward = operator.part == ATTENTION_BACKWARD
        rate = self.attention_backward_flop_per_s if is_backward else self.attention_forward_flop_per_s
        return max(self.floor_ms(operator), 1e3 * operator.executed_flops / rate)


def read_peaks(gpu: str, precision: str, attention: str) -> tuple[Peaks, dict[str, str]]:
    """The peaks of "h100" or "h200", with the rates of this attention backend, and the source of each.

    Raises InputError for a precision or a backend that has none.
    """
    entry = json.loads((RESULTS / "peaks.json").read_text(encoding="utf-8"))[gpu]
    products = f"{precision}_flop_per_s"
    if products not in entry:
        raise InputError(
            f"step_budget: --precision {precision} has no product rate for {gpu} in benchmarks/results/peaks.json; "
            "use bf16, or measure with --device"
        )
    if attention not in entry["attention"]:
        raise InputError(
            f"step_budget: --attention {attention} has no published rate for {gpu} in benchmarks/results/peaks.json; "
            f"use one of {', '.join(entry['attention'])}, or measure with --device"
        )
    rates = entry["attention"][attention]
    peaks = {key: one for key, one in entry.items() if key not in ("name", "attention")}
    sources = {key: one["source"] for key, one in peaks.items()}
    return Peaks(
        name=entry["name"],
        flop_per_s=peaks[products]["value"],
        bytes_per_s=peaks["copy_bytes_per_s"]["value"],
        attention_forward_flop_per_s=rates["forward_flop_per_s"],
        attention_backward_flop_per_s=rates["backward_flop_per_s"],
        launch_s=peaks["launch_s"]["value"],
    ), {**sources, "attention": rates["source"]}


def parts_of(operators: Sequence[Operator], peaks: Peaks) -> dict[str, Record]:
    """{part: flops, bytes, operators, floor_ms}: sums over its operators, as they run one after another."""
    parts = {}
    for part in PARTS:
        members = [one for one in operators if one.part == part]
        if members:
            parts[part] = {
                "flops": sum(one.flops for one in members),
                "bytes": sum(one.bytes for one in members),
                "operators": sum(one.launches for one in members),
                "floor_ms": sum(map(peaks.floor_ms, members)),
            }
    return parts


def predicted_ms(operators: Sequence[Operator], peaks: Peaks) -> dict[str, float]:
    """{part: ms} on a GPU of these peaks, launches left out."""
    found = dict.fromkeys((one.part for one in operators), 0.0)
    for one in operators:
        found[one.part] += peaks.predicted_ms(one)
    return found


def totals(parts: Mapping[str, Record]) -> Record:
    """Sums over all parts; bytes_outside_products leaves out products and attention; other_share is of those bytes."""
    outside = sum(one["bytes"] for part, one in parts.items() if part in REST)
    other = parts.get(OTHER, {"bytes": 0})["bytes"]
    return {
        "flops": sum(one["flops"] for one in parts.values()),
        "bytes": sum(one["bytes"] for one in parts.values()),
        "bytes_outside_products": outside,
        "other_share": other / outside if outside else 0.0,
        "operators": sum(one["operators"] for one in parts.values()),
        "floor_ms": sum(one["floor_ms"] for one in parts.values()),
    }


GUARDED = ("bytes", "bytes_outside_products", "operators")
CASE = ("model", "batch_size", "precision", "implementation", "row", "attention")
DEFAULT_ATTENTION = "flash"  # predicted: of what an install without flash-attn has, the one with a published rate


def last_recorded(lines: Iterable[str], case: Record) -> Record | None:
    """The last of these JSON lines about the same step as `case`, for whatever GPU; None where there is none."""
    records = [json.loads(line) for line in lines if line.strip()]
    # Lines from before there was a choice are the default's.
    same = [
        one for one in records if all({"attention": DEFAULT_ATTENTION, **one}.get(key) == case[key] for key in CASE)
    ]
    return same[-1] if same else None


def growth(record: Record, recorded: Record) -> list[str]:
    """In words, what of a step's bytes and operators is more than recorded, part by part; empty where nothing is."""
    grown = []
    for what in GUARDED:
        if record[what] > recorded[what]:
            grown.append(f"{what}: {record[what]:,}, recorded {recorded[what]:,} (commit {recorded['commit']})")
    if not grown:
        return []
    for part, now in record["parts"].items():
        before = recorded["parts"].get(part, {"bytes": 0, "operators": 0})
        if now["bytes"] > before["bytes"] or now["operators"] > before["operators"]:
            grown.append(
                f"  {part}: {now['bytes']:,} bytes in {now['operators']:,} operators, "
                f"recorded {before['bytes']:,} in {before['operators']:,}"
            )
    return grown
