"""`align_tokens`: a random share of each image's tokens is aligned, keyed like every draw and right in expectation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import loss_batch, random_model, small_model
from scipy import stats
from test_train_step import gradients_of, make_batch, make_step
from tolerance import allowed, assert_close, relative_error
from training_runs import assert_same_checkpoint, final, tiny

from sra2_fast import SRA2Loss
from sra2_fast.data import make_loader, open_data
from sra2_fast.errors import InputError
from sra2_fast.objective import terms
from sra2_fast.objective.tokens import random_tokens, take_tokens, token_count
from sra2_fast.ops.patchify import patchify
from sra2_fast.randomness import Stream, uniform
from sra2_fast.train.loop import train

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from align_tokens_gradient import compare, gradients

pytestmark = pytest.mark.training

RECORDED = [[0, 2, 8, 13], [1, 6, 9, 14]]


def uniforms(count: int, step: int = 0) -> torch.Tensor:
    return torch.from_numpy(uniform(Stream.TOKENS, 5, step, np.arange(count)))


def weights_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def float32_batch(size: int = 4) -> dict[str, torch.Tensor]:
    batch = make_batch(size)
    return {"latents": batch.latents, "labels": batch.labels, "noise": batch.noise, "t": batch.time_uniform}


def test_the_tokens_are_different_ones_in_the_number_asked_for() -> None:
    u, several = uniforms(64), {}
    for share, count in ((1e-6, 1), (0.25, 10), (0.5, 20), (0.999, 39), (1.0, 39)):
        chosen = several[share] = random_tokens(u, 39, share)
        assert chosen.shape == (64, count) == (64, token_count(share, 39)) and chosen.dtype == torch.int64
        assert bool((chosen.diff(dim=1) > 0).all()) and int(chosen.min()) >= 0 and int(chosen.max()) < 39
    for few, many in zip(several[0.25].tolist(), several[0.5].tolist(), strict=True):
        assert set(few) < set(many)


def test_a_token_and_a_pair_are_chosen_as_often_as_any_other() -> None:
    """20,000 images, 16 of 64 tokens.

    A token's count is binomial, and the counts have a fixed sum, so (N - 1) / N sum (c - B p)^2 / (B p (1 - p)) is
    chi-squared with N - 1 degrees of freedom. A pair's count is binomial too; that one of 2,016 pairs lies beyond 5
    standard deviations has a chance of 1 in 860.
    """
    images, n, tokens = 20_000, 16, 64
    chosen = torch.zeros(images, tokens, dtype=torch.float64)
    chosen.scatter_(1, random_tokens(uniforms(images), tokens, n / tokens), 1.0)
    p = n / tokens
    counts = chosen.sum(0)
    statistic = float(((counts - images * p) ** 2).sum() / (images * p * (1 - p)) * (tokens - 1) / tokens)
    assert 1e-3 < stats.chi2.cdf(statistic, tokens - 1) < 1 - 1e-3
    q = p * (n - 1) / (tokens - 1)
    pairs = (chosen.T @ chosen)[torch.triu_indices(tokens, tokens, 1).unbind()]
    assert float((pairs - images * q).abs().max()) < 5 * (images * q * (1 - q)) ** 0.5


def test_recorded_tokens() -> None:
    """These exact tokens are what a resumed run of an earlier version relies on."""
    assert random_tokens(torch.tensor([3 * 2.0**-24, 1 - 2.0**-24]), 16, 0.25).tolist() == RECORDED


@pytest.mark.parametrize("implementation", ["eager", "fused"])
def test_all_tokens_are_the_loss_as_it_was(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever uniform comes along: nothing is drawn or chosen, and every bit is the same."""
    model = small_model(learn_sigma=False, align_depth=1, implementation=implementation).eval()
    monkeypatch.setattr(terms, "random_tokens", None)
    found = []
    for settings, given in (({}, {}), ({"align_tokens": 1.0}, {"token_uniform": uniforms(4)})):
        loss = SRA2Loss(**settings)(model, **float32_batch(), **given)
        found.append([*loss, *torch.autograd.grad(loss.total, weights_of(model))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("target", ["vae", "features", "teacher"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_same_tokens_of_projection_and_target_are_compared(target: str, reduction: str) -> None:
    width = {"vae": None, "features": 20, "teacher": 48}[target]
    model, batch, u = random_model(projection_dim=width).eval(), loss_batch(), uniforms(3)
    features = torch.randn(3, 16, 20, dtype=torch.float64)
    extra: dict[str, Any] = {"features": {"features": features}, "teacher": {"teacher": model}}.get(target, {})
    if target == "teacher":
        extra["teacher_gap"] = torch.full((3,), 0.05, dtype=torch.float64)
    loss_fn = SRA2Loss(target=target, align_tokens=0.25, teacher_depth=3, reduction=reduction)
    seen: list[torch.Size] = []
    hook = model.projector.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:2]))
    loss = loss_fn(model, **batch, **extra, token_uniform=u)
    hook.remove()
    assert seen == [(3, 4)]  # the head pays for these tokens alone
    z, e, t = batch["latents"], batch["noise"], batch["t"][:, None, None, None]
    projection = model((1 - t) * z + t * e, batch["t"], batch["labels"], return_projection=True)[1]
    earlier = (batch["t"] - 0.05).clamp(min=0)
    s = earlier[:, None, None, None]
    against = {"vae": patchify(z, 2), "features": features}.get(target)
    if against is None:
        against = model((1 - s) * z + s * e, earlier, batch["labels"], return_hidden=3)
    chosen = random_tokens(u, 16, 0.25).tolist()
    pairs = [(projection[i, rows], against[i, rows]) for i, rows in enumerate(chosen)]
    each = torch.stack([-F.cosine_similarity(a, b, dim=-1).mean() for a, b in pairs])
    assert_close(loss.align, each if reduction == "none" else each.mean(), torch.float64, 100)
    assert_close(loss.total.detach(), loss.velocity + 0.5 * loss.align, torch.float64, 4)


def test_eager_and_fused_agree() -> None:
    found = []
    for implementation in ("eager", "fused"):
        model = small_model(learn_sigma=False, align_depth=1, implementation=implementation).eval()
        loss = SRA2Loss("linear", align="smooth_l1", align_tokens=0.5)(
            model, **float32_batch(), token_uniform=uniforms(4)
        )
        found.append([loss.total, *torch.autograd.grad(loss.total, weights_of(model))])
    for eager, fused in zip(*found, strict=True):
        error, _ = relative_error(fused, eager.detach().double())
        assert error < allowed(torch.float32, 48, 4 * 16 * 48)


@pytest.mark.parametrize(("align", "share"), [("cosine", 0.25), ("smooth_l1", 0.5)])
def test_the_gradient_is_right_in_expectation(align: str, share: float) -> None:
    """|mean of K gradients - all tokens' gradient|^2 is tr(cov) / K in expectation. As a sum of weighted squares of
    normals it exceeds 16 times that with at most the chance of a single one, 4 standard deviations: 6e-5."""
    model = random_model(hidden_size=12, num_heads=1, depth=1, align_depth=1, projector_layers=2).eval()
    batch = {name: value[:2] for name, value in loss_batch().items()}
    weights = weights_of(model)

    def gradient(**given: Any) -> torch.Tensor:
        share_of = share if given else 1.0
        loss = SRA2Loss(align=align, align_tokens=share_of)(model, **batch, **given)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss.total, weights)])

    whole, draws = gradient(), 200
    found = torch.stack([gradient(token_uniform=uniforms(2, step)) for step in range(draws)])
    variance = float(found.var(0).sum())
    assert variance > 1e-4 * float(whole.square().sum())  # or there is nothing to average
    assert float((found.mean(0) - whole).square().sum()) < 16 * variance / draws


