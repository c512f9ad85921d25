"""SRA2Loss against plain transcriptions of its formulas, for every path, alignment and target."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from models import TINY, loss_batch, random_model
from tolerance import assert_close

from sra2_fast import SiT, SRA2Loss
from sra2_fast.errors import InputError, InputTypeError
from sra2_fast.ops.interpolant import interpolant
from sra2_fast.ops.patchify import patchify, unpatchify


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return loss_batch()


def path_by_hand(path: str, z: torch.Tensor, e: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_t, v) written out per sample with math, not tensors."""
    xs, vs = [], []
    for zi, ei, ti in zip(z, e, t.tolist(), strict=True):
        if path == "linear":
            xs.append((1 - ti) * zi + ti * ei)
            vs.append(ei - zi)
        else:
            xs.append(math.cos(math.pi * ti / 2) * zi + math.sin(math.pi * ti / 2) * ei)
            vs.append(math.pi / 2 * (math.cos(math.pi * ti / 2) * ei - math.sin(math.pi * ti / 2) * zi))
    return torch.stack(xs), torch.stack(vs)


def alignment_by_hand(kind: str, p: torch.Tensor, target: torch.Tensor, beta: float) -> float:
    """The sums of docs/method.md, one token after the other."""
    p, target = p.reshape(-1, p.shape[-1]), target.reshape(-1, target.shape[-1])
    values = []
    for a, b in zip(p.tolist(), target.tolist(), strict=True):
        if kind == "cosine":
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            values.append(-dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b)))
            continue
        for x, y in zip(a, b, strict=True):
            d = abs(x - y)
            huber = d * d / (2 * beta) if d <= beta else d - beta / 2
            values.append({"smooth_l1": huber, "mse": d * d, "l1": d}[kind])
    return sum(values) / len(values)


def patches_by_hand(image: torch.Tensor, p: int) -> torch.Tensor:
    _, c, h, w = image.shape
    tokens = []
    for row in range(0, h, p):
        for column in range(0, w, p):
            tokens.append(
                torch.stack([image[:, k, row + i, column + j] for i in range(p) for j in range(p) for k in range(c)], 1)
            )
    return torch.stack(tokens, 1)


def check(got: torch.Tensor, want: float | torch.Tensor) -> None:
    want = torch.as_tensor(want, dtype=torch.float64)
    assert_close(got.double(), want.detach(), torch.float64, 100, name="loss")


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("align", ["cosine", "smooth_l1", "mse", "l1"])
def test_sra2_is_its_formula(batch, path, align):
    model = random_model().eval()
    loss = SRA2Loss(path=path, align=align, beta=0.4)(model, **batch)
    x_t, v = path_by_hand(path, batch["latents"], batch["noise"], batch["t"])
    velocity, projection = model(x_t, batch["t"], batch["labels"], return_projection=True)
    align_value = alignment_by_hand(align, projection, patches_by_hand(batch["latents"], 2), 0.4)
    velocity_value = float(((velocity.detach() - v) ** 2).sum() / v.numel())
    check(loss.velocity, velocity_value)
    check(loss.align, align_value)
    check(loss.total, velocity_value + (0.5 if align == "cosine" else 1.0) * align_value)


def test_features_is_repas_formula(batch):
    model = random_model(projector_layers=3, projector_dim=64, projection_dim=20).eval()
    features = torch.randn(3, 16, 20, dtype=torch.float64)
    loss = SRA2Loss(target="features")(model, **batch, features=features)
    x_t, _ = path_by_hand("linear", batch["latents"], batch["noise"], batch["t"])
    projection = model(x_t, batch["t"], batch["labels"], return_projection=True)[1]
    check(loss.align, alignment_by_hand("cosine", projection, features, 0.05))
    check(loss.total, loss.velocity + 0.5 * loss.align)


def test_teacher_is_sras_formula(batch):
    model = random_model(projector_layers=2, projection_dim=48).train()
    teacher = copy.deepcopy(model).eval()
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(1.1)
    gap = torch.tensor([0.2, 0.1, 0.0], dtype=torch.float64)
    drop = torch.tensor([True, False, False])
    loss = SRA2Loss(target="teacher", teacher_depth=3)(
        model, **batch, teacher=teacher, teacher_gap=gap, label_drop=drop
    )
    labels = torch.tensor([10, 9, 4])  # the student's dropped label is the teacher's too
    earlier = torch.tensor([0.0, 0.4, 0.93], dtype=torch.float64)
    x_earlier, _ = path_by_hand("linear", batch["latents"], batch["noise"], earlier)
    target = teacher(x_earlier, earlier, labels, return_hidden=3)
    x_t, _ = path_by_hand("linear", batch["latents"], batch["noise"], batch["t"])
    projection = model.eval()(x_t, batch["t"], labels, return_projection=True)[1]
    check(loss.align, alignment_by_hand("cosine", projection, target, 0.05))


