"""SRA 2 for a LoRA adapter on a frozen transformer, through peft: `python examples/align_lora.py`.

The alignment reaches the adapters up to the aligned layer, and nothing of the base. Attach after peft has put its
layers in; save the adapter with peft, and the aligner's `state_dict()` only to train on.
"""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel
from peft import LoraConfig, get_peft_model

from sra2_fast import Aligner
from sra2_fast.data import make_loader, open_data


def main(steps: int = 300, log_every: int = 50) -> list[float]:
    """Train an adapter on handwritten digits; returns the alignment loss of every step."""
    torch.manual_seed(0)
    digits = open_data("digits")
    base = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=1,
        num_layers=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)

    aligner = Aligner(model, "transformer_blocks.1", latent_channels=1, patch_size=2, grid=(4, 4))
    optimizer.add_param_group(aligner.parameter_group(lr=1e-3))

    history = []
    for step, batch in enumerate(make_loader(digits, batch_size=32, seed=0, num_steps=steps)):
        latents, noise, t = batch.latents, batch.noise, batch.time_uniform
        noisy = torch.lerp(latents, noise, t.view(-1, 1, 1, 1))
        prediction = model(noisy, timestep=(t * 1000).long(), class_labels=batch.labels, return_dict=False)[0]
        losses = aligner(latents, prediction, noise - latents)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(losses.align.item())
        if (step + 1) % log_every == 0:
            print(f"step {step + 1}: velocity {losses.velocity.item():.3f}, alignment {losses.align.item():.3f}")
    aligner.remove()
    return history


if __name__ == "__main__":
    main()
