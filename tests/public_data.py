"""Writes a handful of latents in the layouts of public repositories, byte for byte as their own scripts save them.

`draw` gives what is stored; each writer says which script it follows. Used by the tests of layouts and of convert-data.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

COUNT = 12
LABELS = [3, 0, 1, 1, 2, 0, 3, 2, 1, 0, 2, 3]


def draw(channels: int, size: int = 4, spread: float = 1.0, seed: int = 0) -> np.ndarray:
    """(COUNT, channels, size, size) float32."""
    values = np.random.default_rng(seed).standard_normal((COUNT, channels, size, size))
    return (values * spread).astype(np.float32)


def write_fast_dit(folder: Path, latents: np.ndarray) -> Path:
    """chuanyangjin/fast-DiT, extract_features.py: (1, C, H, W) and (1,), named by their step."""
    for part in ("features", "labels"):
        (folder / f"imagenet256_{part}").mkdir(parents=True)
    for index, (latent, label) in enumerate(zip(latents, LABELS, strict=True)):
        np.save(f"{folder}/imagenet256_features/{index}.npy", latent[None])
        np.save(f"{folder}/imagenet256_labels/{index}.npy", torch.tensor([label]).numpy())
    return folder


def write_lightningdit(
    folder: Path, latents: np.ndarray, flipped: np.ndarray | None, dtype: torch.dtype = torch.float32
) -> Path:
    """hustvl/LightningDiT, extract_features.py: shards of a rank with their metadata, and the statistics of latents."""
    folder.mkdir(parents=True)
    for number, part in enumerate((slice(0, 7), slice(7, COUNT))):
        tensors = {"latents": torch.from_numpy(latents[part]).to(dtype), "labels": torch.tensor(LABELS[part])}
        if flipped is not None:
            tensors["latents_flip"] = torch.from_numpy(flipped[part]).to(dtype)
        metadata = {"total_size": str(len(tensors["labels"])), "dtype": str(dtype), "device": "cpu"}
        save_file(tensors, folder / f"latents_rank00_shard{number:03d}.safetensors", metadata=metadata)
    stored = torch.from_numpy(latents)
    stats = {"mean": stored.mean(dim=[0, 2, 3], keepdim=True), "std": stored.std(dim=[0, 2, 3], keepdim=True)}
    torch.save(stats, folder / "latents_stats.pt")
    return folder


def write_repa_e(folder: Path, moments: np.ndarray, name: str = "e2e-vavae") -> Path:
    """End2End-Diffusion/REPA-E, cache_latents.py: an HDF5 file with the labels inside, its list of names, images.h5."""
    import h5py

    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{index // 8:05d}/img-mean-std-{index:08d}.npy" for index in range(COUNT)]
    with h5py.File(folder / f"{name}.h5", "w") as file:
        for one, stored in zip(names, moments, strict=True):
            file.create_dataset(one, data=stored)
        text = json.dumps({"labels": list(zip(names, LABELS, strict=True))}).encode("utf-8")
        file.create_dataset("dataset.json", data=np.array(text, dtype="S"))
    (folder / f"{name}_h5.json").write_text(json.dumps([*names, "dataset.json"], indent=2))
    with h5py.File(folder / "images.h5", "w") as file:
        file.create_dataset("00000/img00000000.png", data=np.array(b"\x89PNG", dtype="S"))
    return folder


def write_latents_stats(path: Path, bias: np.ndarray, scale: np.ndarray) -> None:
    """REPA-E, save_vae_weights.py: NAME-latents-stats.pt."""
    parts = {"latents_scale": scale, "latents_bias": bias}
    torch.save({key: torch.from_numpy(value).view(1, -1, 1, 1) for key, value in parts.items()}, path)


def write_dataset_json(folder: Path, stored: np.ndarray, prefix: str) -> Path:
    """dataset_tools.py encode of REPA (prefix img-mean-std-) and of SwayStar123/SpeedrunDiT (img-latents-)."""
    names = [f"{index // 8:05d}/{prefix}{index:08d}.npy" for index in range(COUNT)]
    for name, one in zip(names, stored, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, one)
    (folder / "dataset.json").write_text(
        json.dumps({"labels": [list(pair) for pair in zip(names, LABELS, strict=True)]})
    )
    return folder


def write_flat(folder: Path, latents: np.ndarray) -> Path:
    """One .npy a sample, numbered, and nothing else."""
    folder.mkdir(parents=True)
    for index, latent in enumerate(latents):
        np.save(folder / f"{index}.npy", latent)
    return folder
