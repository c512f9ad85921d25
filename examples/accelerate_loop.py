"""SiT, SRA2Loss and AdamWEMA in an accelerate loop: `accelerate launch examples/accelerate_loop.py`.

Two points are not accelerate's usual: `SRA2Loss` is called with the prepared model (the loss is computed inside its
forward), and clipping is either accelerate's, as here, or AdamWEMA's own `max_grad_norm`, which costs no extra pass.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from sra2_fast import SiT, SRA2Loss
from sra2_fast.data import make_loader, open_data
from sra2_fast.optim import AdamWEMA


def main(out: str = "runs/accelerate", steps: int = 240, mixed_precision: str = "no") -> list[float]:
    """Train a small SiT on handwritten digits, two batches a step; returns the loss of every batch."""
    accelerator = Accelerator(gradient_accumulation_steps=2, mixed_precision=mixed_precision)
    torch.manual_seed(0)
    digits = open_data("digits")
    everything = next(iter(make_loader(digits, batch_size=digits.num_samples, seed=0, num_steps=1)))
    loader = DataLoader(TensorDataset(everything.latents, everything.labels), batch_size=32, shuffle=True)
    model = SiT(
        input_size=8,
        in_channels=1,
        patch_size=2,
        hidden_size=64,
        depth=4,
        num_heads=4,
        num_classes=10,
        learn_sigma=False,
        align_depth=1,
    )
    loss_fn = SRA2Loss(align="cosine")
    optimizer = AdamWEMA(model.named_parameters(), lr=1e-3, ema_decay=0.99, max_grad_norm=None)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    history: list[float] = []
    while len(history) < 2 * steps:
        for latents, labels in loader:
            with accelerator.accumulate(model):
                losses = loss_fn(model, latents, labels)
                accelerator.backward(losses.total)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            history.append(losses.total.item())
            if len(history) % 100 == 0:
                accelerator.print(f"step {len(history) // 2}: loss {history[-1]:.3f}")
            if len(history) == 2 * steps:
                break
    accelerator.save_state(out)  # moments and averages are in optimizer.bin; load_state takes them up again
    averages = optimizer.optimizer.ema_state_dict()  # accelerate's wrapper keeps ours in .optimizer
    accelerator.save(averages, Path(out) / "ema.safetensors", safe_serialization=True)
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/accelerate")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--mixed-precision", default="no", choices=("no", "bf16"))
    main(**vars(parser.parse_args()))
