"""What a sampler's model call costs: one conditioning for every (t, label), and none of it behind anybody's back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import batch_for, small_model
from tolerance import allowed, relative_error
from torch import Tensor

from sra2_fast import SiT, sample_ode
from sra2_fast.errors import InputError

STEPS = 4
GUIDED: dict[str, Any] = {"steps": STEPS, "cfg_scale": 2.0, "guidance_interval": (0.2, 0.8)}


@pytest.fixture
def model() -> SiT:
    return small_model(learn_sigma=False).eval()


def draw(model: SiT) -> tuple[Tensor, Tensor]:
    noise, _, _ = batch_for(model, 6)
    return noise, torch.tensor([1, 1, 1, 7, 7, 7])


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_a_time_and_label_is_embedded_once(model: SiT, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two labels and the null label, at every time, though a guided batch has twelve rows and Heun calls twice."""
    rows: list[int] = []
    embed = model.y_embedder.forward
    monkeypatch.setattr(model.y_embedder, "forward", lambda y, **drops: rows.append(len(y)) or embed(y, **drops))
    sample_ode(model, *draw(model), method=method, **GUIDED)
    assert rows == [3] * STEPS


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_the_numbers_are_those_of_plain_calls(model: SiT, method: str) -> None:
    noise, labels = draw(model)

    def plain(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return model(x, t, y)

    plain.num_classes = model.num_classes  # type: ignore[attr-defined]
    error, _ = relative_error(
        sample_ode(model, noise, labels, method=method, **GUIDED),
        sample_ode(plain, noise, labels, method=method, **GUIDED),
    )
    assert error <= allowed(torch.float32, 60 * STEPS, model.hidden_size)


def test_hooks_on_the_model_are_called(model: SiT) -> None:
    seen: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    sample_ode(model, *draw(model), **GUIDED)
    assert seen == [6, 12, 12, 12]


def test_a_training_model_drops_labels_call_by_call(model: SiT) -> None:
    """As it always did: shared, the draw of a label would be that of all its images."""
    model.train()
    model.y_embedder.dropout_prob = 0.5
    noise, labels = draw(model)
    noise = noise[:1].expand(6, -1, -1, -1).contiguous()
    made = sample_ode(model, noise, labels.fill_(1), steps=1)
    assert len(torch.unique(made[:, 0, 0, 0])) > 1


def test_a_label_beyond_the_classes_is_named(model: SiT) -> None:
    noise, labels = draw(model)
    with pytest.raises(InputError, match=r"SiT: y must be labels from 0 to 10, got 11"):
        sample_ode(model, noise, labels + 4)
    with pytest.raises(InputError, match=r"SiT: x must be \(B, 4, 8, 8\), got \(6, 4, 4, 4\)"):
        sample_ode(model, noise[..., :4, :4], labels)
