"""docs/coming-from.md: every command as it is written, on the data and checkpoints of that repository, made small.

Each section is one script from top to bottom, in a folder as the page supposes. What is appended to a command is its
size alone.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pages import blocks, example, rows_of, text_of
from public_checkpoints import write_public
from public_data import draw, write_dataset_json, write_fast_dit, write_latents_stats, write_lightningdit, write_repa_e
from repository import ROOT
from test_shapes import write_vae_sd

from sra2_fast import open_model
from sra2_fast.checkpoints import configuration, list_checkpoints
from sra2_fast.cli import main

pytest_plugins = ["photos"]
pytestmark = pytest.mark.training
PAGE = "docs/coming-from.md"
SIZES = {
    "prepare": "--image-size 32 --batch-size 8 --num-workers 0 --precision fp32",
    "train": "--batch-size 4 --steps 2 --log-every 1 --log none --sample-every 0 --device cpu --precision fp32",
    "sample": "--num-images 3 --batch-size 3 --device cpu --precision fp32",
    "convert": "",
    "convert-data": "--num-workers 1",
}


def commands_of(section: str) -> list[list[str]]:
    """The words of every command under a heading."""
    found = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", text_of(PAGE), re.S | re.M)
    assert found, section
    lines = [line for body in re.findall(r"```sh\n(.*?)```", found[1], re.S) for line in body.splitlines()]
    return [shlex.split(line, comments=True) for line in lines]


def public_file(path: str, name: str) -> None:
    """A checkpoint where the public script of `name` writes it."""
    target = Path(path)
    target.parent.mkdir(parents=True)
    file, _ = write_public(target.parent, name)
    file.rename(target)


def repa_data() -> None:
    """vae-sd/ of twelve latents with the classes of the recorded models, and images/ beside it."""
    write_vae_sd(Path("data/imagenet256"), (4, 8, 8))
    Path("data/imagenet256/images").mkdir()
    table = Path("data/imagenet256/vae-sd/dataset.json")
    labels = [[name, number % 10] for number, (name, _) in enumerate(json.loads(table.read_text())["labels"])]
    table.write_text(json.dumps({"labels": labels}))
    folder = Path("data/imagenet256/features/00000")
    folder.mkdir(parents=True)
    for number in range(len(labels)):
        np.save(folder / f"img-features-{number:08d}.npy", draw(16, seed=number)[0, :, :2].reshape(16, 8))


def sit(photos: Path) -> None:
    Path("imagenet").mkdir()
    Path("imagenet/train").symlink_to(photos)
    public_file("results/000-SiT-XL-2/checkpoints/0400000.pt", "sit")


def repa(photos: Path) -> None:
    repa_data()
    public_file("exps/linear-dinov2-b-enc8/checkpoints/0400000.pt", "repa")


def sra(photos: Path) -> None:
    repa_data()
    public_file("exps/sitxl-ab820-t0.2-res256/checkpoints/0400000.pt", "sra")


def fast_dit(photos: Path) -> None:
    write_fast_dit(Path("features"), draw(4, 8))


def lightningdit(photos: Path) -> None:
    write_lightningdit(Path("imagenet_train_256"), draw(16, seed=1), draw(16, seed=2))
    public_file("output/plain/checkpoints/0080000.pt", "lightningdit")


def repa_e(photos: Path) -> None:
    Path("data").mkdir()
    moments = np.concatenate([draw(32, seed=3), abs(draw(32, seed=4))], axis=1)
    write_repa_e(Path("data"), moments)
    write_latents_stats(Path("data/e2e-vavae-latents-stats.pt"), np.zeros(32, np.float32), np.ones(32, np.float32))
    public_file("exps/sit-ldm-e2e-vavae/checkpoints/4000000.pt", "repa_e")


def sr_dit(photos: Path) -> None:
    write_dataset_json(Path("dataset/vae-in"), draw(32, seed=5, spread=3.0), "img-latents-")
    Path("dataset/images").mkdir()


SECTIONS: dict[str, tuple[Callable[[Path], None], str]] = {  # the folder, and the sizes of its models for train
    "SiT": (sit, "--model 24,3,3,2 --align-depth 1"),
    "REPA": (repa, "--model 24,2,3,2 --align-depth 1"),
    "SRA": (sra, "--model 24,3,3,2 --align-depth 2"),
    "fast-DiT": (fast_dit, "--model 24,2,3,2 --align-depth 1"),
    "LightningDiT": (lightningdit, "--model 24,2,3,1 --align-depth 1 --batch-size 4"),
    "REPA-E": (repa_e, "--model 24,2,3,1 --align-depth 1"),
    "SR-DiT": (sr_dit, "--model 24,2,3,1 --align-depth 1"),
}


@pytest.fixture
def here(tmp_path: Path, vae_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands run: a folder of the autoencoder's name is the autoencoder."""
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    Path("stabilityai").mkdir()
    Path("stabilityai/sd-vae-ft-ema").symlink_to(vae_path)
    for depth in (2, 3):  # the recorded models count as sizes that everybody knows
        monkeypatch.setitem(configuration._HEADS, (depth, 24), 3)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_from_top_to_bottom(section: str, here: Path, photos: Path) -> None:
    prepare, model = SECTIONS[section]
    prepare(photos)
    commands = commands_of(section)
    assert len(commands) >= 2
    for program, name, *words in commands:
        assert program == "sra2-fast"
        size = shlex.split(SIZES[name])
        if name == "train":
            size += shlex.split(model) + (["--teacher-depth", "3"] if "teacher" in words else [])
            size += ["--steps", "402"] if "--resume" in words else []  # the checkpoint's 400 and two
        if name == "sample":
            size += [] if "dopri5" in words else ["--steps", "2"]
        assert main([name, *words, *size]) == 0, " ".join([name, *words])
        check(name, words)