def test_draws_keep_the_uniform_or_make_it_last() -> None:
    latents, u = torch.randn(4, 4, 8, 8), uniforms(4)
    assert SRA2Loss(align_tokens=0.5).draws(latents, 0.1, token_uniform=u).token_uniform is u
    assert SRA2Loss(align=None, align_tokens=0.5).draws(latents, 0.1, token_uniform=u).token_uniform is None
    torch.manual_seed(3)
    plain = SRA2Loss().draws(latents, 0.1)
    after = torch.rand(4)
    torch.manual_seed(3)
    some = SRA2Loss(align_tokens=0.5).draws(latents, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], some[:3], strict=True))
    assert plain.token_uniform is None and torch.equal(some.token_uniform, after)


@pytest.mark.slow
def test_it_compiles_without_a_break() -> None:
    tokens = torch.randn(3, 16, 5)

    def run(u: torch.Tensor) -> torch.Tensor:
        return take_tokens(tokens, random_tokens(u, 16, 0.5))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(uniforms(3)), run(uniforms(3)))


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(InputError, match=rf"SRA2Loss: align_tokens must be in \(0, 1\], got {share}"):
        SRA2Loss(align_tokens=share)


def test_a_uniform_of_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"SRA2Loss: token_uniform must be \(3,\), got \(2,\)"):
        SRA2Loss(align_tokens=0.5)(random_model(), **loss_batch(), token_uniform=uniforms(2))
    with pytest.raises(InputError, match=r"target tokens must be .* = \(3, 16, 20\), got \(3, 9, 20\)"):
        model, features = random_model(projection_dim=20), torch.zeros(3, 9, 20)
        SRA2Loss(target="features", align_tokens=0.5)(model, **loss_batch(), features=features)


