"""Aligner: SRA 2 on a model of any kind is SRA2Loss's on ours, changes nothing in the model, and can be taken off."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from foreign_transformer import GRID, aligner_of, transformer
from models import SMALL, batch_for, small_model
from pages import example
from tolerance import allowed, relative_error
from torch import Tensor, nn

from sra2_fast import Aligner, SiT, SRA2Loss
from sra2_fast.errors import InputError
from sra2_fast.ops.patchify import patchify
from sra2_fast.optim import AdamWEMA


@pytest.fixture
def z() -> Tensor:
    return torch.randn(3, 4, 8, 8)


def gradients(*modules: nn.Module) -> dict[str, Tensor]:
    named = [(name, p.grad) for module in modules for name, p in module.named_parameters()]
    return {name: gradient.clone() for name, gradient in named if gradient is not None}


def losses_and_gradients(model: nn.Module, aligner: Aligner, z: Tensor, **given: Any) -> dict[str, Tensor]:
    for one in (model, aligner):
        one.zero_grad()
    target = torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
    prediction = model(z + target, **given)
    losses = aligner(z, prediction, patchify(target, 2) if prediction.dim() == 3 else target)
    losses.total.backward()
    return {**{k: v.detach() for k, v in losses._asdict().items()}, **gradients(model, aligner)}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], roundings: int = 8) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        error, _ = relative_error(got[name], value)
        assert error <= allowed(torch.float32, roundings, summed=48 * 16, row_size=value.numel()), f"{name}: {error}"


@pytest.mark.parametrize("align", ("cosine", "smooth_l1"))
@pytest.mark.parametrize("implementation", ("fused", "eager"))
def test_on_a_sit_it_is_sra2loss(align: str, implementation: str) -> None:
    """The same losses and gradients as the model with its own projector; cosine path, where its target is v*."""
    ours = small_model(align_depth=2, learn_sigma=False)
    plain = SiT(**{**SMALL, "learn_sigma": False})
    plain.load_state_dict({k: v for k, v in ours.state_dict().items() if not k.startswith("projector.")})
    aligner = aligner_of(plain, align=align, implementation=implementation)
    assert ours.projector is not None
    aligner.projector.load_state_dict(ours.projector.state_dict())
    (z, t, y), noise = batch_for(ours), torch.randn(3, 4, 8, 8)
    loss_fn = SRA2Loss(path="cosine", align=align)
    want = loss_fn(ours, z, y, t=t, noise=noise, label_drop=torch.zeros(3, dtype=torch.bool))
    want.total.backward()
    a, s = (torch.pi / 2 * t).cos().view(-1, 1, 1, 1), (torch.pi / 2 * t).sin().view(-1, 1, 1, 1)
    prediction = plain(a * z + s * noise, t, y, force_drop_ids=torch.zeros(3))
    got = aligner(z, prediction, torch.pi / 2 * (a * noise - s * z))
    got.total.backward()
    assert_same(
        {**{k: v.detach() for k, v in got._asdict().items()}, **gradients(plain, aligner)},
        {**{k: v.detach() for k, v in want._asdict().items()}, **gradients(ours)},
        roundings=32,  # through three blocks and back
    )


def test_fused_and_eager_agree_and_the_alignment_alone_is_a_part_of_both(z: Tensor) -> None:
    model = transformer()
    want = losses_and_gradients(model, aligner_of(model, implementation="eager"), z)
    assert_same(losses_and_gradients(model, aligner_of(model), z), want)
    alone = aligner_of(model, weight=3.0)
    model(z)
    losses = alone(z)
    assert losses.velocity == 0 and losses.total.item() == pytest.approx(3 * losses.align.item())
    losses.total.backward()
    reached = gradients(model)
    assert "blocks.1.linear.weight" in reached and "embed.weight" in reached


def test_the_models_gradient_is_that_of_its_own_loss_plus_the_alignments(z: Tensor) -> None:
    """What lies behind the layer does not feel it, what lies before it does."""
    model = transformer()
    plain = losses_and_gradients(model, aligner_of(model, weight=0.0), z)
    aligned = losses_and_gradients(model, aligner_of(model, weight=1.0), z)
    for name in ("blocks.2.linear.weight", "out.weight"):
        assert_same({name: aligned[name]}, {name: plain[name]})
    for name in ("embed.weight", "blocks.0.linear.weight", "blocks.1.linear.weight"):
        assert relative_error(aligned[name], plain[name])[0] > 1e-3


def test_removed_it_leaves_nothing_and_attached_it_changes_nothing(z: Tensor) -> None:
    model, untouched = transformer(), transformer()
    aligner = aligner_of(model)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.add_param_group(aligner.parameter_group(lr=2e-3, weight_decay=0.0))
    assert optimizer.param_groups[1]["lr"] == 2e-3 and len(optimizer.param_groups[1]["params"]) == 10
    assert torch.equal(model(z), untouched(z))
    assert list(model.state_dict()) == list(untouched.state_dict())
    aligner.remove()
    assert torch.equal(model(z), untouched(z)) and aligner._tap.output is None
    for (name, one), (other_name, other) in zip(model.named_modules(), untouched.named_modules(), strict=True):
        assert name == other_name and vars(one).keys() == vars(other).keys()
        assert not one._forward_hooks and not one._forward_pre_hooks and not one._backward_hooks
    with pytest.raises(InputError, match="it was removed"):
        aligner(z)


def test_state_dict_brings_the_projector_and_the_statistics(z: Tensor) -> None:
    model = transformer()
    statistics = {"latent_mean": [0.1, 0.2, 0.3, 0.4], "latent_std": [1.0, 2.0, 3.0, 4.0]}
    first, second = aligner_of(model, **statistics), Aligner(model, "blocks.1", **GRID, **statistics)
    assert not any(key.startswith("blocks") for key in first.state_dict())
    second.load_state_dict(first.state_dict())
    assert_same(losses_and_gradients(model, second, z), losses_and_gradients(model, first, z), roundings=0)


def test_the_guides_three_lines(z: Tensor) -> None:
    model = nn.Module()
    model.transformer_blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(8))
    model.hidden_size = 12
    optimizer, prediction = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(2, 4, 32, 32)
    names = {"model": model, "optimizer": optimizer, "latents": torch.randn(2, 4, 32, 32), "target": prediction + 1}
    attach, _, loss = example("docs/guide.md", "aligner = Aligner(").partition("\n#")
    exec(attach, names)
    names["prediction"] = prediction + model.transformer_blocks[7](torch.randn(2, 256, 12)).mean()
    exec(f"#{loss}", names)
    names["loss"].backward()
    optimizer.step()
    assert model.transformer_blocks[7].weight.grad.any() and len(optimizer.param_groups) == 2


def test_named_parameters_for_our_optimizer(z: Tensor) -> None:
    model = transformer()
    aligner = aligner_of(model)
    optimizer = AdamWEMA(model.named_parameters(), lr=1e-2, max_grad_norm=None)
    optimizer.add_param_group(aligner.parameter_group(named=True, ema_decay=None))
    before = aligner.projector[0].weight.detach().clone()
    losses_and_gradients(model, aligner, z)
    optimizer.step()
    assert not torch.equal(aligner.projector[0].weight, before)
    assert not any(name.startswith("aligner.") for name in optimizer.ema_state_dict() if "blocks" in name)
    assert "aligner.projector.0.weight" in optimizer.param_groups[1]["param_names"]


def test_z_scored_targets_change_the_alignment_and_not_the_prediction(z: Tensor) -> None:
    model, mean, std = transformer(), torch.tensor([3.0, -1.0, 0.5, 0.0]), torch.tensor([4.0, 0.5, 2.0, 1.0])
    wide = z * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    scored = aligner_of(model, align="smooth_l1", latent_mean=mean, latent_std=std)
    plain = aligner_of(model, align="smooth_l1")
    target = torch.randn(3, 4, 8, 8)
    results = []
    for aligner, latents in ((scored, wide), (plain, z)):
        prediction = model(z)
        results.append(aligner(latents, prediction, patchify(target, 2)))
    error, _ = relative_error(results[0].align, results[1].align.double())
    assert error <= allowed(torch.float32, 4, summed=48 * 16)
    error, _ = relative_error(results[0].velocity, results[1].velocity.double())
    assert error <= allowed(torch.float32, 2, summed=48 * 16)
    model(z)
    assert abs(plain(wide).align - results[1].align) > 0.1


def test_the_weight_decays_over_a_part_of_the_run(z: Tensor) -> None:
    model = transformer()
    aligner = aligner_of(model, weight=2.0, decay=(20, 30))
    assert [aligner.weight_at(step) for step in (0, 20, 25, 30, 99)] == [2.0, 2.0, 1.0, 0.0, 0.0]
    model(z)
    losses = aligner(z, step=25)
    assert losses.total.item() == losses.align.item()
    model(z)
    with pytest.raises(InputError, match="step="):
        aligner(z)


def test_video_tokens_count_frames_first(z: Tensor) -> None:
    """A head that copies its input sees the very patches that it is compared with: the cosine is one."""
    clip = torch.randn(2, 4, 3, 8, 8)

    class Video(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cut = nn.Conv3d(4, 16, (1, 2, 2), (1, 2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.cut(x).flatten(2).mT)

    model = Video()
    model.block = nn.Identity()
    with torch.no_grad():  # channel (i, j, c) of the convolution is element (i * 2 + j) * 4 + c of a patch
        model.cut.weight.copy_(torch.eye(16).view(16, 2, 2, 4).permute(0, 3, 1, 2).unsqueeze(2))
        model.cut.bias.zero_()
    aligner = Aligner(
        model,
        "block",
        latent_channels=4,
        patch_size=(1, 2, 2),
        grid=(3, 4, 4),
        hidden_size=16,
        projector_layers=1,
    )
    nn.init.eye_(aligner.projector[0].weight)
    nn.init.zeros_(aligner.projector[0].bias)
    tokens = model(clip)
    assert aligner(clip).align.item() == pytest.approx(-1, abs=1e-5)
    model(clip)
    as_tokens = aligner(tokens.detach(), tokens, tokens.detach())
    assert as_tokens.align.item() == pytest.approx(-1, abs=1e-5) and as_tokens.velocity < 1e-12
    model(clip.flip(2))
    assert aligner(clip).align > -0.5


def test_select_takes_the_text_tokens_away(z: Tensor) -> None:
    """Sixteen text tokens beside sixteen of the image: nobody can tell, but the user."""
    model = transformer()
    want = losses_and_gradients(model, aligner_of(model), z)
    for select in (1, lambda output: torch.cat(output, 1)[:, 16:]):
        got = losses_and_gradients(model, aligner_of(model, select=select), z, text_tokens=16)
        assert_same(got, want)
    aligner = aligner_of(model)
    model(z, text_tokens=16)
    with pytest.raises(InputError, match=r"one tensor of 16 tokens, or give select=, got \[\(3, 16, 12\), \(3, 16, 12"):
        aligner(z)


@pytest.mark.parametrize("is_reentrant", (False, True))
def test_recomputed_activations_give_the_same_and_the_second_run_is_not_a_new_one(
    is_reentrant: bool, z: Tensor
) -> None:
    model, plain = transformer(recompute=is_reentrant), transformer()
    aligner = aligner_of(model)
    z.requires_grad_()  # or a reentrant checkpoint of frozen inputs has nothing to run again
    got = losses_and_gradients(model, aligner, z)
    assert_same(got, losses_and_gradients(plain, aligner_of(plain), z), roundings=0)
    assert aligner._tap.output is None
    with pytest.raises(InputError, match=r"blocks\.1 has not run since the last loss"):
        aligner(z)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # of the call without gradients
def test_what_a_reentrant_checkpoint_hides_is_refused_and_evaluation_needs_no_gradient(z: Tensor) -> None:
    """Within one the first run has no gradients; the projector alone would learn, and nobody would notice."""
    model = transformer(recompute=True)
    aligner = aligner_of(model, "blocks.1.linear")
    model(z.requires_grad_())
    with pytest.raises(InputError, match=r"carries no gradient; .* use_reentrant=False"):
        aligner(z)
    with torch.no_grad():
        prediction = model(z)
        assert torch.isfinite(aligner(z, prediction, patchify(z, 2)).total)


def test_a_copy_of_the_model_keeps_nothing(z: Tensor) -> None:
    """An average of the weights is a deep copy; its calls used up the model's tokens, or held others for ever."""
    model = transformer()
    aligner = aligner_of(model)
    prediction = model(z)
    average = copy.deepcopy(model)
    average(2 * z)
    want = losses_and_gradients(model, aligner_of(model), z)
    got = aligner(z, prediction, patchify(torch.randn(z.shape, generator=torch.Generator().manual_seed(3)), 2))
    assert got.align.isfinite() and want["align"].isfinite()
    (tap,) = average.blocks[1]._forward_hooks.values()
    assert tap.output is None and not tap.is_live


