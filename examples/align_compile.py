"""SRA 2 on a compiled transformer: `python examples/align_compile.py`.

Attach first, then compile: torch.compile looks at hooks once. The aligner itself needs no compiling.
"""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel

from sra2_fast import Aligner
from sra2_fast.data import make_loader, open_data


def main(steps: int = 300, log_every: int = 50, backend: str = "inductor") -> list[float]:
    """Train on handwritten digits; returns the alignment loss of every step."""
    torch.manual_seed(0)
    digits = open_data("digits")
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=1,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    aligner = Aligner(model, "transformer_blocks.0", latent_channels=1, patch_size=2, grid=(4, 4))
    optimizer = torch.optim.AdamW([*model.parameters(), *aligner.parameters()], lr=1e-3)
    compiled = torch.compile(model, backend=backend)

    history = []
    for step, batch in enumerate(make_loader(digits, batch_size=32, seed=0, num_steps=steps)):
        latents, noise, t = batch.latents, batch.noise, batch.time_uniform
        noisy = torch.lerp(latents, noise, t.view(-1, 1, 1, 1))
        prediction = compiled(noisy, timestep=(t * 1000).long(), class_labels=batch.labels, return_dict=False)[0]
        losses = aligner(latents, prediction, noise - latents)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(losses.align.item())
        if (step + 1) % log_every == 0:
            print(f"step {step + 1}: velocity {losses.velocity.item():.3f}, alignment {losses.align.item():.3f}")
    return history


if __name__ == "__main__":
    main()
