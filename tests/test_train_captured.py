"""The captured step, with a stand-in for the CUDA graph that runs the captured Python again: no device work happens
while it is captured, and a replay reads the batch and the numbers from where they were put."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_shadow_weights import BF16, EVENTS, assert_same, needs_kernels, step_on_float32
from test_train_step import CPU, make_batch, make_step
from training_runs import tiny

from sra2_fast import SRA2Loss
from sra2_fast.errors import InputError
from sra2_fast.optim import AdamWEMA
from sra2_fast.recipe import UpdateSchedule
from sra2_fast.train import captured
from sra2_fast.train.loop import train
from sra2_fast.train.step import TrainStep

pytestmark = [pytest.mark.training, needs_kernels]


class Recorded:
    """`captured.CudaGraph` on a CPU."""

    captures = 0

    def __init__(self, device: torch.device) -> None:
        self.run: Callable[[], None] = lambda: None

    def on_stream(self, run: Callable[[], Any]) -> Any:
        return run()

    def capture(self, run: Callable[[], None]) -> None:
        Recorded.captures += 1
        self.run = run

    def replay(self) -> None:
        self.run()


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "CudaGraph", Recorded)
    monkeypatch.setattr(captured, "_HAS_GRAPHS", ("cpu",))
    monkeypatch.setattr(Recorded, "captures", 0)


def make_pair(**changes: Any) -> tuple[TrainStep, TrainStep]:
    """A captured step and a plain one."""
    schedule = UpdateSchedule(lr=1e-3, lr_warmup=6, ema_decay=0.99)
    return tuple(make_step(schedule=schedule, graph=graph, **changes) for graph in (True, False))  # type: ignore[return-value]


@pytest.mark.parametrize(("dtype", "align_tokens"), [(None, 1.0), (BF16, 1.0), (BF16, 0.5)], ids=str)
def test_replays_are_the_steps_bit_for_bit(dtype: torch.dtype | None, align_tokens: float) -> None:
    """Rate, decay, alignment weight and aligned tokens change at every step; what comes back stays what it was."""
    steps = make_pair(autocast_dtype=dtype)
    for step in steps:
        step.loss_fn = SRA2Loss(schedule="linear", schedule_steps=12, align_tokens=align_tokens)
    kept = []
    for seed in range(8):
        results = [step([make_batch(seed=seed)]) for step in steps]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        kept.append((results[0].total, results[0].total.clone()))
    assert all(torch.equal(a, b) for a, b in kept)
    assert_same(*steps)
    assert steps[0].history.read() == steps[1].history.read() and Recorded.captures == 1
    assert steps[0].optimizer.param_groups[0]["lr"] == steps[1].optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("event", [e for e in EVENTS if e is not step_on_float32], ids=lambda event: event.__name__)
def test_whatever_writes_or_moves_the_weights_between_replays_counts(event: Callable[[TrainStep], None]) -> None:
    steps = make_pair(autocast_dtype=BF16)
    for step in steps:
        for seed in range(5):
            step([make_batch(seed=seed)])
        event(step)
        for seed in range(5, 7):
            step([make_batch(seed=seed)])
    assert_same(*steps)
    assert Recorded.captures == (2 if event.__name__ in ("assign_data", "move", "load_optimizer") else 1)


def test_microbatches_are_captured_together() -> None:
    steps = make_pair()
    for seed in range(6):
        batch = make_batch(seed=seed)
        for step in steps:
            step(batch.split(3))
    assert_same(*steps)


def test_a_replay_moves_the_versions_of_what_it_writes() -> None:
    """So that autograd notices a weight it had saved, and the shadows are known to be those of the weights."""
    step, _ = make_pair(autocast_dtype=BF16)
    for seed in range(5):
        step([make_batch(seed=seed)])
    step._captured._graph.replay = lambda: None  # type: ignore[union-attr, method-assign]
    weight = step.network.blocks[0].mlp.fc1.weight  # type: ignore[union-attr, index]
    before = [weight._version, step.optimizer.state[weight]["ema"]._version]
    step([make_batch()])
    after = [weight._version, step.optimizer.state[weight]["ema"]._version]
    assert all(a > b for a, b in zip(after, before, strict=True))
    assert all(shadow.seen == shadow.state() for shadow in step.optimizer.shadows._shadows)


def test_what_cannot_be_captured_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    step, _ = make_pair()
    for _ in range(4):
        step([make_batch(8)])
    with pytest.raises(InputError, match=r"--graph every batch must be of the shape .* \(8, 4, 8, 8\), got \(4, 4"):
        step([make_batch(4)])
    with pytest.raises(InputError, match="train: --graph needs the fused optimizer"):
        eager = AdamWEMA(step.network.named_parameters(), implementation="eager")
        TrainStep(step.network, SRA2Loss(), eager, step.history, device=CPU, graph=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(InputError, match="train: --graph captures the step of one process; leave it out under"):
        make_pair()
    monkeypatch.undo()
    with pytest.raises(InputError, match="train: --graph captures a CUDA graph, cpu has none; leave it out"):
        train(tiny(tmp_path / "run", steps=1, graph=True))


def test_a_captured_run_is_the_run(tmp_path: Path) -> None:
    small = {"model": "16,2,2,4", "log_every": 2, "steps": 6, "checkpoint_every": 5}
    runs = [train(tiny(tmp_path / str(graph), graph=graph, **small)).last_record for graph in (True, False)]
    same = [{k: r[k] for k in ("step", "velocity", "align", "grad_norm")} for r in runs if r is not None]
    assert len(same) == 2 and same[0] == same[1]
