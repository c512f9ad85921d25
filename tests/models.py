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
