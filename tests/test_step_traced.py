"""What a step on fake tensors proves: they have no values, so whatever waits for the device to read one raises."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from lib import ledger
from lib.step_rows import Setting

from sra2_fast.objective.terms import Terms

SETTING = Setting("48,2,2,4", 2, "bf16", "fused", False, torch.device("cpu"))


@pytest.mark.parametrize("row", ["baseline", "sra2-cosine", "sra2-smooth-l1", "sra"])
def test_a_step_reads_nothing_on_the_host(row: str) -> None:
    """As on CUDA: each op is its kernel's operator, so no check of a CPU's values hides a read."""
    assert len(ledger.trace(row, SETTING)[1]) > 100


@pytest.mark.parametrize(
    "read", [float, bool, torch.nonzero, torch.Tensor.item], ids=["float", "bool", "nonzero", "item"]
)
def test_a_read_would_be_noticed(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = Terms.evaluate

    def reading(self: Terms, *arguments: Any) -> Any:
        losses = evaluate(self, *arguments)
        read(losses.velocity)
        return losses

    monkeypatch.setattr(Terms, "evaluate", reading)
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        ledger.trace("baseline", SETTING)
