"""A tiny run of the trainer, and what tests look at afterwards."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sra2_fast.checkpoints import load_checkpoint
from sra2_fast.train import TrainOptions
from sra2_fast.train.step import TrainStep

TINY = TrainOptions(
    model="16,3,2,4",
    batch_size=8,
    lr=1e-3,
    steps=40,
    log_every=10,
    checkpoint_every=1000,
    sample_every=0,
    precision="fp32",
    device="cpu",
)


def tiny(out: Path, **changes: Any) -> TrainOptions:
    return dataclasses.replace(TINY, out=str(out), **changes)


def around(take_step: TrainStep, call: Callable[[TrainStep, Any], None]) -> Any:
    """The step as the trainer sees it, with `call` made in its place."""

    class Around:
        def __getattr__(self, name: str) -> Any:
            return getattr(take_step, name)

        def __call__(self, microbatches: Any) -> None:
            call(take_step, microbatches)

    return Around()


def final(out: Path, step: int = 40) -> Path:
    return out / "checkpoints" / f"step-{step:08d}"


def records(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_s"} for line in lines]


def assert_same_checkpoint(a: Path, b: Path) -> None:
    left, right = load_checkpoint(a), load_checkpoint(b)
    assert left.ema is not None and right.ema is not None
    for name in ("model", "ema", "optimizer"):
        these, those = getattr(left, name), getattr(right, name)
        assert these.keys() == those.keys() and these
        for key, value in these.items():
            assert torch.equal(value, those[key]), f"{name}: {key}"
    assert left.state["optimizer"] == right.state["optimizer"]
