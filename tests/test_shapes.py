"""Latents of other shapes than 4x32x32: rectangular, 512 squared, many channels, patches of one element."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models import randomise, small_model
from recorded.recording import assert_same
from training_runs import final, records, tiny

from sra2_fast import SiT, SRA2Loss, load_checkpoint, sample_ode
from sra2_fast.errors import InputError
from sra2_fast.layers.patch_embedding import sincos_positions
from sra2_fast.ops.patchify import patchify, unpatchify
from sra2_fast.train import train

pytestmark = pytest.mark.training

SHAPES = {  # (C, H, W), patch
    "wide": ((4, 8, 16), 2),
    "tall": ((4, 12, 4), 4),
    "sixteen channels": ((16, 8, 8), 2),
    "thirty-two channels, patch 1": ((32, 4, 4), 1),
    "512 squared": ((4, 64, 64), 2),
}


def model_for(shape: tuple[int, int, int], patch: int, **changes: object) -> SiT:
    channels, height, width = shape
    torch.manual_seed(0)
    model = SiT(
        **{
            "input_size": (height, width),
            "patch_size": patch,
            "in_channels": channels,
            "hidden_size": 32,
            "depth": 2,
            "num_heads": 2,
            "num_classes": 3,
            "learn_sigma": False,
            "align_depth": 1,
            **changes,
        }
    )
    randomise(model)
    return model


def batch_of(shape: tuple[int, int, int], batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "latents": torch.randn(batch, *shape, generator=generator),
        "noise": torch.randn(batch, *shape, generator=generator),
        "labels": torch.arange(batch),
        "t": torch.rand(batch, generator=generator),
    }


@pytest.mark.parametrize("name", SHAPES)
def test_losses_and_gradients_are_those_of_pytorch_s_own_operators(name: str) -> None:
    """The fused model with the fused loss against the eager composition in float64, on the same weights."""
    shape, patch = SHAPES[name]
    fused = model_for(shape, patch)
    exact = model_for(shape, patch, implementation="eager").double()
    batch = batch_of(shape)
    found = []
    for model in (fused, exact):
        kind = next(model.parameters()).dtype
        given = {key: one.to(kind) if one.is_floating_point() else one for key, one in batch.items()}
        loss = SRA2Loss()(model.eval(), **given)
        loss.total.backward()
        found.append(loss)
    for got, want in zip(*found, strict=True):
        assert_same(got, want.detach(), name)
    for (key, got), want in zip(fused.named_parameters(), exact.parameters(), strict=True):
        if want.grad is not None:
            assert_same(got.grad, want.grad, key)


@pytest.mark.parametrize("name", ("wide", "tall"))
def test_a_rectangle_s_tokens_lie_where_their_patches_do(name: str) -> None:
    """A token's position is its patch's row and column: a transposed or square table would not be."""
    shape, patch = SHAPES[name]
    model = model_for(shape, patch)
    rows, columns = shape[1] // patch, shape[2] // patch
    assert model.grid == (rows, columns) and model.pos_embed.shape == (1, rows * columns, 32)
    one_row, one_column = sincos_positions(32, (1, columns)), sincos_positions(32, (rows, 1))
    for row in range(rows):
        for column in range(columns):
            position = model.pos_embed[0, row * columns + column]
            assert torch.equal(position, torch.cat([one_row[column][:16], one_column[row][16:]]))
    z = batch_of(shape)["latents"]
    assert torch.equal(model.unpatchify(patchify(z, patch)), z)
    assert torch.equal(unpatchify(patchify(z, patch), patch, *shape[1:]), z)


def test_a_square_model_is_the_same_however_its_size_is_written() -> None:
    number, pair = small_model(), small_model(input_size=[8, 8])
    assert number.config() == pair.config() and number.config()["input_size"] == 8
    for name, value in number.state_dict().items():
        assert torch.equal(value, pair.state_dict()[name]), name


def test_positions_spread_over_another_grid_stay_inside_of_it() -> None:
    """`over`: twice the tokens at half the distance, so every second one is a position of the smaller grid."""
    small, spread = sincos_positions(48, (4, 6)), sincos_positions(48, (8, 12), over=(4, 6))
    assert torch.equal(spread.view(8, 12, 48)[::2, ::2].reshape(24, 48), small)
    assert not torch.equal(spread, sincos_positions(48, (8, 12)))


def test_a_rectangular_model_comes_back_from_its_json_configuration(tmp_path: Path) -> None:
    model = model_for((4, 8, 16), 2)
    again = SiT(**json.loads(json.dumps(model.config())))
    again.load_state_dict(model.state_dict())
    batch = batch_of((4, 8, 16))
    inputs = batch["latents"], batch["t"], batch["labels"]
    assert torch.equal(model.eval()(*inputs), again.eval()(*inputs))


@pytest.mark.parametrize(
    ("size", "match"),
    (
        ((8, 9), r"input_size must be divisible by patch_size = 2, got \(8, 9\)"),
        ((8, 0), r"input_size must be a positive integer, or two \(height, width\), got \(8, 0\)"),
        ("8", r"input_size must be a positive integer, or two \(height, width\), got 8"),
        ((8, 8, 8), r"input_size must be a positive integer, or two \(height, width\)"),
    ),
)
def test_sizes_that_are_none_are_named(size: object, match: str) -> None:
    with pytest.raises(InputError, match=match):
        small_model(input_size=size)


def test_an_input_of_the_transposed_size_is_named() -> None:
    model = model_for((4, 8, 16), 2)
    with pytest.raises(InputError, match=r"SiT: x must be \(B, 4, 8, 16\), got \(1, 4, 16, 8\)"):
        model(torch.randn(1, 4, 16, 8), torch.rand(1), torch.tensor([0]))


def write_vae_sd(folder: Path, shape: tuple[int, int, int], count: int = 12) -> Path:
    draws = np.random.default_rng(0)
    labels = []
    for index in range(count):
        name = f"00000/img-mean-std-{index:08d}.npy"
        path = folder / "vae-sd" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        moments = draws.standard_normal((2 * shape[0], *shape[1:])).astype(np.float32)
        np.save(path, moments)
        labels.append([name, index % 3])
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


@pytest.mark.training
@pytest.mark.parametrize(("shape", "patch"), (((4, 8, 16), 4), ((32, 4, 4), 1)))
def test_a_run_trains_resumes_and_draws_its_grid(tmp_path: Path, shape: tuple[int, int, int], patch: int) -> None:
    data = write_vae_sd(tmp_path, shape)
    options = {"data": str(data), "model": f"16,2,2,{patch}", "latent_scale": "1", "vae": "none", "log_every": 2}
    train(tiny(tmp_path / "run", steps=2, sample_every=2, sample_steps=2, **options))
    train(tiny(tmp_path / "run", steps=4, sample_every=4, sample_steps=2, **options))
    checkpoint = load_checkpoint(final(tmp_path / "run", 4))
    model = SiT(**checkpoint.state["model"])
    model.load_state_dict(checkpoint.model)
    assert (model.in_channels, *model.latent_size) == shape
    assert [record["step"] for record in records(tmp_path / "run")] == [2, 4]
    assert (tmp_path / "run" / "samples" / "step-00000004.png").exists()
    latents = sample_ode(model.eval(), torch.randn(2, *shape), torch.tensor([0, 2]), steps=2)
    assert latents.shape == (2, *shape) and latents.isfinite().all()


@pytest.mark.training
def test_unconditional_training_has_one_class_and_needs_no_null_label(tmp_path: Path) -> None:
    changes = {"ignore_labels": True, "label_dropout": 0.0, "steps": 4, "log_every": 2}
    train(tiny(tmp_path / "run", **changes))
    checkpoint = load_checkpoint(final(tmp_path / "run", 4))
    model = SiT(**checkpoint.state["model"])
    model.load_state_dict(checkpoint.model)
    assert (model.num_classes, model.y_embedder.embedding_table.num_embeddings) == (1, 1)
    noise = torch.randn(2, 1, 8, 8)
    assert sample_ode(model.eval(), noise, torch.zeros(2, dtype=torch.long), steps=2).isfinite().all()
