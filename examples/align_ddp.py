"""SRA 2 under DDP: `torchrun --nproc-per-node 2 examples/align_ddp.py`.

The model and the aligner are wrapped, each: the projector's gradient is averaged too, and the alignment's gradient
reaches the model before DDP averages that. With gradient accumulation enter `no_sync()` of both.
"""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from diffusers import DiTTransformer2DModel
from torch.nn.parallel import DistributedDataParallel

from sra2_fast import Aligner
from sra2_fast.data import make_loader, open_data


def main(steps: int = 200, log_every: int = 50) -> list[float]:
    """Train on handwritten digits, a share of each batch a process; returns this process's alignment losses."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights everywhere
    digits = open_data("digits")
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=1,
        num_layers=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    aligner = Aligner(model, "transformer_blocks.0", latent_channels=1, patch_size=2, grid=(4, 4))
    wrapped, wrapped_aligner = DistributedDataParallel(model), DistributedDataParallel(aligner)
    optimizer = torch.optim.AdamW([*model.parameters(), *aligner.parameters()], lr=1e-3)

    history = []
    for step, whole in enumerate(make_loader(digits, batch_size=32, seed=0, num_steps=steps)):
        batch = whole.split(32 // world)[rank]
        latents, noise, t = batch.latents, batch.noise, batch.time_uniform
        noisy = torch.lerp(latents, noise, t.view(-1, 1, 1, 1))
        prediction = wrapped(noisy, timestep=(t * 1000).long(), class_labels=batch.labels, return_dict=False)[0]
        losses = wrapped_aligner(latents, prediction, noise - latents)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(losses.align.item())
        if (step + 1) % log_every == 0 and rank == 0:
            print(f"step {step + 1}: velocity {losses.velocity.item():.3f}, alignment {losses.align.item():.3f}")
    return history


if __name__ == "__main__":
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    with contextlib.ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        main()
