"""What code of the public repositories does with a model: sampling from their checkpoints, calling parts of it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from models import batch_for, randomise, small_model
from repository import ROOT
from tolerance import allowed, relative_error
from torch import Tensor

from sra2_fast import SiT, sample_ode
from sra2_fast.compat import repa

STEPS = 50  # sample_ode's own


def public_samples(model: SiT, noise: Tensor, labels: Tensor, cfg_scale: float) -> Tensor:
    """The SiT repository's: dx/dt = v from noise at t = 0 to data at t = 1, by Euler, three channels guided."""
    x = torch.cat([noise, noise]).double()
    y = torch.cat([labels, torch.full_like(labels, model.num_classes)])
    for t in torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)[:-1].tolist():
        times = torch.full((len(x),), t, dtype=noise.dtype)
        x = x + model.forward_with_cfg(x.to(noise.dtype), times, y, cfg_scale).double() / STEPS
    return x[: len(noise)].to(noise.dtype)


def test_the_guides_two_lines_sample_from_a_public_checkpoint_in_its_own_direction_of_time() -> None:
    """Without them the samples are others, and nothing says so."""
    block = re.search(r"```python\n([^`]*1 - t.*?)```", (ROOT / "docs" / "guide.md").read_text(), re.S)
    assert block
    model = small_model(learn_sigma=True).eval()
    noise, _, labels = batch_for(model)
    names: dict[str, Any] = {"model": model, "noise": noise, "labels": labels, "sample_ode": sample_ode}
    exec(block[1], names)
    with torch.no_grad():
        want = public_samples(model, noise, labels, 4.0)
        astray = sample_ode(model, noise, labels, cfg_scale=4.0, guided_channels=3)
    # The same calls of the same model: at every step 1 - t, x and the guided velocity, 4 v - 3 v_null, are rounded.
    error, _ = relative_error(names["latents"], want)
    assert error <= (4 + 3) * allowed(torch.float32, 3 * STEPS)
    assert relative_error(astray, want)[0] > 0.1


def public_forward(model: Any, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The forward pass of the public classes, part by part, as code that derives from them has it."""
    assert model.x_embedder.num_patches == model.pos_embed.shape[1] == (x.shape[-1] // model.patch_size) ** 2
    assert model.x_embedder.patch_size == (model.patch_size, model.patch_size)
    x = model.x_embedder(x) + model.pos_embed
    c = model.t_embedder(t) + model.y_embedder(y, model.training)
    for block in model.blocks:
        x = block(x, c)
    return model.unpatchify(model.final_layer(x, c))


@pytest.mark.parametrize("learn_sigma", (False, True))
def test_the_parts_have_the_public_names_and_arguments(learn_sigma: bool) -> None:
    model = small_model(learn_sigma=learn_sigma, class_dropout_prob=0.5, implementation="eager")
    inputs = batch_for(model)
    for training in (False, True):
        model.train(training)
        torch.manual_seed(4)
        got = public_forward(model, *inputs)
        torch.manual_seed(4)
        want = model(*inputs)
        assert got.shape == (3, 8 if learn_sigma else 4, 8, 8)
        assert relative_error(got[:, :4].detach(), want.detach())[0] <= allowed(torch.float32, 6)


def test_the_parts_of_a_repa_model_have_them_too() -> None:
    model = repa.SiT(input_size=8, hidden_size=48, depth=2, num_heads=3, num_classes=10, encoder_depth=1).eval()
    randomise(model)
    inputs = batch_for(model)
    got, want = public_forward(model, *inputs), model(*inputs)[0]
    # Two roundings where a branch is added, four times: the tap closes the stream in the next norm's kernel.
    assert relative_error(got.detach(), want.detach())[0] <= allowed(torch.float32, 8)


def test_label_dropout_is_the_public_one() -> None:
    """`token_drop` drops by chance whenever it is called; `y_embedder(y, train)` calls it in training only."""
    embedder = small_model(class_dropout_prob=0.5).eval().y_embedder
    labels = torch.arange(10)
    torch.manual_seed(1)
    dropped = torch.rand(10) < 0.5
    torch.manual_seed(1)
    want = torch.where(dropped, 10, labels)
    assert torch.equal(embedder.token_drop(labels), want)
    torch.manual_seed(1)
    assert torch.equal(embedder(labels, True), embedder.embedding_table(want))
    assert torch.equal(embedder(labels, False), embedder.embedding_table(labels))
    forced = torch.arange(10) % 2
    want = torch.where(forced == 1, 10, labels)
    assert torch.equal(embedder.token_drop(labels, forced), want)
    assert torch.equal(embedder(labels, False, forced), embedder.embedding_table(want))