@pytest.mark.training
def test_microbatches_align_the_tokens_of_the_batch() -> None:
    """The same subset for any split: else the gradients would differ by far more than roundings."""
    batch, found = make_batch(), []
    for size in (8, 3, 1):
        step = make_step()
        step.loss_fn = SRA2Loss(align_tokens=0.25)
        torch.manual_seed(size)  # torch's own draws have no part in it
        found.append(gradients_of(step, batch.split(size))[1])
    for cut in found[1:]:
        for name, value in found[0].items():
            error, _ = relative_error(cut[name], value.double())
            assert error < allowed(torch.float32, 8, 8 * 16), f"{name}: {error:.2e}"


@pytest.mark.training
def test_a_resumed_run_aligns_the_same_tokens(tmp_path: Path) -> None:
    small = {"model": "16,2,2,2", "align_tokens": 0.25}
    train(tiny(tmp_path / "whole", steps=6, **small))
    train(tiny(tmp_path / "cut", steps=3, **small))
    train(tiny(tmp_path / "cut", steps=6, **small))
    assert_same_checkpoint(final(tmp_path / "whole", 6), final(tmp_path / "cut", 6))
    with pytest.raises(InputError, match=r"other options \(--align-tokens 0\.25 -> 1\.0\)"):
        train(tiny(tmp_path / "cut", steps=8, **{**small, "align_tokens": 1.0}))


def test_the_loader_keys_the_uniforms_by_their_place_in_the_global_batch() -> None:
    given: dict[str, Any] = {"batch_size": 8, "seed": 5, "start_step": 3, "num_steps": 1}
    halves = [next(iter(make_loader(open_data("digits"), **given, rank=r, world_size=2))) for r in (0, 1)]
    assert torch.equal(torch.cat([half.token_uniform for half in halves]), uniforms(8, 3))


def test_the_benchmark_compares_the_gradients_it_names() -> None:
    model, batch = small_model(learn_sigma=False, align_depth=1).eval(), make_batch(4)
    given = SRA2Loss().draws(batch.latents, 0.0, noise=batch.noise, t=batch.time_uniform)._asdict()
    total = SRA2Loss()(model, batch.latents, batch.labels, **given).total
    trunk = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("projector")]
    found = gradients(model, batch, 1.0)
    want = torch.cat([g.flatten() for g in torch.autograd.grad(total, trunk, retain_graph=True)])
    assert_close(found["trunk, whole loss"], want.double(), torch.float32, 8, 4 * 16)
    head = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.projector.parameters()))])
    assert torch.equal(found["head, alignment"], head)  # the velocity has no part in it
    figures = compare(model, batch, batch, draws=2)
    for cosine, error in figures["other images"].values():  # the same ones here
        assert error == 0 and cosine == pytest.approx(1, abs=1e-5)
    assert all(0 < figures["0.5"][part][1] < figures["0.25"][part][1] for part in found)
