"""SRA 2 on a video transformer, Wan's from diffusers, with gradient checkpointing: `python examples/align_video.py`.

The grid of tokens has frames too, and the block that is aligned is computed again in the backward.
"""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel

from sra2_fast import Aligner
from sra2_fast.data import make_loader, open_data


def main(steps: int = 200, log_every: int = 50) -> list[float]:
    """Train on digits that move to the right; returns the alignment loss of every step."""
    torch.manual_seed(0)
    digits = open_data("digits")
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=1,
        out_channels=1,
        text_dim=16,
        freq_dim=32,
        ffn_dim=128,
        num_layers=4,
        rope_max_seq_len=16,
    )
    model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    aligner = Aligner(model, "blocks.0", latent_channels=1, patch_size=(1, 2, 2), grid=(3, 4, 4))
    optimizer.add_param_group(aligner.parameter_group())

    history = []
    for step, batch in enumerate(make_loader(digits, batch_size=16, seed=0, num_steps=steps)):
        clips = torch.stack([batch.latents.roll(frame, dims=3) for frame in range(3)], dim=2)  # (B, 1, F, H, W)
        noise, t = torch.randn_like(clips), batch.time_uniform
        noisy = torch.lerp(clips, noise, t.view(-1, 1, 1, 1, 1))
        no_text = clips.new_zeros(len(clips), 4, 16)
        prediction = model(noisy, t * 1000, no_text, return_dict=False)[0]
        losses = aligner(clips, prediction, noise - clips)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(losses.align.item())
        if (step + 1) % log_every == 0:
            print(f"step {step + 1}: velocity {losses.velocity.item():.3f}, alignment {losses.align.item():.3f}")
    return history


if __name__ == "__main__":
    main()
