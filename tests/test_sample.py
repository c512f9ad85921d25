"""Samplers against flows with a known solution.

Data z ~ N(MEAN, STD^2) in every element: x_t is Gaussian, the velocity E[a' z + s' e | x_t] is affine in x_t, and the
ODE carries noise e to MEAN + STD e exactly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sra2_fast.errors import InputError
from sra2_fast.sampling.samplers import sample_ode, sample_sde, score_from_velocity

MEAN, STD = 0.7, 0.5


def path_at(t: float, path: str) -> tuple[float, float, float, float]:
    """a, s, a', s'."""
    if path == "linear":
        return 1 - t, t, -1.0, 1.0
    angle = math.pi * t / 2
    return math.cos(angle), math.sin(angle), -math.pi / 2 * math.sin(angle), math.pi / 2 * math.cos(angle)


def gaussian_velocity(x: Tensor, t: float, path: str) -> Tensor:
    a, s, da, ds = path_at(t, path)
    centred = (x - a * MEAN) / (a * a * STD * STD + s * s)
    return da * (MEAN + a * STD * STD * centred) + ds * s * centred


def gaussian_model(path: str = "linear") -> Callable[..., Tensor]:
    return lambda x, t, y: gaussian_velocity(x, float(t[0]), path)


class Guided:
    """A model with a null label: velocity of a constant field that depends on the label alone."""

    num_classes = 10
    class_dropout_prob = 0.1

    def __init__(self) -> None:
        self.seen: list[tuple[float, int]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.seen.append((float(t[0]), len(x)))
        return y.to(x.dtype)[:, None, None, None].expand_as(x)


def draw(batch: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 2, 4, 4, dtype=dtype), torch.zeros(batch, dtype=torch.long)


def ode_error(steps: int, method: str, path: str) -> float:
    noise, labels = draw()
    got = sample_ode(gaussian_model(path), noise, labels, steps=steps, method=method)
    return float((got - (MEAN + STD * noise)).norm() / noise.norm())


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_falls_with_the_order_of_the_method(method: str, order: int, path: str) -> None:
    errors = [ode_error(steps, method, path) for steps in (64, 128, 256)]
    measured = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(abs(value - order) < 0.15 for value in measured), measured


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_dopri5_finds_the_exact_flow(path: str) -> None:
    noise, labels = draw()
    got = sample_ode(gaussian_model(path), noise, labels, method="dopri5", rtol=1e-9, atol=1e-9)
    assert torch.allclose(got, MEAN + STD * noise, rtol=0, atol=1e-7)


def test_dopri5_ends_a_step_where_guidance_sets_in_and_where_it_ends() -> None:
    """The field jumps there. A step across cost accuracy, and what it cost depended on the batch."""
    labels, noise = torch.tensor([3, 5]), torch.zeros(2, 2, 4, 4, dtype=torch.float64)
    model = Guided()
    got = sample_ode(model, noise, labels, method="dopri5", cfg_scale=2.5, guidance_interval=(0.3, 0.8))
    expected = -(0.5 * (10 + 2.5 * (labels - 10.0)) + 0.5 * labels)
    assert torch.allclose(got, expected[:, None, None, None].double().expand_as(got), rtol=0, atol=1e-12)
    assert all(count == (4 if 0.3 <= t <= 0.8 else 2) for t, count in model.seen)
    assert len(model.seen) < 60


def test_one_euler_step_is_the_formula() -> None:
    noise, labels = draw()
    got = sample_ode(gaussian_model(), noise, labels, steps=1)
    assert torch.equal(got, noise - gaussian_velocity(noise, 1.0, "linear"))


@pytest.mark.parametrize(
    ("method", "calls"), [("euler", [1.0, 0.75, 0.5, 0.25]), ("heun", [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25])]
)
def test_the_last_step_of_heun_is_eulers(method: str, calls: list[float]) -> None:
    model = Guided()
    sample_ode(model, *draw(), steps=4, method=method)
    assert [t for t, _ in model.seen] == calls


def test_the_state_is_float64_and_the_model_sees_the_noise_type() -> None:
    """3000 steps of 1 / 3000 in float32 would lose digits; the state must not."""
    types = set()

    def model(x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, None]:
        types.update((x.dtype, t.dtype))
        return torch.full_like(x, 1.0 / 3.0), None

    noise, labels = draw(dtype=torch.float32)
    got = sample_ode(model, noise, labels, steps=3000)
    third = torch.tensor(1.0 / 3.0, dtype=torch.float32).double()
    expected = noise.double() - third
    assert types == {torch.float32} and got.dtype == torch.float32
    assert ((got.double() - expected).abs() <= 2.0**-24 * expected.abs() + 1e-12).all()


def test_guidance_is_the_null_plus_the_scaled_difference() -> None:
    labels = torch.tensor([3, 5])
    noise = torch.zeros(2, 2, 4, 4, dtype=torch.float64)
    model = Guided()
    got = sample_ode(model, noise, labels, steps=2, cfg_scale=2.5)
    expected = -(10 + 2.5 * (labels - 10.0))
    assert torch.allclose(got, expected[:, None, None, None].double().expand_as(got), rtol=1e-14, atol=0)
    assert {count for _, count in model.seen} == {4}


def test_guided_channels_leave_the_others_conditional() -> None:
    labels = torch.tensor([3, 5])
    noise = torch.zeros(2, 2, 4, 4, dtype=torch.float64)
    got = sample_ode(Guided(), noise, labels, steps=1, cfg_scale=2.0, guided_channels=1)
    assert torch.equal(got[:, 0, 0, 0], -(10 + 2.0 * (labels - 10.0)).double())
    assert torch.equal(got[:, 1, 0, 0], -labels.double())


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_guidance_is_paid_for_only_inside_its_interval(method: str) -> None:
    model = Guided()
    sample_ode(model, *draw(3), steps=4, method=method, cfg_scale=2.0, guidance_interval=(0.5, 0.75))
    counts = {"euler": [3, 6, 6, 3], "heun": [3, 3, 6, 6, 6, 6, 3]}
    assert [count for _, count in model.seen] == counts[method]


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("t", [0.04, 0.5, 1.0])
def test_the_score_is_the_gradient_of_the_log_density(path: str, t: float) -> None:
    a, s, _, _ = path_at(t, path)
    x = torch.randn(8, dtype=torch.float64, requires_grad=True)
    log_density = -((x - a * MEAN) ** 2).sum() / (2 * (a * a * STD * STD + s * s))
    (expected,) = torch.autograd.grad(log_density, x)
    got = score_from_velocity(gaussian_velocity(x.detach(), t, path), x.detach(), t, path)
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_sde_has_the_moments_of_its_own_recursion(path: str) -> None:
    """Every Euler-Maruyama step is affine in x here, so mean and variance of the result are known exactly."""
    steps, last = 40, 0.04
    noise, labels = torch.randn(256, 2, 16, 16, dtype=torch.float64), torch.zeros(256, dtype=torch.long)
    generator = torch.Generator().manual_seed(1)
    got = sample_sde(gaussian_model(path), noise, labels, steps=steps, path=path, last_step=last, generator=generator)

    mean, variance = torch.zeros((), dtype=torch.float64), 1.0
    times = [*torch.linspace(1, last, steps, dtype=torch.float64).tolist(), 0.0]
    for t, t_next in itertools.pairwise(times):

        def drift(x: Tensor, t: float = t) -> Tensor:
            v = gaussian_velocity(x, t, path)
            return v - t * score_from_velocity(v, x, t, path)

        slope = float(drift(torch.ones((), dtype=torch.float64)) - drift(torch.zeros((), dtype=torch.float64)))
        mean = mean + (t_next - t) * drift(mean)
        variance = variance * (1 + (t_next - t) * slope) ** 2 + (2 * t * (t - t_next) if t_next > 0 else 0.0)
    count = got.numel()
    assert abs(float(got.mean() - mean)) < 5 * math.sqrt(variance / count)
    assert abs(float(got.var()) / variance - 1) < 5 * math.sqrt(2 / count)
    # and the recursion is near the data it was made for, or the drift has a wrong sign
    assert abs(float(mean) - MEAN) < 0.05 and abs(math.sqrt(variance) - STD) < 0.05


def test_the_sde_is_a_function_of_its_generator() -> None:
    noise, labels = draw()
    runs = [
        sample_sde(gaussian_model(), noise, labels, steps=5, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_bad_arguments_are_named() -> None:
    noise, labels = draw()
    model = gaussian_model()
    with pytest.raises(InputError, match=r"sample_ode: method must be one of euler, heun, dopri5, got 'rk4'"):
        sample_ode(model, noise, labels, method="rk4")
    with pytest.raises(InputError, match=r"sample_ode: steps must be at least 1, got 0"):
        sample_ode(model, noise, labels, steps=0)
    with pytest.raises(
        InputError, match=r"sample_ode: noise must be float \(B, C, H, W\), got torch.float64 \(4, 2, 4\)"
    ):
        sample_ode(model, noise[..., 0], labels)
    with pytest.raises(InputError, match=r"sample_ode: labels must be int \(B,\) = \(4,\), got torch.int64 \(3,\)"):
        sample_ode(model, noise, labels[:3])
    with pytest.raises(InputError, match=r"sample_ode: guided_channels must be None or 1 to 2, got 3"):
        sample_ode(model, noise, labels, guided_channels=3)
    with pytest.raises(InputError, match=r"cfg_scale must be 1\.0 for a model without a null label"):
        sample_ode(model, noise, labels, cfg_scale=2.0)
    with pytest.raises(InputError, match=r"sample_sde: path must be one of linear, cosine, got 'vp'"):
        sample_sde(model, noise, labels, path="vp")
    with pytest.raises(InputError, match=r"sample_sde: steps must be at least 2, got 1"):
        sample_sde(model, noise, labels, steps=1)
    with pytest.raises(InputError, match=r"sample_sde: last_step must be between 0 and 1, got 0"):
        sample_sde(model, noise, labels, last_step=0.0)


def test_dopri5_without_torchdiffeq_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchdiffeq", None)
    with pytest.raises(InputError, match=r"'dopri5' needs torchdiffeq: pip install torchdiffeq"):
        sample_ode(gaussian_model(), *draw(), method="dopri5")
