"""`train --compile`, the default on a GPU: block by block, no graph breaks, the same run within roundings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch_for, small_model
from training_runs import final, records, tiny

from sra2_fast import load_checkpoint
from sra2_fast.models import compile_blocks
from sra2_fast.models.products import set_products
from sra2_fast.train.diagnosis import NonFiniteLoss
from sra2_fast.train.loop import Trainer, train

pytestmark = pytest.mark.training


@pytest.fixture
def compiled_parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.compile traces and differentiates but leaves the code to PyTorch; the names of what it was given.

    What inductor makes of a model is in test_model_implementations.py.
    """
    names: list[str] = []
    compile_with = torch.compile

    def compile_quickly(part: Any, **options: Any) -> Any:
        names.append(type(part.__self__).__name__)
        return compile_with(part, backend="aot_eager", fullgraph=True)

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", compile_quickly)
    return names


def test_a_compiled_run_is_the_run_within_roundings(tmp_path: Path, compiled_parts: list[str]) -> None:
    """Teacher and student compiled, saved and resumed by their plain names."""
    small = {"model": "16,2,2,4", "target": "teacher", "log_every": 2}
    train(tiny(tmp_path / "plain", steps=4, **small))
    assert not compiled_parts
    train(tiny(tmp_path / "compiled", steps=2, compile=True, **small))
    assert sorted(compiled_parts) == ["FinalLayer"] * 2 + ["SiTBlock"] * 4
    train(tiny(tmp_path / "compiled", steps=4, compile=True, **small))
    plain, compiled = (load_checkpoint(final(tmp_path / name, 4)) for name in ("plain", "compiled"))
    assert plain.model.keys() == compiled.model.keys() and plain.optimizer.keys() == compiled.optimizer.keys()
    for name, value in plain.model.items():
        torch.testing.assert_close(compiled.model[name], value, rtol=1e-3, atol=1e-5)
    for a, b in zip(records(tmp_path / "plain"), records(tmp_path / "compiled"), strict=True):
        assert a["velocity"] == pytest.approx(b["velocity"], rel=1e-5)


def graphs_of(depth: int, products: str = "modules") -> int:
    """Unique graphs of two training steps under autocast, with an aligned block in the middle."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = compile_blocks(small_model(depth=depth, align_depth=2, hidden_size=24)).train()
    set_products(model, products)
    inputs = batch_for(model)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            velocity, projection = model(*inputs, return_projection=True)
        (velocity.float().square().sum() + projection.float().square().sum()).backward()
    assert not torch._dynamo.utils.counters["graph_break"]
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_depth_28_compiles_no_more_graphs_than_depth_4(compiled_parts: list[str]) -> None:
    """The first block, those whose stream is open, the one behind the tap, normed ahead, and the final layer."""
    assert graphs_of(4) == graphs_of(28) == 4


def test_the_epilogues_that_a_gpu_has_break_no_graph(compiled_parts: list[str]) -> None:
    """Here the same operators run as compositions; attention's backends are in test_attention.py."""
    assert graphs_of(4, products="epilogues") == 4


def test_a_grid_and_a_diagnosis_compile_nothing(
    trainer: Callable[..., Trainer], compiled_parts: list[str], tmp_path: Path
) -> None:
    run = trainer(steps=2, sample_every=1, sample_steps=2, compile=True, model="16,2,2,4", lr=1e-3)
    run.train()
    first = int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert (tmp_path / "run" / "samples" / "step-00000002.png").exists()
    torch._dynamo.utils.counters.clear()
    torch.compiler.reset()
    plain = trainer("plain", steps=2, compile=True, model="16,2,2,4", lr=1e-3)
    plain.train()
    assert int(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == first > 0
    bad = trainer("bad", steps=4, lr=1e30, compile=True, model="16,2,2,4")
    with pytest.raises(NonFiniteLoss, match=r"largest \|activation\| by block: 1:\S+ 2:\S+;"):
        bad.train()
