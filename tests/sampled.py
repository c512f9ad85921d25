"""What the tests of `sra2-fast sample` share: a small checkpoint with random weights, the command, what it left.

Imported as a module for the functions and named as a plugin for the fixtures, hence PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import dataclasses
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import small_model
from PIL import Image

from sra2_fast.checkpoints import save_checkpoint
from sra2_fast.cli import main
from sra2_fast.data import DecodeInfo

DIGITS: dict[str, Any] = {"kind": "grayscale", "shift": [8.0], "scale": [0.125], "white": 16.0}
GUIDED = ("--cfg-scale", "2", "--guidance-interval", "0.1,0.8")
COUNT, BATCH = 7, 3
SIZES: dict[str, Any] = {"in_channels": 1, "hidden_size": 32, "depth": 2, "num_heads": 2, "learn_sigma": False}


def save_run(out: Path, latents: dict[str, Any] | None = None, step: int = 5, **changes: Any) -> Path:
    """A run folder with one checkpoint whose averaged weights are others than the trained ones."""
    model = small_model(**{**SIZES, **changes})
    averages = {name: value * 0.9 for name, value in model.state_dict().items()}
    about = {field.name: None for field in dataclasses.fields(DecodeInfo)} | {"white": 1.0}
    state = {"model": model.config(), "run": {"path": "linear"}, "latents": {**about, **(latents or DIGITS)}}
    save_checkpoint(out / "checkpoints", step, model=model.state_dict(), ema=averages, state=state)
    return out


def command(run: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--num-images", str(COUNT), "--batch-size", str(BATCH), "--steps", "4", "--precision", "fp32"]
    return ["sample", "--checkpoint", str(run), "--out", str(out), "--device", "cpu", *sizes, *more]


def sample(run: Path, out: Path, *more: str) -> np.ndarray:
    """The images of a run that must succeed, (N, H, W, 3) uint8."""
    assert main(command(run, out, *more)) == 0
    return arrays(out)["arr_0"]


def arrays(out: Path) -> dict[str, np.ndarray]:
    with np.load(out / "samples.npz") as found:
        return dict(found)


def contents(out: Path) -> dict[str, bytes]:
    """The bytes of every file by name; of the archive its members', since it also holds the time of writing."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with zipfile.ZipFile(io.BytesIO(found.pop("samples.npz"))) as archive:
        found |= {name: archive.read(name) for name in archive.namelist()}
    return found


def png(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def whole_sampled(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run makes."""
    out = tmp_path_factory.mktemp("whole") / "samples"
    sample(run, out, *GUIDED)
    return out


def noise_of(indices: list[int], shape: tuple[int, int, int] = (1, 8, 8), seed: int = 0) -> torch.Tensor:
    from sra2_fast.randomness import sampling_noise

    return torch.from_numpy(sampling_noise(seed, indices, shape))
