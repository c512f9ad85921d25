"""The shipped configurations: each is read as a user would, and held to recipe.py and to what runs anywhere."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from repository import ROOT
from test_shapes import write_vae_sd

from sra2_fast import open_model, recipe
from sra2_fast.data import open_data
from sra2_fast.models import model_sizes
from sra2_fast.train import TrainOptions, build, train
from sra2_fast.train.options import read_config

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
SHAPES = {  # (C, H, W) of the latents that a configuration is for
    "sit-xl2-512": (4, 64, 64),
    "sit-xl1-32ch": (32, 16, 16),
    "sit-b2-16ch": (16, 32, 32),
    "unconditional-b2": (4, 8, 16),
}
PAPERS = [path for path in CONFIGS if path.name.startswith("sit-")]


def options_of(path: Path) -> TrainOptions:
    return TrainOptions(out="runs/x", **read_config(path))


def test_there_are_configurations() -> None:
    recipes = {"sit-b2", "sit-l2", "sit-xl2"}
    assert {path.stem for path in CONFIGS} == {"digits", *recipes, *SHAPES}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_configuration_forces_a_precision(path: Path) -> None:
    # bf16 stood in sit-*.toml: a hundred times slower where the machine has no bf16 units.
    assert options_of(path).precision == "auto"


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_the_papers_configurations_are_the_recipe(path: Path) -> None:
    options = options_of(path)
    depth = model_sizes(options.model, "test")["depth"]
    assert options.align_depth == recipe.align_depth(options.model, depth, options.target)
    assert (options.batch_size, options.lr, options.lr_warmup) == (recipe.BATCH_SIZE, recipe.LR, 0)
    assert (options.ema_decay, options.max_grad_norm) == (recipe.EMA_DECAY, recipe.MAX_GRAD_NORM)
    assert (options.label_dropout, options.beta, options.weight_decay) == (recipe.LABEL_DROPOUT, recipe.BETA, 0.0)
    assert options.align_weight is None  # each alignment comes with its own
    assert build.build_schedule(options) == recipe.UpdateSchedule()


def test_their_optimizer_has_the_papers_betas() -> None:
    (path,) = (path for path in PAPERS if path.stem == "sit-b2")
    small = {**read_config(path), "model": "16,2,2,4", "align_depth": 1, "device": "cpu"}
    options = build.resolve(TrainOptions(out="runs/x", **small))
    (group,) = build.build_optimizer(options, build.build_model(options, open_data("digits"))).param_groups
    assert (group["betas"], group["lr"], group["ema_decay"]) == ((0.9, 0.999), recipe.LR, recipe.EMA_DECAY)


@pytest.mark.training
@pytest.mark.parametrize("name", SHAPES)
def test_a_configuration_for_other_latents_trains_on_them(tmp_path: Path, name: str) -> None:
    """As it is written, but for the model's width and depth: one step, a finite loss, and all the tokens."""
    config = read_config(ROOT / "configs" / f"{name}.toml")
    patch = model_sizes(config["model"], "test")["patch_size"]
    small = {"model": f"16,2,2,{patch}", "align_depth": 1, "batch_size": 2, "steps": 1, "log_every": 1}
    data = {"data": str(write_vae_sd(tmp_path, SHAPES[name])), "latent_scale": "1", "vae": "none", "sample_every": 0}
    result = train(TrainOptions(out=str(tmp_path / "run"), **{**config, **small, **data, "device": "cpu"}))
    assert result.step == 1 and result.last_record is not None and math.isfinite(result.last_record["loss"])
    channels, height, width = SHAPES[name]
    model, _ = open_model(tmp_path / "run")
    assert (
        model.pos_embed.shape[1]
        == height * width // patch**2
        == {"unconditional-b2": 32, "sit-xl2-512": 1024}.get(name, 256)
    )
    assert model.in_channels == channels
    assert model.num_classes == (1 if name == "unconditional-b2" else 3)
    assert model.projector is not None and model.projector[-1].out_features == patch**2 * channels
