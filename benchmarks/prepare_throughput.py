"""Images a second of `sra2-fast prepare`, of the autoencoder alone on the same batch, and of REPA's way: one at a time.

    python benchmarks/prepare_throughput.py [--images 2048] [--batch-size 32] [--vae NAME_OR_PATH] [--json FILE]

The images are photographs of 500x375 pixels as JPEG. Each round measures in turn, and the share is the median over the
rounds of prepare over the mean of the two measurements of the autoencoder around it:

    autoencoder   encode(pixels) of one batch that lies on the device, again and again: nothing is read or kept
    prepare       from JPEG files to finished shards: decoding, cropping, encoding, checksums, writing, syncing
    one by one    as REPA's preprocessing/dataset_tools.py encode: a PNG, a batch of one in float32, a file of moments

REPA needs a pass of `convert` before, which crops the images and writes those PNGs; it is timed and told apart. Without
--vae the autoencoder is SD-VAE's in form with random weights: what it costs does not depend on them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from lib.doing import Doing
from lib.outcome import WrongStep, check_can_write, exit_code
from lib.timing import append_json_line, environment, quantile

from sra2_fast.errors import InputError, must_be
from sra2_fast.prepare.command import MAX_WORKERS
from sra2_fast.prepare.crop import center_crop
from sra2_fast.prepare.encode import EncodeOptions, encode_shards, latent_shape, shard_jobs
from sra2_fast.prepare.listing import ImageList, list_images
from sra2_fast.prepare.shard_work import ShardWork
from sra2_fast.vae.autoencoder import encode, fingerprint, load_vae

TARGET_SHARE = 0.95
PHOTO = (500, 375)  # pixels, as most of ImageNet's
ONE_BY_ONE = 256  # images at most; the figure does not depend on how many
SHARDS = 4  # so that all but one are written while others are encoded
ALLOWED = {"fp32": 1e-4, "bf16": 0.1}  # relative distance of one image's moments from float32's: that it is the image


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for input that cannot be used, 1 where what was encoded is wrong."""
    parser = argparse.ArgumentParser(prog="prepare_throughput", description="Images a second of sra2-fast prepare.")
    parser.add_argument("--images", type=int, default=None, help="[2048 on a GPU, 8 on a CPU]")
    parser.add_argument("--image-size", type=int, default=256, help="[%(default)s]")
    parser.add_argument("--batch-size", type=int, default=None, help="[32 on a GPU, 2 on a CPU]")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default=None, help="[bf16 on a GPU, fp32 on a CPU]")
    parser.add_argument("--rounds", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--num-workers", type=int, default=None, help=f"[one a core, up to {MAX_WORKERS}]")
    parser.add_argument("--device", default=None, help="[cuda where there is one]")
    parser.add_argument("--vae", help="a hub name or a folder [SD-VAE's form, random weights]")
    parser.add_argument("--json", help="append a JSON line to this file")
    args = parser.parse_args(argv)
    return exit_code("prepare_throughput", "--batch-size", lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Write the photographs, measure in turn, check the latents, print the table and how it stands to the target."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    is_gpu = device.type == "cuda"
    args.images = args.images or (2048 if is_gpu else 8)
    args.batch_size = args.batch_size or (32 if is_gpu else 2)
    args.precision = args.precision or ("bf16" if is_gpu else "fp32")
    workers = min(MAX_WORKERS, os.cpu_count() or 1) if args.num_workers is None else args.num_workers
    for option, value, least in (
        ("--batch-size", args.batch_size, 1),
        ("--images", args.images, args.batch_size * SHARDS),
        ("--rounds", args.rounds, 1),
        ("--num-workers", workers, 0),
    ):
        if value < least:
            raise must_be("prepare_throughput", option, f"{least} or more", value)
    if args.json:
        check_can_write("prepare_throughput", "--json", args.json)
    vae = load_vae(args.vae, device) if args.vae else sd_vae(device)
    latent_shape(vae, args.image_size)
    rates: dict[str, list[float]] = {name: [] for name in ("autoencoder", "prepare", "one by one", "convert")}
    shares = []
    with (
        tempfile.TemporaryDirectory(prefix="prepare_throughput-") as temporary,
        Doing("prepare_throughput", "prepare", 1 + 4 * args.rounds, "--images or --image-size") as doing,
    ):
        folder = Path(temporary)
        doing("writing photographs")
        write_photos(folder / "photos", args.images)
        images = list_images(folder / "photos")
        few = images.files[: min(ONE_BY_ONE, args.images)]
        rates["convert"].append(convert_rate(images, few, args.image_size, folder / "squares"))
        batch = torch.randint(0, 256, (args.batch_size, 3, args.image_size, args.image_size), dtype=torch.uint8)
        autoencoder_rate(vae, batch, args.precision, args.batch_size)  # warms up
        doing.bar.update()
        for number in range(args.rounds):
            out = folder / f"latents-{number}"
            for what in ("autoencoder", "prepare", "autoencoder", "one by one"):
                doing(f"{what}, round {number + 1} of {args.rounds}")
                if what == "autoencoder":
                    rates[what].append(autoencoder_rate(vae, batch, args.precision, args.images))
                elif what == "prepare":
                    rates[what].append(prepare_rate(out, images, vae, args, workers))
                else:
                    rates[what].append(one_by_one_rate(vae, folder / "squares", few, folder / f"moments-{number}"))
                doing.bar.update()
            before, after = rates["autoencoder"][-2:]
            shares.append(rates["prepare"][-1] / ((before + after) / 2))
        check(out, images, vae, args)
    report(args, device, workers, type(vae).__name__, rates, statistics.median(shares))


def sd_vae(device: torch.device) -> torch.nn.Module:
    """SD-VAE (stabilityai/sd-vae-ft-ema) by its configuration, with random weights."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise InputError("prepare_throughput: needs diffusers; pip install diffusers") from error
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
    )
    return vae.requires_grad_(False).eval().to(device)


def write_photos(folder: Path, count: int) -> None:
    """`count` different crops of scikit-learn's two photographs, in two classes, of PHOTO pixels."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    draws = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for number in range(count):
        path = folder / str(number % 2) / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo = photos[number % 2]
        width = int(draws.integers(320, photo.width))
        height = width * PHOTO[1] // PHOTO[0]
        height = min(height, photo.height)
        left, top = int(draws.integers(photo.width - width + 1)), int(draws.integers(photo.height - height + 1))
        photo.crop((left, top, left + width, top + height)).resize(PHOTO).save(path, quality=92)


def autoencoder_rate(vae: torch.nn.Module, batch: torch.Tensor, precision: str, images: int) -> float:
    """Images/s of the autoencoder's encoder alone."""
    device = next(vae.parameters()).device
    pixels = batch.to(device).float() / 127.5 - 1
    batches = images // len(batch)
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        vae.encode(pixels)
        _synchronise(device)
        begin = time.perf_counter()
        for _ in range(batches):
            vae.encode(pixels)
        _synchronise(device)
    return batches * len(batch) / (time.perf_counter() - begin)


def prepare_rate(out: Path, images: ImageList, vae: torch.nn.Module, args: argparse.Namespace, workers: int) -> float:
    """Images/s of what `sra2-fast prepare` does once the autoencoder is loaded."""
    options = EncodeOptions(
        images=str(images.store.path),
        vae="benchmark",
        vae_fingerprint=fingerprint(vae),
        image_size=args.image_size,
        batch_size=args.batch_size,
        precision=args.precision,
        shard_size=-(-len(images.files) // SHARDS),
    )
    out.mkdir()
    works = [ShardWork(out, job) for job in shard_jobs(images, options)]
    begin = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):  # its own bar
        shards = list(encode_shards(out, images, vae, options, works, num_workers=workers, skip_unreadable=False))
    elapsed = time.perf_counter() - begin
    if sum(shard.samples for _, shard in shards) != len(images.files):
        raise WrongStep(
            f"prepare made {sum(shard.samples for _, shard in shards)} latents of {len(images.files)} images"
        )
    return len(images.files) / elapsed


def convert_rate(images: ImageList, files: list[str], size: int, squares: Path) -> float:
    """Images/s of REPA's first pass: read, crop, write an uncompressed PNG."""
    from PIL import Image

    begin = time.perf_counter()
    for file in files:
        path = squares / f"{file}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(images.store.path / file) as image:
            square = center_crop(image.convert("RGB"), size)
        Image.fromarray(square).save(path, compress_level=0)
    return len(files) / (time.perf_counter() - begin)


@torch.no_grad()
def one_by_one_rate(vae: torch.nn.Module, squares: Path, files: list[str], moments: Path) -> float:
    """Images/s of REPA's second pass: for each image read, copy, encode in float32, fetch, write."""
    from PIL import Image

    device = next(vae.parameters()).device
    begin = time.perf_counter()
    for file in files:
        with Image.open(squares / f"{file}.png") as image:
            pixels = torch.tensor(np.array(image.convert("RGB"))).to(device).permute(2, 0, 1).unsqueeze(0)
        encoded = vae.encode(pixels.float() / 127.5 - 1)
        if hasattr(encoded, "latent"):
            both = torch.cat([encoded.latent, torch.zeros_like(encoded.latent)], dim=1)
        else:
            both = torch.cat([encoded.latent_dist.mean, encoded.latent_dist.std], dim=1)
        path = moments / f"{file}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, both[0].cpu().numpy())
    return len(files) / (time.perf_counter() - begin)


def check(out: Path, images: ImageList, vae: torch.nn.Module, args: argparse.Namespace) -> None:
    """Raise WrongStep where the latents that prepare wrote are not those of the images."""
    from safetensors.numpy import load_file

    written = load_file(sorted(out.glob("latents-*.safetensors"))[0])["moments"]
    options = EncodeOptions("", "", fingerprint(vae), args.image_size, args.batch_size, args.precision, 1)
    first = shard_jobs(images, options)[0].positions[0]  # the same order, whatever the size of shards
    square = read_first(images, images.files[first], args.image_size)
    want = encode(vae, square[None])[0]
    distance = float(np.linalg.norm(written[0] - want) / np.linalg.norm(want))
    if not distance <= ALLOWED[args.precision]:
        raise WrongStep(f"prepare's first latent is {distance:.2g} away from that of its image")


def read_first(images: ImageList, file: str, size: int) -> torch.Tensor:
    """(3, size, size) uint8."""
    from PIL import Image

    with Image.open(images.store.path / file) as image:
        return torch.from_numpy(center_crop(image.convert("RGB"), size).transpose(2, 0, 1).copy())


def report(
    args: argparse.Namespace,
    device: torch.device,
    workers: int,
    kind: str,
    rates: dict[str, list[float]],
    share: float,
) -> None:
    """The table, and the JSON line."""
    where = environment(device)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    both = 1 / (1 / medians["convert"] + 1 / medians["one by one"])
    print(
        f"{args.vae or 'SD-VAE, random weights'}, {args.image_size} pixels, batch {args.batch_size}, {args.precision}, "
        f"{args.images} images, {workers} workers, {where['device']}, commit {where['commit']}"
    )
    notes = {
        "autoencoder": "alone, on a batch that is there",
        "prepare": f"{100 * share:.1f} % of it; the target is {100 * TARGET_SHARE:.0f} %",
        "one by one": f"REPA's encode, float32; prepare is {medians['prepare'] / medians['one by one']:.1f}x as fast, "
        f"with its convert before ({medians['convert']:.0f} images/s) {medians['prepare'] / both:.1f}x",
    }
    for name, note in notes.items():
        low, high = quantile(rates[name], 0.2), quantile(rates[name], 0.8)
        print(f"  {name:<12} {medians[name]:9.2f} images/s ({low:.2f}-{high:.2f})  {note}")
    if args.json:
        record = {
            "benchmark": "prepare_throughput",
            "vae": args.vae or "SD-VAE, random weights",
            "vae_class": kind,
            "image_size": args.image_size,
            "batch_size": args.batch_size,
            "precision": args.precision,
            "images": args.images,
            "num_workers": workers,
            "share_of_autoencoder": share,
            **{f"{name.replace(' ', '_')}_images_per_s": value for name, value in medians.items()},
            **where,
        }
        append_json_line(args.json, record)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
