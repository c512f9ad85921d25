"""The guard of the step's budget: `make test` says no where SiT-XL/2 needs more than its last recorded line."""

from __future__ import annotations

import copy
import functools
import json
import sys
from typing import Any

import pytest
from repository import ROOT

from sra2_fast.layers import block

sys.path.insert(0, str(ROOT / "benchmarks"))

import step_budget
from lib import budget

pytestmark = pytest.mark.training

TINY = "32,2,2,8"  # hidden size, depth, heads, patch size
DIM, DEPTH, TOKENS = 32, 2, 16


@functools.cache
def predicted(row: str, attention: str = "auto") -> dict[str, Any]:
    arguments = ["--row", row, "--predict", "h200", "--attention", attention]
    return step_budget.predict(step_budget.parse_arguments(arguments))


def recorded(record: dict[str, Any]) -> dict[str, Any]:
    lines = (budget.RESULTS / "step_budget.jsonl").read_text().splitlines()
    found = budget.last_recorded(lines, record)
    assert found is not None, f"results/step_budget.jsonl has no line about {record['row']}"
    return found


@pytest.mark.parametrize(
    ("row", "attention"), [("baseline", "auto"), ("sra2-cosine", "auto"), ("sra2-cosine", "flash-attn")]
)
def test_sit_xl_needs_no_more_than_recorded(row: str, attention: str) -> None:
    """Where it needs less: benchmarks/step_budget.py --row ROW --json benchmarks/results/step_budget.jsonl."""
    record = predicted(row, attention)
    assert (record["model"], record["batch_size"], record["precision"]) == ("SiT-XL/2", 32, "bf16")
    before = recorded(record)
    grown = budget.growth(record, before)
    versions = f"torch {record['versions']['torch']} here, {before['versions']['torch']} there"
    assert not grown, "\n".join([f"{row} grew ({versions}):", *grown])


@pytest.mark.parametrize("what", ["bytes", "bytes_outside_products", "operators"])
def test_the_guard_sees_one_more(what: str) -> None:
    record = predicted("baseline")
    before = copy.deepcopy(record)
    assert budget.growth(record, before) == []
    before[what] -= 1
    assert budget.growth(record, before) == [
        f"{what}: {record[what]:,}, recorded {record[what] - 1:,} (commit {record['commit']})"
    ]
    before[what] += 2
    assert budget.growth(record, before) == []


def test_the_guard_names_the_part_that_grew(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = step_budget.parse_arguments(["--model", TINY, "--batch-size", "3", "--predict", "h100"])
    before = step_budget.predict(arguments)
    forward = block.Mlp.forward
    monkeypatch.setattr(block.Mlp, "forward", lambda self, x: forward(self, x.clone()))
    grown = budget.growth(step_budget.predict(arguments), before)
    tokens_bytes = DEPTH * 2 * 3 * TOKENS * DIM * 2  # a copy a block, read and written, bf16
    assert [line.split(":")[0] for line in grown] == [*budget.GUARDED, "  norms and gates"]
    assert f"bytes: {before['bytes'] + tokens_bytes:,}, recorded {before['bytes']:,}" in grown[0]
    assert f"operators: {before['operators'] + DEPTH:,}" in grown[2]


def test_the_guard_takes_the_last_line_of_the_same_step() -> None:
    case = {"model": "m", "batch_size": 1, "precision": "bf16", "implementation": "fused", "row": "sra"}
    case["attention"] = "flash"  # what lines without the word are about
    older = {key: value for key, value in case.items() if key != "attention"}
    lines = [json.dumps({**one, "bytes": n}) for n, one in ((1, case), (2, older))] + [
        "",
        json.dumps({**case, "row": "repa", "bytes": 3}),
    ]
    found = budget.last_recorded(lines, case)
    assert found is not None and found["bytes"] == 2
    assert budget.last_recorded(lines, {**case, "batch_size": 2}) is None
    assert budget.last_recorded(lines, {**case, "attention": "flash-attn"}) is None