def test_teacher_block_follows_sra():
    seen = []

    class Teacher(torch.nn.Module):
        def forward(self, x, t, y, *, force_drop_ids, return_hidden):
            seen.append(return_hidden)
            return torch.zeros(x.shape[0], 16, 48)

    z, y = torch.randn(2, 4, 8, 8), torch.tensor([0, 1])
    for depth, align_depth in ((12, 4), (28, 8), (4, 3)):
        model = SiT(**{**TINY, "depth": depth}, align_depth=align_depth, projector_layers=2, projection_dim=48)
        SRA2Loss(target="teacher")(model, z, y, teacher=Teacher())
    assert seen == [8, 20, 4]


def test_velocity_alone_needs_no_projector(batch):
    model = random_model(align_depth=None).eval()
    loss = SRA2Loss(align=None)(model, **batch)
    check(loss.total, loss.velocity)
    assert float(loss.align) == 0
    # Nothing is compared, so a teacher that is passed all the same is not asked.
    untouched = {"teacher": torch.nn.Identity(), "teacher_gap": torch.zeros(3)}
    assert SRA2Loss(align=None, target="teacher")(model, **batch, **untouched).total == loss.total


def test_sigma_channels_are_left_out(batch):
    model = random_model(learn_sigma=True).eval()
    loss = SRA2Loss()(model, **batch)
    x_t, v = path_by_hand("linear", batch["latents"], batch["noise"], batch["t"])
    check(loss.velocity, float(((model(x_t, batch["t"], batch["labels"]).detach() - v) ** 2).mean()))


@pytest.mark.parametrize("implementation", ["eager", "fused"])
def test_bf16_latents_are_taken_to_float32(batch, implementation):
    model = SiT(**TINY, align_depth=2, implementation=implementation).eval()
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.items()}
    single = {name: value.float() if value.is_floating_point() else value for name, value in half.items()}
    assert SRA2Loss()(model, **{**half, "t": single["t"]}).total == SRA2Loss()(model, **single).total


def test_total_alone_carries_gradients(batch):
    loss = SRA2Loss()(random_model(), **batch)
    assert loss.total.requires_grad and not loss.velocity.requires_grad and not loss.align.requires_grad


def test_labels_drop_only_in_training(batch):
    model = random_model(class_dropout_prob=0.9)
    loss_fn = SRA2Loss()
    kept = loss_fn(model.eval(), **batch).total
    forced = loss_fn(model.train(), **batch, label_drop=torch.zeros(3, dtype=torch.bool)).total
    dropped = loss_fn(model.train(), **batch, label_drop=torch.ones(3, dtype=torch.bool)).total
    assert kept == forced != dropped
    by_chance = [float(loss_fn(model.train(), **batch).total.detach()) for _ in range(8)]
    assert float(dropped.detach()) in by_chance and len(set(by_chance)) > 1


@pytest.mark.parametrize("target", ["vae", "teacher"])
def test_a_call_draws_what_draws_draws(target):
    """One place makes the random numbers: the same seed gives the same loss, whether they are drawn ahead or not."""
    model = random_model(projection_dim=48 if target == "teacher" else None, class_dropout_prob=0.5).float().train()
    latents, labels = torch.randn(8, 4, 8, 8), torch.arange(8)
    extra = {"teacher": copy.deepcopy(model).eval()} if target == "teacher" else {}
    loss_fn = SRA2Loss(target=target, time="lognormal")
    torch.manual_seed(3)
    want = loss_fn(model, latents, labels, **extra).total
    torch.manual_seed(3)
    draws = loss_fn.draws(latents, model.class_dropout_prob)
    assert loss_fn(model, latents, labels, **draws._asdict(), **extra).total == want
    torch.manual_seed(3)  # the order of the draws is part of what a seed means
    t = loss_fn.time_from_uniform(torch.rand(8))
    noise, drop = torch.randn_like(latents), torch.rand(8) < 0.5
    assert torch.equal(draws.t, t) and torch.equal(draws.noise, noise) and torch.equal(draws.label_drop, drop)
    assert (draws.teacher_gap is None) == (target == "vae")
    assert target == "vae" or torch.equal(draws.teacher_gap, 0.2 * torch.rand(8))


