"""Checkpoint files in exactly the form of the public training scripts, from the recorded public models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from recorded.recording import Recording, load_recording

# What their argument parsers hold, of what tells one from another and what conversion reads.
OPTIONS: dict[str, dict[str, Any]] = {
    "sit": {"path_type": "Linear", "prediction": "velocity", "loss_weight": None, "num_classes": 10, "vae": "ema"},
    "repa": {"path_type": "linear", "prediction": "v", "encoder_depth": 1, "enc_type": "dinov2-vit-b"},
    "sra": {"path_type": "linear", "prediction": "v", "block_out_s": 2, "block_out_t": 3, "num_classes": 10},
    "repa_e": {"path_type": "linear", "prediction": "v", "encoder_depth": 1, "vae_ckpt": "x.pt", "num_classes": 10},
}
OPTIONS["repa"] |= {"proj_coeff": 0.5, "cfg_prob": 0.1, "num_classes": 10}
OPTIONS["repa_qk_norm"] = {**OPTIONS["repa"], "encoder_depth": 2}
OPTIONS["sit_one_channel"] = OPTIONS["sit_patch4"] = OPTIONS["sit"]
LIGHTNINGDIT = {
    "data": {"num_classes": 10},
    "model": {"model_type": "LightningDiT-B/1"},
    "transport": {"path_type": "Linear", "prediction": "velocity"},
}
NAMES = (*OPTIONS, "lightningdit")


def checkpoint_of(name: str) -> tuple[dict[str, Any], Recording]:
    """(what `torch.save` of that repository's train.py is given, the recorded model); "ema" is the recorded state."""
    recording = load_recording(name)
    ema = recording.state()
    buffers = {key: recording[f"state.{key}"] for key in ema if key.startswith("bn.")}
    ema |= buffers
    model = {key: value * 1.125 if value.is_floating_point() else value for key, value in ema.items()}
    content: dict[str, Any] = {"model": model, "ema": ema, "opt": optimizer_of(model)}
    if name == "lightningdit":
        return {**content, "config": LIGHTNINGDIT}, recording
    content["args"] = argparse.Namespace(**OPTIONS[name])
    return (content if name.startswith("sit") else {**content, "steps": 400}), recording


def optimizer_of(model: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The state of torch.optim.AdamW(model.parameters()) after some steps; pos_embed, without a gradient, has none."""
    names = [key for key in model if not key.startswith("bn.")]
    state = {
        number: {
            "step": torch.tensor(400.0),
            "exp_avg": torch.full_like(model[key], 0.25) * number,
            "exp_avg_sq": torch.full_like(model[key], 0.5) * number,
        }
        for number, key in enumerate(names)
        if key != "pos_embed"
    }
    group = {"lr": 2e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False, "fused": None}
    return {"state": state, "param_groups": [{**group, "params": list(range(len(names)))}]}


def write_public(folder: Path, name: str) -> tuple[Path, Recording]:
    content, recording = checkpoint_of(name)
    file = folder / f"{name}.pt"
    torch.save(content, file)
    return file, recording
