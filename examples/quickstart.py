"""From photographs to a grid of samples, on a CPU in minutes and without a network: `python examples/quickstart.py`.

What one does with a data set of one's own, but for size: images in a folder a class, an autoencoder, `sra2-fast
prepare`, a look at what was stored, `sra2-fast train`, `sra2-fast sample`. The photographs are scikit-learn's two, cut
into crops; the autoencoder is a small AutoencoderKL, trained on them first, where one would take a published one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from sklearn.datasets import load_sample_images

from sra2_fast.cli import main as sra2_fast

CROP, SIZE = 96, 32  # pixels of a crop, and of what is encoded
BATCH = 32


def write_crops(folder: Path, count: int) -> None:
    """`count` crops of each photograph, in a folder a class."""
    draws = np.random.default_rng(0)
    for name, photo in zip(("temple", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            top, left = (draws.integers(side - CROP + 1) for side in photo.shape[:2])
            Image.fromarray(photo[top : top + CROP, left : left + CROP]).save(folder / name / f"{number:04d}.png")


def train_autoencoder(images: Path, out: Path, steps: int) -> None:
    """A small AutoencoderKL, 2 pixels a latent and 4 channels, saved as diffusers has it, with its scaling factor."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
    )
    pixels = [np.asarray(Image.open(path).resize((SIZE, SIZE))) for path in sorted(images.rglob("*.png"))]
    data = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)
    for step in range(steps):
        batch = data[torch.randint(len(data), (BATCH // 2,))]
        posterior = vae.encode(batch).latent_dist
        error = (vae.decode(posterior.sample()).sample - batch).square().mean()
        (error + 1e-5 * posterior.kl().mean() / posterior.mean[0].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(f"autoencoder, step {step + 1}: squared error {error.item():.4f}")
    with torch.no_grad():
        spread = vae.encode(data[:256]).latent_dist.sample().std().item()
    vae.register_to_config(scaling_factor=1 / spread)  # so that latents are of the size of the noise
    vae.save_pretrained(out)


def run(*words: str) -> None:
    """A command as one would type it."""
    print("$ sra2-fast", *words)
    if sra2_fast([str(word) for word in words]) != 0:
        raise SystemExit(1)


def main(out: str = "runs/quickstart", crops: int = 400, autoencoder_steps: int = 300, steps: int = 600) -> Path:
    """All of it; the grid of samples is returned."""
    folder = Path(out)
    images, vae, latents, model, samples = (
        str(folder / name) for name in ("images", "autoencoder", "latents", "model", "samples")
    )
    write_crops(Path(images), crops)
    train_autoencoder(Path(images), Path(vae), autoencoder_steps)
    size = ("--image-size", str(SIZE))
    run("prepare", "--images", images, "--vae", vae, "--out", latents, *size, "--crop", "random", "--flip")
    run("prepare", "--out", latents, "--verify", "8")  # latents/verify.png: images beside what their latents decode to
    shape = ("--model", "64,4,4,2", "--batch-size", str(BATCH), "--lr", "1e-3", "--ema-decay", "0.99")
    often = ("--log-every", "100", "--sample-every", "0")
    run("train", "--data", latents, "--out", model, "--steps", str(steps), *shape, *often)
    run(
        "sample",
        "--checkpoint",
        model,
        "--out",
        samples,
        "--num-images",
        "16",
        "--method",
        "heun",
        "--cfg-scale",
        "1.5",
    )
    return Path(samples) / "grid.png"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/quickstart")
    parser.add_argument("--crops", type=int, default=400, help="of each of the two photographs")
    parser.add_argument("--autoencoder-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=600)
    print(f"samples: {main(**vars(parser.parse_args()))}")