def test_draws_are_functions_of_the_uniforms_they_are_given(batch):
    latents, u = batch["latents"], torch.tensor([0.2, 0.5, 0.9])
    uniforms = {"time_uniform": u, "label_uniform": u.flip(0), "teacher_uniform": u.square()}
    state = torch.get_rng_state()
    loss_fn = SRA2Loss(target="teacher", teacher_gap=0.3, time="lognormal")
    draws = loss_fn.draws(latents, 0.5, noise=batch["noise"], **uniforms)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draws.t, loss_fn.time_from_uniform(u)) and draws.noise is batch["noise"]
    assert draws.label_drop.tolist() == [False, False, True]  # 0.5 is not below 0.5
    assert torch.equal(draws.teacher_gap, 0.3 * u.square())
    without = SRA2Loss(align=None, target="teacher").draws(latents, 0.0, **uniforms)
    assert without.label_drop is None and without.teacher_gap is None


def test_the_cosine_path_is_sits_gvp(batch):
    model = random_model().eval()
    assert SRA2Loss(path="gvp")(model, **batch).total == SRA2Loss(path="cosine")(model, **batch).total


@pytest.mark.parametrize(("kind", "factors"), [("constant", [1, 1, 1]), ("linear", [1, 0.5, 0]), ("stop", [1, 0, 0])])
def test_schedules(batch, kind, factors):
    model = random_model().eval()
    loss_fn = SRA2Loss(align="mse", align_weight=3.0, schedule=kind, schedule_steps=10)
    for step, factor in zip((0, 5, 20), factors, strict=True):
        if kind == "stop":
            step *= 2
        loss = loss_fn(model, **batch, step=step)
        check(loss.total, float(loss.velocity) + 3.0 * factor * float(loss.align))


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_times_have_their_distribution(path):
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert torch.equal(SRA2Loss(path=path).time_from_uniform(u), u)
    t = SRA2Loss(path=path, time="lognormal").time_from_uniform(u)
    coefficients = interpolant(path, t)
    log_ratio = (coefficients.s / coefficients.a).log()  # the noise-to-data ratio is exp(N(0, 1))
    assert abs(float(log_ratio.mean())) < 1e-6 and abs(float(log_ratio.std()) - 1) < 1e-3
    ends = SRA2Loss(path=path, time="lognormal").time_from_uniform(torch.tensor([0.0, 1.0]))
    assert bool(((ends >= 0) & (ends <= 1)).all())


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_velocity_is_the_derivative_of_the_path(path):
    t = torch.rand(5, dtype=torch.float64, requires_grad=True)
    c = interpolant(path, t)
    for value, derivative in ((c.a, c.da), (c.s, c.ds)):
        (got,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        assert_close(derivative.detach(), got, torch.float64, 4)


@pytest.mark.parametrize(("c", "p", "h", "w"), [(4, 2, 8, 8), (1, 2, 4, 6), (3, 4, 8, 4), (5, 1, 3, 2)])
def test_patchify_order_and_inverse(c, p, h, w):
    image = torch.randn(2, c, h, w)
    tokens = patchify(image, p)
    assert torch.equal(tokens, patches_by_hand(image, p))
    assert torch.equal(unpatchify(tokens, p, h, w), image)


@pytest.mark.parametrize(("target", "align_tokens"), [("vae", 1.0), ("vae", 0.5), ("teacher", 1.0)])
def test_no_host_synchronisation(target, align_tokens):
    """Meta tensors have no values: asking for one on the way raises."""
    with torch.device("meta"):
        projection_dim = 48 if target == "teacher" else None
        model = SiT(**TINY, align_depth=2, projection_dim=projection_dim, implementation="eager")
        z, y = torch.randn(2, 4, 8, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="meta"):
        z.sum().item()
    loss_fn = SRA2Loss(time="lognormal", schedule="linear", schedule_steps=5, target=target, align_tokens=align_tokens)
    loss = loss_fn(model, z, y, step=1, teacher=copy.deepcopy(model) if target == "teacher" else None)
    loss.total.backward()
    assert model.blocks[0].attn.qkv.weight.grad.is_meta


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"path": "vp"}, r"SRA2Loss: path must be linear or cosine, got 'vp'"),
        ({"time": "beta"}, r"time must be uniform or lognormal, got 'beta'"),
        ({"align": "l2"}, r"align must be cosine or smooth_l1 or mse or l1 or None, got 'l2'"),
        ({"target": "dino"}, r"target must be vae or features or teacher, got 'dino'"),
        ({"beta": 0}, r"beta must be positive, got 0"),
        ({"beta": math.nan}, r"beta must be positive, got nan"),
        ({"align_weight": -1.0}, r"align_weight must be zero or positive, got -1.0"),
        ({"align_weight": math.nan}, r"align_weight must be zero or positive, got nan"),
        ({"teacher_depth": 0}, r"teacher_depth must be None or a block from 1, got 0"),
        ({"teacher_gap": 2.0}, r"teacher_gap must be in \[0, 1\], got 2.0"),
        ({"schedule": "cosine"}, r"schedule must be constant or linear or stop, got 'cosine'"),
        ({"schedule": "stop"}, r"schedule_steps must be a positive step for schedule='stop', got None"),
    ],
)
def test_constructor_errors(kwargs, message):
    with pytest.raises(InputError, match=message):
        SRA2Loss(**kwargs)


