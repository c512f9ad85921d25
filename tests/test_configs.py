"""The shipped configurations: each is read as a user would, and held to recipe.py and to what runs anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from repository import ROOT

from sra2_fast import recipe
from sra2_fast.data import open_data
from sra2_fast.models import model_sizes
from sra2_fast.train import TrainOptions, build
from sra2_fast.train.options import read_config

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
PAPERS = [path for path in CONFIGS if path.name.startswith("sit-")]


def options_of(path: Path) -> TrainOptions:
    return TrainOptions(out="runs/x", **read_config(path))


def test_there_are_configurations() -> None:
    assert {path.stem for path in CONFIGS} == {"digits", "sit-b2", "sit-l2", "sit-xl2"}


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
