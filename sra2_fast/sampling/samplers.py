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
    velocity = _guided_velocity("sample_ode", model, noise, labels, cfg_scale, guidance_interval, guided_channels)
    if method not in METHODS:
        raise must_be("sample_ode", "method", "one of " + ", ".join(METHODS), repr(method))
    if steps < 1:
        raise must_be("sample_ode", "steps", "at least 1", steps)
    x = noise.to(torch.float64)
    if method == "dopri5":
        return _dopri5(velocity, x, rtol, atol).to(noise.dtype)
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
) -> Tensor:
    """Integrate dx = (v - w(t)/2 score) dt + sqrt(w(t)) dW backwards in time, w(t) = 2t, by Euler-Maruyama.

    steps: model calls: `steps` - 1 equal noisy steps from t = 1 to `last_step`, and one noise-free step from there to 0
    path: "linear" or "cosine" - the path the model was trained on; it turns velocity into score
    generator: of the noise's device; draws the noise of every step
    The other arguments, the result and the errors are those of `sample_ode`.
    """
    velocity = _guided_velocity("sample_sde", model, noise, labels, cfg_scale, guidance_interval, guided_channels)
    if path not in PATHS:
        raise must_be("sample_sde", "path", "one of " + ", ".join(PATHS), repr(path))
    if steps < 2:
        raise must_be("sample_sde", "steps", "at least 2", steps)
    if not 0.0 < last_step < 1.0:
        raise must_be("sample_sde", "last_step", "between 0 and 1", last_step)
    x = noise.to(torch.float64)
    times = [*torch.linspace(1.0, last_step, steps, dtype=torch.float64).tolist(), 0.0]
    for t, t_next in itertools.pairwise(times):
        v = velocity(x, t, t)
        diffusion = 2.0 * t
        x = x + (t_next - t) * (v - 0.5 * diffusion * score_from_velocity(v, x, t, path))
        if t_next > 0.0:
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


def _guided_velocity(
    op: str,
    model: Callable[..., Any],
    noise: Tensor,
    labels: Tensor,
    cfg_scale: float,
    guidance_interval: tuple[float, float],
    guided_channels: int | None,
) -> Velocity:
    """velocity(x, t, t_decides): the model's, guided while `t_decides` lies in the interval.

    Heun's second call passes the time of its first, so that both slopes of a step are of the same field.
    """
    if noise.dim() != 4 or not noise.is_floating_point():
        raise must_be(op, "noise", "float (B, C, H, W)", f"{noise.dtype} {tuple(noise.shape)}")
    batch = noise.shape[0]
    if labels.shape != (batch,) or labels.is_floating_point():
        raise must_be(op, "labels", f"int (B,) = ({batch},)", f"{labels.dtype} {tuple(labels.shape)}")
    if guided_channels is not None and not 1 <= guided_channels <= noise.shape[1]:
        raise must_be(op, "guided_channels", f"None or 1 to {noise.shape[1]}", guided_channels)
    low, high = guidance_interval
    null_labels = _null_labels(op, model, labels) if cfg_scale != 1.0 else labels
    doubled_labels = torch.cat([labels, null_labels])

    def call(x: Tensor, t: float, y: Tensor) -> Tensor:
        x = x.to(noise.dtype)
        out = model(x, torch.full((x.shape[0],), t, dtype=noise.dtype, device=x.device), y)
        return (out[0] if isinstance(out, tuple) else out).to(torch.float64)

    def velocity(x: Tensor, t: float, t_decides: float) -> Tensor:
        if cfg_scale == 1.0 or not low <= t_decides <= high:
            return call(x, t, labels)
        conditional, null = call(torch.cat([x, x]), t, doubled_labels).chunk(2)
        guided = null + cfg_scale * (conditional - null)
        if guided_channels is None:
            return guided
        return torch.cat([guided[:, :guided_channels], conditional[:, guided_channels:]], dim=1)

    return velocity


def _null_labels(op: str, model: Any, labels: Tensor) -> Tensor:
    model = getattr(model, "module", model)  # DistributedDataParallel's wrapper hides its model's attributes
    num_classes = getattr(model, "num_classes", None)
    if num_classes is None or getattr(model, "class_dropout_prob", 1.0) == 0:
        raise InputError(
            f"{op}: cfg_scale must be 1.0 for a model without a null label; train with label dropout above 0 to guide"
        )
    return torch.full_like(labels, num_classes)


def _dopri5(velocity: Velocity, x: Tensor, rtol: float, atol: float) -> Tensor:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise InputError("sample_ode: method 'dopri5' needs torchdiffeq: pip install torchdiffeq") from error
    times = torch.tensor([1.0, 0.0], dtype=torch.float64, device=x.device)

    def slope(t: Tensor, state: Tensor) -> Tensor:
        return velocity(state, float(t), float(t))

    return odeint(slope, x, times, rtol=rtol, atol=atol, method="dopri5")[-1]
