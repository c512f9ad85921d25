"""From photos to a trained model: `prepare`, then `train` on its latents, with decoded sample grids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from photos import SIZE

from sra2_fast.checkpoints import load_checkpoint
from sra2_fast.cli import main
from sra2_fast.pictures import HEADER

pytestmark = pytest.mark.training

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("diffusers")
pytest_plugins = ["photos"]


def train(data: Path, out: Path, *more: str) -> int:
    words = [
        "train",
        "--data",
        str(data),
        "--out",
        str(out),
        "--model",
        "16,2,2,2",
        "--batch-size",
        "4",
        "--steps",
        "6",
    ]
    return main([*words, "--log-every", "3", "--sample-steps", "2", "--precision", "fp32", "--device", "cpu", *more])


def test_photos_become_a_model_and_its_samples_become_images(whole: Path, vae_path: Path, tmp_path: Path) -> None:
    assert train(whole, tmp_path, "--vae", str(vae_path), "--ema-decay", "0.5") == 0
    model = load_checkpoint(tmp_path / "checkpoints" / "step-00000006").state["model"]
    assert (model["input_size"], model["in_channels"], model["num_classes"]) == (SIZE // 4, 4, 2)
    picture = np.asarray(Image.open(tmp_path / "samples" / "step-00000006.png"))
    assert picture.shape == (HEADER + 4 * (2 * SIZE + 4), 2 * (2 * SIZE + 4), 3)
    inside = picture[HEADER + 2 : HEADER + 2 + 2 * SIZE, 2 : 2 + 2 * SIZE]
    assert (inside[::2, ::2] == inside[1::2, 1::2]).all() and inside.std() > 1, "each pixel of the decoded image twice"


def test_shards_resume_bitwise_and_so_does_the_posterior(whole: Path, tmp_path: Path) -> None:
    """14 samples in batches of 4: step 4 crosses into the second epoch."""
    assert train(whole, tmp_path / "whole", "--sample-every", "0") == 0
    assert train(whole, tmp_path / "parts", "--sample-every", "0", "--steps", "3") == 0
    assert train(whole, tmp_path / "parts", "--sample-every", "0", "--workers", "1") == 0
    ends = [tmp_path / name / "checkpoints" / "step-00000006" for name in ("whole", "parts")]
    for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert (ends[0] / file).read_bytes() == (ends[1] / file).read_bytes()
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_a_vae_of_other_latents_is_refused(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(whole, tmp_path / "run", "--vae", str(tmp_path / "absent")) == 2
    assert "absent does not exist; give a folder with an autoencoder" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
