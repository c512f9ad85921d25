"""What the tests of `sra2-fast prepare` share: real photos, a small AutoencoderKL, the command, an undisturbed run.

Imported as a module for the functions and named as a plugin for the fixtures, hence PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from sra2_fast.cli import main
from sra2_fast.files import LOCK_FILE

SIZE, SHARD_SIZE = 32, 5
COUNT = 14  # in shards of 5, 5 and 4


def save_vae(folder: Path, **config: object) -> Path:
    """A small AutoencoderKL with random weights: three levels, so 4 pixels a latent."""
    import diffusers

    torch.manual_seed(0)
    options = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 8),
        "norm_num_groups": 4,
        "latent_channels": 4,
        **config,
    }
    diffusers.AutoencoderKL(**options).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's two sample photos, cropped into a class each; PNG and JPEG, some in a deeper folder."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    folder = tmp_path_factory.mktemp("photos")
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        for number in range(COUNT // 2):
            path = folder / name / ("deeper" if number == 3 else "") / f"{number}.{'jpg' if number % 2 else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photo[10 * number : 10 * number + 90, 70 * number : 70 * number + 80]).save(path)
    return folder


@pytest.fixture(scope="session")
def vae_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae"))


def command(photos: Path, vae_path: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--image-size", str(SIZE), "--batch-size", "2", "--shard-size", str(SHARD_SIZE), "--num-workers", "0"]
    return ["prepare", "--images", str(photos), "--vae", str(vae_path), "--out", str(out), *sizes, *more]


@pytest.fixture(scope="session")
def whole(photos: Path, vae_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run makes."""
    out = tmp_path_factory.mktemp("whole") / "latents"
    assert main(command(photos, vae_path, out)) == 0
    return out


@pytest.fixture
def own_photos(photos: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(photos, tmp_path / "photos"))


def contents(out: Path) -> dict[str, bytes]:
    """Every file but the lock, which is empty and stays."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != LOCK_FILE}


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], match: str) -> None:
    """Exit code 2 and one line on the last line of stderr (a progress bar may stand before it)."""
    assert main(arguments) == 2
    error = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert error.startswith("sra2-fast prepare: ") and re.search(match, error), error