@pytest.mark.parametrize(
    ("loss", "change", "message"),
    [
        ({}, {"latents": torch.zeros(4, 8, 8)}, r"latents must be \(B, C, H, W\), got \(4, 8, 8\)"),
        ({}, {"labels": torch.zeros(2, dtype=torch.int64)}, r"labels must be \(3,\), got \(2,\)"),
        ({}, {"t": torch.zeros(3, 1)}, r"t must be \(3,\), got \(3, 1\)"),
        ({}, {"noise": torch.zeros(3, 4, 8, 4)}, r"noise must be \(3, 4, 8, 8\), got \(3, 4, 8, 4\)"),
        ({}, {"label_drop": torch.zeros(3, 1, dtype=torch.bool)}, r"label_drop must be \(3,\), got \(3, 1\)"),
        ({}, {"teacher_gap": torch.zeros(1)}, r"teacher_gap must be \(3,\), got \(1,\)"),
        ({}, {"features": torch.zeros(3, 16, 16)}, r"features= is only for target='features', this loss has 'vae'"),
        ({"target": "features"}, {}, r"target='features' needs features= at every call"),
        ({"target": "teacher"}, {}, r"target='teacher' needs teacher= at every call"),
        ({"target": "features"}, {"features": torch.zeros(3, 9, 16)}, r"target tokens must be .* got \(3, 9, 16\)"),
        (
            {"target": "features"},
            {"features": torch.zeros(3, 16, 20)},
            r"projection_dim must be 20, the width .* got 16",
        ),
        ({"schedule": "linear", "schedule_steps": 5}, {}, r"schedule='linear' needs step= at every call"),
        ({}, {"labels": torch.tensor([0, 1, 11])}, r"SiT: y must be labels from 0 to 10, got 11"),
        ({}, {"labels": torch.tensor([0, -1, 1])}, r"SiT: y must be labels from 0 to 10, got -1"),
    ],
)
def test_call_errors(batch, loss, change, message):
    with pytest.raises(InputError, match=message):
        SRA2Loss(**loss)(random_model().eval(), **{**batch, **change})


def test_type_errors(batch):
    with pytest.raises(InputTypeError, match=r"latents must be float32 or bfloat16, got torch.float16"):
        SRA2Loss()(random_model(), **{**batch, "latents": batch["latents"].half()})
    not_ours = r"model must be a sra2_fast.SiT, bare or wrapped, got "
    with pytest.raises(InputTypeError, match=not_ours + "torch.nn.modules.linear.Linear"):
        SRA2Loss()(torch.nn.Linear(2, 2), **batch)


def test_a_model_without_the_right_projector(batch):
    plain = random_model(align_depth=None)
    for target, given in (("vae", {}), ("teacher", {"teacher": plain})):  # the teacher's block follows the student's
        with pytest.raises(InputError, match=r"SRA2Loss: there is no projector; build the model with align_depth="):
            SRA2Loss(target=target)(plain, **batch, **given)
    with pytest.raises(InputError, match=r"projection_dim must be patch_size\^2 C = 16 for target='vae', got 20"):
        SRA2Loss()(random_model(projection_dim=20), **batch)
