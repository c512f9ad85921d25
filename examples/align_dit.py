"""SRA 2 on diffusers' DiT, which predicts noise: `python examples/align_dit.py`.

The aligner takes the loop's own prediction and target, whatever they are: noise here, a velocity in align_sd3.py.
"""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel

from sra2_fast import Aligner
from sra2_fast.data import make_loader, open_data


def main(steps: int = 300, log_every: int = 50) -> list[float]:
    """Train on handwritten digits; returns the alignment loss of every step (-1 is a perfect match)."""
    torch.manual_seed(0)
    digits = open_data("digits")  # latents (1, 8, 8)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=1,
        num_layers=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,  # times and labels alike
    )
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    aligner = Aligner(model, "transformer_blocks.0", latent_channels=1, patch_size=2, grid=(4, 4))  # line 1
    optimizer.add_param_group(aligner.parameter_group())  # line 2

    history = []
    for step, batch in enumerate(make_loader(digits, batch_size=32, seed=0, num_steps=steps)):
        latents, noise = batch.latents, batch.noise
        t = (batch.time_uniform * 1000).long()
        noisy = scheduler.add_noise(latents, noise, t)
        prediction = model(noisy, timestep=t, class_labels=batch.labels, return_dict=False)[0]
        losses = aligner(latents, prediction, noise)  # line 3; was F.mse_loss(prediction, noise)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(losses.align.item())
        if (step + 1) % log_every == 0:
            print(f"step {step + 1}: noise {losses.velocity.item():.3f}, alignment {losses.align.item():.3f}")
    aligner.remove()  # the model is a plain DiT again
    return history


if __name__ == "__main__":
    main()
