"""SRA 2 on diffusers' SD3 transformer, a rectified flow with text: `python examples/align_sd3.py`.

Its blocks return (text tokens, image tokens), of which the aligner finds the image's. The target is z-scored with the
data's own statistics, as for autoencoders whose channels are not of size one, and the weight fades out.
"""

from __future__ import annotations

import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from sra2_fast import Aligner
from sra2_fast.data import make_loader, open_data


def main(steps: int = 300, log_every: int = 50) -> list[float]:
    """Train on handwritten digits, a learned prompt for each class; returns the alignment loss of every step."""
    torch.manual_seed(0)
    digits = open_data("digits")
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=1,
        out_channels=1,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=64,
        pooled_projection_dim=24,
        pos_embed_max_size=4,
    )
    prompts = nn.Embedding(10, 3 * 24)  # three text tokens a class, in the text encoder's place
    optimizer = torch.optim.AdamW([*model.parameters(), *prompts.parameters()], lr=1e-3)
    sample = next(iter(make_loader(digits, batch_size=256, seed=1, num_steps=1))).latents

    aligner = Aligner(
        model,
        "transformer_blocks.0",
        latent_channels=1,
        patch_size=2,
        grid=(4, 4),
        latent_mean=sample.mean((0, 2, 3)),
        latent_std=sample.std((0, 2, 3)),
        decay=(steps // 5, 3 * steps // 10 + 1),  # full weight for a fifth of the run, none after three tenths
    )
    optimizer.add_param_group(aligner.parameter_group(weight_decay=0.0))

    history = []
    for step, batch in enumerate(make_loader(digits, batch_size=32, seed=0, num_steps=steps)):
        latents, noise, t = batch.latents, batch.noise, batch.time_uniform
        text = prompts(batch.labels).view(-1, 3, 24)
        noisy = torch.lerp(latents, noise, t.view(-1, 1, 1, 1))
        prediction = model(noisy, text, text.mean(1), t * 1000, return_dict=False)[0]
        losses = aligner(latents, prediction, noise - latents, step=step)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(losses.align.item())
        if (step + 1) % log_every == 0:
            weight = aligner.weight_at(step)
            print(f"step {step + 1}: velocity {losses.velocity.item():.3f}, alignment {history[-1]:.3f} x {weight:.2f}")
    return history


if __name__ == "__main__":
    main()
