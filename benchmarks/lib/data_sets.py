"""The same latents in every layout that `--data` reads, for data_throughput.py; each as its project's script writes it.

32 KB a sample in most of them: moments (8, 32, 32) or sampled latents (32, 16, 16), float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from sra2_fast.data.layouts.shards import shard_name, write_index, write_shard

CLASSES = 1000
SHARD_SAMPLES = 4096
SD_SCALE = 0.18215


def draw(samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """moments (n, 8, 32, 32) float32, as of Stable Diffusion's autoencoder; labels (n,) int64."""
    draws = np.random.default_rng(seed)
    moments = draws.standard_normal((samples, 8, 32, 32), dtype=np.float32) / np.float32(SD_SCALE)
    np.abs(moments[:, 4:], out=moments[:, 4:])
    moments[:, 4:] *= np.float32(0.05)
    return moments, draws.integers(0, CLASSES, samples)


def _shards(precision: str) -> Callable[[Path, np.ndarray, np.ndarray], Path]:
    def write(folder: Path, moments: np.ndarray, labels: np.ndarray) -> Path:
        folder.mkdir()
        starts = range(0, len(labels), SHARD_SAMPLES)
        parts = [slice(start, start + SHARD_SAMPLES) for start in starts]
        shards = [
            write_shard(
                folder, shard_name(i, len(parts)), moments[part], labels[part], "benchmark", precision=precision
            )
            for i, part in enumerate(parts)
        ]
        sizes = {"shape": [4, 32, 32], "num_classes": CLASSES, "class_names": None, "vae": None}
        write_index(folder, shards, shift=[0.0] * 4, scale=[SD_SCALE] * 4, precision=precision, **sizes)
        return folder

    return write


def _named(samples: int, prefix: str) -> Iterator[str]:
    return (f"{index // 1000:05d}/{prefix}{index:08d}.npy" for index in range(samples))


def _dataset_json(prefix: str) -> Callable[[Path, np.ndarray, np.ndarray], Path]:
    def write(folder: Path, stored: np.ndarray, labels: np.ndarray) -> Path:
        names = list(_named(len(labels), prefix))
        for name, one in zip(names, stored, strict=True):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            np.save(folder / name, one)
        entries = [[name, int(label)] for name, label in zip(names, labels, strict=True)]
        (folder / "dataset.json").write_text(json.dumps({"labels": entries}))
        return folder

    return write


def _fast_dit(folder: Path, moments: np.ndarray, labels: np.ndarray) -> Path:
    for part in ("features", "labels"):
        (folder / f"imagenet256_{part}").mkdir(parents=True)
    for index, label in enumerate(labels):
        np.save(folder / "imagenet256_features" / f"{index}.npy", moments[index : index + 1, :4] * np.float32(SD_SCALE))
        np.save(folder / "imagenet256_labels" / f"{index}.npy", np.array([label]))
    return folder


def _flat(folder: Path, moments: np.ndarray, labels: np.ndarray) -> Path:
    folder.mkdir()
    for index, one in enumerate(moments[:, :4] * np.float32(SD_SCALE)):
        np.save(folder / f"{index}.npy", one)
    return folder


def _lightningdit(folder: Path, moments: np.ndarray, labels: np.ndarray) -> Path:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    latents = torch.from_numpy(moments).view(-1, 32, 16, 16)
    for number, start in enumerate(range(0, len(labels), SHARD_SAMPLES)):
        part = slice(start, start + SHARD_SAMPLES)
        tensors = {"latents": latents[part], "latents_flip": -latents[part], "labels": torch.from_numpy(labels[part])}
        save_file(tensors, folder / f"latents_rank00_shard{number:03d}.safetensors")
    spread = latents.std(dim=(0, 2, 3), keepdim=True)
    torch.save({"mean": latents.mean(dim=(0, 2, 3), keepdim=True), "std": spread}, folder / "latents_stats.pt")
    return folder


def _repa_e(folder: Path, moments: np.ndarray, labels: np.ndarray) -> Path:
    import h5py

    folder.mkdir()
    names = list(_named(len(labels), "img-mean-std-"))
    with h5py.File(folder / "e2e-sdvae.h5", "w") as file:
        for name, one in zip(names, moments, strict=True):
            file.create_dataset(name, data=one)
        entries = [[name, int(label)] for name, label in zip(names, labels, strict=True)]
        file.create_dataset("dataset.json", data=np.array(json.dumps({"labels": entries}).encode(), dtype="S"))
    return folder


# Name -> writer(folder, moments, labels), which returns the path for `open_data`.
LAYOUTS: dict[str, Callable[[Path, np.ndarray, np.ndarray], Path]] = {
    "shards": _shards("float32"),
    "shards bfloat16": _shards("bfloat16"),
    "vae-sd": _dataset_json("img-mean-std-"),
    "fast-DiT": _fast_dit,
    "flat": _flat,
    "LightningDiT": _lightningdit,
    "REPA-E": _repa_e,
}
