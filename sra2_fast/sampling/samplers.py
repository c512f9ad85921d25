"""Samplers: from noise at t = 1 to latents at t = 0 along the learned velocity.

`sample_ode` integrates dx/dt = v(x, t, y) (Euler, Heun or adaptive dopri5); `sample_sde` adds the noise of the reverse
SDE (Euler-Maruyama). The conventions are REPA's (arXiv 2410.06940): the state is float64, the model sees the type of
the given noise, Heun ends with an Euler step, the null label is `num_classes`. Decoding latents to pixels is left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, must_be
from .guidance import GuidedVelocity

Velocity = Callable[[Tensor, float, float], Tensor]
METHODS = ("euler", "heun", "dopri5")
PATHS = ("linear", "cosine")


@torch.no_grad()
def sample_ode(
    model: Callable[..., Any],
    noise: Tensor,
    labels: Tensor,
    steps: int = 50,
    method: str = "euler",
    cfg_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guided_channels: int | None = None,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Tensor:
    """Integrate dx/dt = v(x, t, y) from t = 1 (noise) to t = 0 (data).

    model: in eval mode (a training one drops labels by chance); (x, t, y) -> velocity, or a tuple with it first
    noise: (B, C, H, W) float - the starting point; its dtype is what the model gets
    labels: (B,) int - classes
    steps: the number of equal steps of Euler and Heun; dopri5 chooses its own from rtol and atol
    method: "euler" (one model call a step), "heun" (two, the last step one), "dopri5" (adaptive, torchdiffeq)
    cfg_scale: w of v = v_null + w (v_label - v_null); 1 is no guidance and no second half of the batch
    guidance_interval: (low, high) - guide only while low <= t <= high (arXiv 2404.07724)
    guided_channels: guide only the first that many channels, as the SiT repository does with 3; None is all
    returns: (B, C, H, W) of noise's dtype.
    Raises InputError for an unknown method, shapes that do not fit, or guidance without a null label.
    The state is accumulated in float64.
    """
    velocity = GuidedVelocity("sample_ode", model, noise, labels, cfg_scale, guidance_interval, guided_channels)
    if method not in METHODS:
        raise must_be("sample_ode", "method", "one of " + ", ".join(METHODS), repr(method))
    if steps < 1:
        raise must_be("sample_ode", "steps", "at least 1", steps)
    x = noise.to(torch.float64)
    if method == "dopri5":
        return _dopri5(velocity, x, rtol, atol, velocity.edges()).to(noise.dtype)
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64).tolist()
    for number, (t, t_next) in enumerate(itertools.pairwise(times), start=1):
        slope = velocity(x, t, t)
        if method == "heun" and number < steps:
            slope = 0.5 * (slope + velocity(x + (t_next - t) * slope, t_next, t))
        x = x + (t_next - t) * slope
    return x.to(noise.dtype)


@torch.no_grad()
def sample_sde(
    model: Callable[..., Any],
    noise: Tensor,
    labels: Tensor,
    steps: int = 250,
    cfg_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guided_channels: int | None = None,
    *,
    path: str = "linear",
    last_step: float = 0.04,
    generator: torch.Generator | None = None,
    step_noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Integrate dx = (v - w(t)/2 score) dt + sqrt(w(t)) dW backwards in time, w(t) = 2t, by Euler-Maruyama.

    steps: model calls: `steps` - 1 equal noisy steps from t = 1 to `last_step`, and one noise-free step from there to 0
    path: "linear" or "cosine" - the path the model was trained on; it turns velocity into score
    generator: of the noise's device; draws the noise of every step
    step_noise: instead, the number of a step (from 0) -> (B, C, H, W) standard normals, for draws that belong to images
    The other arguments, the result and the errors are those of `sample_ode`.
    """
    velocity = GuidedVelocity("sample_sde", model, noise, labels, cfg_scale, guidance_interval, guided_channels)
    if path not in PATHS:
        raise must_be("sample_sde", "path", "one of " + ", ".join(PATHS), repr(path))
    if steps < 2:
        raise must_be("sample_sde", "steps", "at least 2", steps)
    if not 0.0 < last_step < 1.0:
        raise must_be("sample_sde", "last_step", "between 0 and 1", last_step)
    x = noise.to(torch.float64)
    times = [*torch.linspace(1.0, last_step, steps, dtype=torch.float64).tolist(), 0.0]
    for number, (t, t_next) in enumerate(itertools.pairwise(times)):
        v = velocity(x, t, t)
        diffusion = 2.0 * t
        x = x + (t_next - t) * (v - 0.5 * diffusion * score_from_velocity(v, x, t, path))
        if t_next > 0.0:
            if step_noise is not None:
                draw = step_noise(number).to(x)
            else:
                draw = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
            x = x + math.sqrt(diffusion * (t - t_next)) * draw
    return x.to(noise.dtype)


def score_from_velocity(velocity: Tensor, x: Tensor, t: float, path: str = "linear") -> Tensor:
    """grad log p_t(x) = (r v - x) / (s^2 - r s' s) with r = a / a'; x_t = a z + s e, 0 < t <= 1.

    Linear (a = 1 - t, s = t): -((1 - t) v + x) / t. Cosine (theta = pi t / 2): the denominator is
    sin^2 + cos^2 = 1, so -(x + (2 / pi) cot(theta) v).
    """
    if path == "linear":
        return -((1.0 - t) * velocity + x) / t
    theta = math.pi * t / 2
    return -(x + (2 / math.pi) * (math.cos(theta) / math.sin(theta)) * velocity)


def _dopri5(velocity: Velocity, x: Tensor, rtol: float, atol: float, edges: list[float]) -> Tensor:
    """edges: times at which the field jumps, where a step has to end."""
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise InputError("sample_ode: method 'dopri5' needs torchdiffeq: pip install torchdiffeq") from error
    times = torch.tensor([1.0, 0.0], dtype=torch.float64, device=x.device)

    def slope(t: Tensor, state: Tensor) -> Tensor:
        return velocity(state, float(t), float(t))

    options = {"jump_t": torch.tensor(edges, dtype=torch.float64, device=x.device)} if edges else None
    return odeint(slope, x, times, rtol=rtol, atol=atol, method="dopri5", options=options)[-1]
