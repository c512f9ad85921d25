"""Small SiT models with nothing left at zero, and a batch for them; shared by the tests of models."""

from __future__ import annotations

from typing import Any

import torch

from sra2_fast import SiT

SMALL: dict[str, Any] = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 48,
    "depth": 3,
    "num_heads": 3,
    "num_classes": 10,
}


def randomise(model: torch.nn.Module, seed: int = 1) -> None:
    """Fill what starts at zero (adaLN, output, biases), so that no branch is switched off and no test is blind."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                spread = 0.3 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))


def small_model(**changes: Any) -> SiT:
    torch.manual_seed(0)
    model = SiT(**{**SMALL, **changes})
    randomise(model)
    return model


def batch_for(model: SiT, batch: int = 3, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (B, C, H, W), t (B,), y (B,)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, model.in_channels, model.input_size, model.input_size, generator=generator)
    t = torch.rand(batch, generator=generator)
    y = torch.randint(model.num_classes, (batch,), generator=generator)
    return x, t, y


def outputs_and_gradients(
    model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], autocast: bool = False
) -> dict[str, torch.Tensor]:
    """Velocity, projection and the gradient of every parameter, for fixed output gradients."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        velocity, projection = model(*inputs, return_projection=True)
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(v.shape, generator=generator).to(v.dtype) for v in (velocity, projection)]
    torch.autograd.backward((velocity, projection), cotangents)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"velocity": velocity.detach(), "projection": projection.detach(), **gradients}


TINY: dict[str, Any] = {**SMALL, "depth": 4, "learn_sigma": False}


def random_model(**changes: Any) -> SiT:
    """A small float64 SiT with an aligned block and no weight left at what it is initialised to."""
    model = SiT(**{**TINY, "align_depth": 2, "implementation": "eager", **changes}).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    return model


def loss_batch() -> dict[str, torch.Tensor]:
    """What SRA2Loss compares and what it would draw, in float64, for `random_model`."""
    return {
        "latents": torch.randn(3, 4, 8, 8, dtype=torch.float64),
        "labels": torch.tensor([1, 9, 4]),
        "t": torch.tensor([0.1, 0.5, 0.93], dtype=torch.float64),
        "noise": torch.randn(3, 4, 8, 8, dtype=torch.float64),
    }
