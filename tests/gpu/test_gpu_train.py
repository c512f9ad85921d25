"""The training loop on a GPU: nothing in a step waits for the device, and a bad loss is still found."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import around

from sra2_fast.data import open_data
from sra2_fast.train import TrainOptions, build
from sra2_fast.train.diagnosis import NonFiniteLoss
from sra2_fast.train.loop import Trainer
from sra2_fast.train.run_directory import RunDirectory
from sra2_fast.train.step import TrainStep

pytest.importorskip("sklearn")
OPTIONS = TrainOptions(
    model="128,4,4,2", batch_size=16, lr=1e-3, log_every=10, steps=10, sample_every=0, device="cuda", compile=False
)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Any]:
    directories = []

    def build_trainer(**changes: Any) -> Trainer:
        options = build.resolve(dataclasses.replace(OPTIONS, out=str(tmp_path / "run"), **changes))
        directories.append(RunDirectory(options.out))
        return Trainer(options, open_data("digits"), directories[-1])

    yield build_trainer
    for directory in directories:
        directory.close()


@pytest.mark.parametrize("target", ["vae", "teacher"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_step_waits_for_the_device(make: Any, precision: str, target: str) -> None:
    trainer = make(precision=precision, target=target, align_schedule="linear", time="lognormal", workers=0)

    def watched(take_step: TrainStep, microbatches: Any) -> None:
        if trainer.step < 2:  # kernels are compiled and state is made
            take_step(microbatches)
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            take_step(microbatches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer.take_step = around(trainer.take_step, watched)
    assert trainer.train().step == 10


def test_a_bad_loss_is_found_late_with_the_weights_of_before(make: Any) -> None:
    trainer = make(lr=1e30)
    with pytest.raises(NonFiniteLoss, match=r"step 2: .* is not finite"):
        trainer.train()
    assert trainer.step == 10
    assert all(math.isfinite(float(p.detach().abs().max())) for p in trainer.model.parameters())