@pytest.mark.slow
@pytest.mark.parametrize("recompute", (None, False))
def test_compiled_models(z: Tensor, recompute: bool | None) -> None:
    model = transformer(recompute=recompute)
    aligner = aligner_of(model)
    want = losses_and_gradients(model, aligner, z)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=recompute is None)
    got = losses_and_gradients(compiled, aligner, z)
    assert_same({name.removeprefix("_orig_mod."): value for name, value in got.items()}, want)


@pytest.mark.parametrize("is_autocast", (False, True))
def test_bfloat16_weights_and_autocast(is_autocast: bool, z: Tensor) -> None:
    """A bf16 model beside a float32 projector, as in LoRA; and autocast over both."""
    model = transformer() if is_autocast else transformer().bfloat16()
    aligner = aligner_of(model)
    assert aligner.projector[0].weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        losses = aligner(z, model(z if is_autocast else z.bfloat16()), patchify(z, 2))
    losses.total.backward()
    assert losses.total.dtype == torch.float32
    exact = transformer()
    want = aligner_of(exact)
    exact_losses = want(z, exact(z), patchify(z, 2))
    # Five layers of bf16 inputs, weights and outputs, and as many in the model; a cosine moves with the error's norm.
    assert abs(losses.align - exact_losses.align) < allowed(torch.bfloat16, 30)
    assert abs(losses.velocity / exact_losses.velocity - 1) < allowed(torch.bfloat16, 30)
    for name, gradient in gradients(model).items():
        assert gradient.isfinite().all() and gradient.any(), name


def test_the_hook_works_through_wrappers() -> None:
    """A name of the inner model is found in DDP's `module` and peft's `base_model.model` too."""

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.module = inner

    model = transformer()
    aligner = aligner_of(Wrapper(model))
    assert aligner.hidden_size == 12 and len(model.blocks[1]._forward_hooks) == 1
