"""A run where nothing could be built: it trains all the same, on PyTorch's operators, and says so."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_runs import records

from sra2_fast import backends

pytestmark = pytest.mark.training


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_without_any_kernel(
    trainer: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    precision: str,
) -> None:
    options = {"precision": precision, "steps": 4, "log_every": 2}
    trainer("eager", implementation="eager", **options).train()
    assert "without kernels" not in capsys.readouterr().out
    for op in backends.CANDIDATES:
        monkeypatch.setattr(importlib.import_module(f"sra2_fast.ops.{op}"), "_FUSED_ON", frozenset(), raising=False)
    monkeypatch.setattr(backends, "choose", backends.choose.__wrapped__)
    monkeypatch.setattr(backends, "_load_extension", lambda kind: (False, "not built: no C++ compiler was found"))
    trainer("fused", implementation="fused", **options).train()
    told = capsys.readouterr().out
    assert "without kernels here, run by PyTorch's operators: layer_norm_modulate, " in told
    assert "adamw_ema (c++: not built: no C++ compiler was found)" in told
    eager, fused = records(tmp_path / "eager"), records(tmp_path / "fused")
    if precision == "fp32":  # in bf16 y is rounded before the product reads it, in eager by the product's own cast
        assert eager == fused
    assert [line["step"] for line in fused] == [2, 4] and all(math.isfinite(line["loss"]) for line in fused)
