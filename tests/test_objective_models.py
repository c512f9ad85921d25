"""Which models SRA2Loss takes beyond a bare float32 SiT: wrapped ones, bf16 ones, and those of compat."""

from __future__ import annotations

import copy

import pytest
import torch
from models import TINY, loss_batch, random_model
from tolerance import allowed, assert_close

from sra2_fast import SiT, SRA2Loss
from sra2_fast.compat import repa, sra
from sra2_fast.errors import InputError, InputTypeError


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return loss_batch()


class Wrapper(torch.nn.Module):
    """One module around another, under the name that its kind of wrapper has for it."""

    def __init__(self, name: str, inner: torch.nn.Module) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, inner)

    def forward(self, *args, **kwargs):
        return getattr(self, self.name)(*args, **kwargs)


@pytest.mark.parametrize(
    "names", [("module",), ("_orig_mod", "module"), ("model", "base_model"), ("module", "_orig_mod")]
)
def test_wrappers_of_ddp_compile_and_peft_are_looked_through(batch, names):
    """peft's model has `base_model.model`: it was refused as no SiT."""
    model = random_model(class_dropout_prob=0.0)
    want, wrapped = SRA2Loss()(model, **batch).total, model
    for name in names:
        wrapped = Wrapper(name, wrapped)
    assert SRA2Loss()(wrapped, **batch).total == want
    with pytest.raises(InputTypeError, match=r"model must be a sra2_fast.SiT, bare or wrapped, got .*Linear"):
        SRA2Loss()(Wrapper("base_model", Wrapper("model", torch.nn.Linear(2, 2))), **batch)


def test_a_module_that_is_its_own_base_model_is_refused_not_searched_for_ever(batch):
    class Own(torch.nn.Linear):
        @property
        def base_model(self):
            return self

    with pytest.raises(InputTypeError, match=r"bare or wrapped, got .*Own"):
        SRA2Loss()(Own(2, 2), **batch)


@pytest.mark.parametrize("implementation", ["eager", "fused"])
@pytest.mark.parametrize("target", ["vae", "teacher"])
def test_a_bf16_model_and_a_bf16_teacher_get_inputs_of_their_type(batch, target, implementation):
    """x_t is float32 and was multiplied with bf16 weights; the targets stay float32."""
    projection_dim = 48 if target == "teacher" else None
    model = SiT(**TINY, align_depth=2, projection_dim=projection_dim, implementation=implementation).eval()
    model.load_state_dict(random_model(projection_dim=projection_dim).state_dict())
    single = {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}
    extra = {"teacher": copy.deepcopy(model), "teacher_gap": torch.full((3,), 0.1)} if target == "teacher" else {}
    want = SRA2Loss(target=target)(model, **single, **extra)
    half = copy.deepcopy(model).bfloat16()
    if target == "teacher":
        extra["teacher"] = copy.deepcopy(half)
        assert torch.isfinite(SRA2Loss(target=target)(model, **single, **extra).total)
    got = SRA2Loss(target=target)(half, **single, **extra)
    got.total.backward()
    assert half.blocks[0].attn.qkv.weight.grad.dtype == torch.bfloat16
    # Four blocks of ten roundings and a norm of the result; a sum of squares doubles the relative error.
    assert abs(float((got.total - want.total).detach())) <= 2 * allowed(torch.bfloat16, 42) * float(
        want.velocity + want.align.abs()
    )


def compat_pair(name: str, **sizes) -> tuple[torch.nn.Module, SiT]:
    """A model of compat, in float64 and random, and sra2_fast.SiT with the same weights."""
    small = {k: v for k, v in TINY.items() if k != "learn_sigma"}
    if name == "repa":
        theirs = repa.SiT(**small, encoder_depth=2, projector_dim=40, implementation="eager", **sizes)
        head = {"align_depth": 2, "projector_layers": 3, "projector_dim": 40, "projection_dim": theirs.z_dims[0]}
        names = {"projectors.0.": "projector."}
    else:
        theirs = sra.SiT(**{**small, **sizes}, implementation="eager")
        head = {"align_depth": 8 if theirs.depth == 28 else 4, "projector_layers": 2, "projection_dim": 48}
        names = {"ap_head.linear1.": "projector.0.", "ap_head.linear2.": "projector.2."}
    ours = SiT(**{**TINY, "depth": theirs.depth}, **head, implementation="eager").double()
    with torch.no_grad():
        for p in theirs.double().parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    state = theirs.state_dict()
    for theirs_name, our_name in names.items():
        state = {key.replace(theirs_name, our_name): value for key, value in state.items()}
    ours.load_state_dict({key: value for key, value in state.items() if not key.startswith("projectors.")})
    return theirs, ours


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize(
    ("name", "target", "sizes"),
    [
        ("repa", "features", {"z_dims": [20, 24]}),
        ("repa", "vae", {"z_dims": [16]}),
        ("sra", "teacher", {}),
        ("sra", "teacher", {"depth": 28}),
    ],
)
def test_the_models_of_compat_train_with_it(batch, name, target, sizes, wrap):
    """They were refused, though a public sampler needs them: it takes `model(...)[0]`."""
    theirs, ours = compat_pair(name, **sizes)
    assert (theirs.align_depth, ours.align_depth) == (ours.align_depth, 8 if theirs.depth == 28 else ours.align_depth)
    loss_fn = SRA2Loss(target=target)
    extra = {"label_drop": torch.tensor([True, False, False])}
    if target == "features":
        extra["features"] = torch.randn(3, 16, 20, dtype=torch.float64)
    found = []
    for model in (theirs, ours):
        if target == "teacher":
            extra |= {"teacher": copy.deepcopy(model).eval(), "teacher_gap": torch.full((3,), 0.1)}
        loss = loss_fn(Wrapper("module", model) if wrap else model, **batch, **extra)
        loss.total.backward()
        found.append((loss, model.blocks[0].attn.qkv.weight.grad))
    for got, want in zip(found[0][0], found[1][0], strict=True):
        assert_close(got.detach(), want.detach(), torch.float64, 100)
    assert_close(found[0][1], found[1][1], torch.float64, 100, name="gradient")
    velocity = theirs.eval()(batch["noise"], batch["t"], batch["labels"])[0]  # what it was before
    assert_close(velocity, ours.eval()(batch["noise"], batch["t"], batch["labels"]).detach(), torch.float64, 100)


def test_a_compat_model_with_the_wrong_head_is_refused_in_one_line(batch):
    theirs, _ = compat_pair("repa", z_dims=[20])
    with pytest.raises(InputError, match=r"projection_dim must be patch_size\^2 C = 16 for target='vae', got 20"):
        SRA2Loss()(theirs, **batch)
    theirs, _ = compat_pair("sra")
    with pytest.raises(InputError, match=r"projection_dim must be patch_size\^2 C = 16 for target='vae', got 48"):
        SRA2Loss()(theirs, **batch)
    without = repa.SiT(input_size=8, hidden_size=48, depth=2, num_heads=3, encoder_depth=1, z_dims=[]).double()
    with pytest.raises(InputError, match=r"there is no projector"):
        SRA2Loss()(without, **batch)