def check(name: str, words: list[str]) -> None:
    """What a command has made is what it says."""
    out = Path(words[words.index("--out") + 1])
    if name == "train":
        assert list_checkpoints(out / "checkpoints") and len((out / "metrics.jsonl").read_text().splitlines()) == 2
    elif name == "sample":
        (arrays,) = out.glob("*.npz")
        assert np.load(arrays)["arr_0"].dtype == np.uint8 and len(np.load(arrays)["arr_0"]) == 3
    elif name == "convert" and "--to" in words:
        assert set(torch.load(out, weights_only=True)) >= {"model", "ema"}
    elif name == "convert":
        assert open_model(out)[1].weights == "ema"
    else:
        assert (out / "index.json").exists()


def test_every_section_with_commands_is_run() -> None:
    headings = re.findall(r"^## (.*)$", text_of(PAGE), re.M)
    assert [heading for heading in headings if heading in SECTIONS] == list(SECTIONS)
    assert sum(len(commands_of(section)) for section in SECTIONS) == sum(
        len(body.strip().splitlines()) for body in blocks(PAGE, "sh")
    )


def test_the_swapped_lines_take_what_the_scripts_give() -> None:
    """The constructor calls of train.py and generate.py, on the smallest name."""
    family = {"num_classes": 10, "use_cfg": True, "fused_attn": True, "qk_norm": True}
    calls: dict[str, dict[str, Any]] = {
        "SiT": {"num_classes": 10, "learn_sigma": False},
        "REPA": {**family, "z_dims": [8, 12], "encoder_depth": 4},
        "SRA": family,
    }
    rows = rows_of(PAGE, "Swapping the class alone")
    assert len(rows) == 3
    for script, _, line in rows:
        names: dict[str, Any] = {}
        exec(line.strip("`"), names)
        with torch.device("meta"):
            names["SiT_models"]["SiT-S/8"](input_size=32, **calls[script.split("'")[0]])


def test_their_torch_load_opens_with_the_one_type_allowed(tmp_path: Path) -> None:
    file, _ = write_public(tmp_path, "repa")
    allowed = torch.serialization.get_safe_globals()
    with pytest.raises(Exception, match=r"Weights only load failed[\s\S]*argparse\.Namespace"):
        torch.load(file)
    try:
        exec(example(PAGE, "add_safe_globals"), {})
        assert torch.load(file)["args"].encoder_depth == 1
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)
