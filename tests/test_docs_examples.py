"""The examples of docs/ as they stand, run on the smallest of runs; and what a run writes, as docs/guide.md has it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import example, rows_of
from training_runs import tiny

from sra2_fast import sample_ode
from sra2_fast.train import train

pytestmark = pytest.mark.training


def test_after_training_runs_on_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's twenty lines, as they stand: ten pictures of a run that has just been trained."""
    train(tiny(tmp_path / "runs" / "digits", steps=2, log_every=1))
    monkeypatch.chdir(tmp_path)
    body = example("docs/guide.md", "load_checkpoint(").replace("steps=50", "steps=2")
    assert "steps=2" in body
    names: dict[str, Any] = {}
    exec(compile(body, "docs/guide.md", "exec"), names)
    pictures = sorted(path.name for path in (tmp_path / "runs" / "digits").glob("*.png"))
    assert pictures == [f"class-{label}.png" for label in range(10)]
    assert torch.equal(names["model"].state_dict()["pos_embed"].cpu(), names["checkpoint"].ema["pos_embed"])
    for name, weight in names["model"].named_parameters():
        assert torch.equal(weight.cpu(), names["checkpoint"].ema[name])


def test_a_loop_of_ones_own_runs_and_warms_up_the_average() -> None:
    names: dict[str, Any] = {}
    for part in ("opt.step()", "take_step = TrainStep"):
        body, count = re.subn(r"num_steps=\d+", "num_steps=2", example("docs/guide.md", part))
        body = body.replace('log_every = torch.device("cpu"), 50', 'log_every = torch.device("cpu"), 2')
        assert count == 1
        exec(compile(body, "docs/guide.md", "exec"), names)
        (group,) = names["opt"].param_groups
        assert group["ema_decay"] == pytest.approx(3 / 12) and group["lr"] == pytest.approx(1e-3 * 2 / 50)
    assert names["take_step"].step == 2 and len(names["rows"]) == 2
    exec(compile(example("docs/guide.md", 'reduction="none"'), "docs/guide.md", "exec"), names)
    assert names["each"].total.shape == names["labels"].shape and names["each"].total.requires_grad


def test_public_checkpoints_are_sampled_with_time_turned_around() -> None:
    """A velocity as the public SiT has it, of a data set of one latent, leads to that latent."""
    latent = torch.randn(1, 4, 2, 2)

    class Public(torch.nn.Module):
        num_classes = 10

        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (latent - x) / (1 - t)[:, None, None, None]

    noise = torch.randn(3, 4, 2, 2)
    names: dict[str, Any] = {"model": Public(), "noise": noise, "labels": torch.arange(3), "sample_ode": sample_ode}
    exec(compile(example("docs/guide.md", "1 - t"), "docs/guide.md", "exec"), names)
    torch.testing.assert_close(names["latents"], latent.expand(3, -1, -1, -1), atol=1e-5, rtol=0)
    forgotten = sample_ode(lambda x, t, y: Public()(x, 0.99 * t, y), noise, torch.arange(3))
    assert (forgotten - latent).abs().max() > 0.1


def test_the_latents_std_of_the_guide_to_divergence() -> None:
    names: dict[str, Any] = {}
    exec(compile(example("docs/diverges.md", "z.std()"), "docs/diverges.md", "exec"), names)
    assert names["z"].shape == (256, 1, 8, 8) and 0.5 < names["z"].std() < 1


def test_metrics_are_described_key_by_key(tmp_path: Path) -> None:
    train(tiny(tmp_path, steps=1, log_every=1))
    (record,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    described = [row[0].strip("`") for row in rows_of("docs/guide.md", "metrics.jsonl")]
    assert described == list(record)
    assert record["loss"] == pytest.approx(record["velocity"] + record["align_weight"] * record["align"])


def test_the_pages_of_checkpoints_open_a_run_and_save_it_for_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub", reason="pip install huggingface_hub")
    train(tiny(tmp_path / "runs" / "digits", steps=2, log_every=1))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for part in ("about.notes", "save_pretrained("):
        body = example("docs/checkpoints.md", part).replace("steps=20", "steps=2")
        exec(compile(body, "docs/checkpoints.md", "exec"), names)
    assert names["about"].step == 2 and names["latents"].shape == (10, 1, 8, 8)
    assert sorted(path.name for path in (tmp_path / "runs/digits/model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
