"""`sra2-fast sample`: N images from a run or a checkpoint, as PNGs, a grid, and the arrays of the ADM evaluation suite.

The images are drawn in batches of consecutive numbers, and a batch that was cut short is drawn again whole, so that a
run that was killed is continued by the same command and ends with the same bytes. Everything that shapes an image is in
sample.json; a folder is of one such plan. Many processes are left out as yet.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, is_out_of_memory, must_be

if TYPE_CHECKING:
    from .draw import ImageDrawer, Sampler
    from .labels import Labels
    from .store import SampleFolder

METHODS = ("euler", "heun", "dopri5", "sde")
ODE_STEPS, SDE_STEPS = 50, 250  # REPA's and SiT's
PNG_THREADS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sra2-fast sample`."""
    add = parser.add_argument
    add(
        "--checkpoint",
        metavar="PATH",
        help="a run (its newest), one of its checkpoints, or a public .pt or .safetensors",
    )
    add("--source", default="auto", help="whose a public file is, where it does not tell: sit, repa, sra ...")
    add("--out", metavar="DIR", required=True, help="where the images go; the same command again goes on")
    add("--num-images", type=int, default=64, help="%(default)s")
    add("--batch-size", type=int, default=32, help="images drawn together (%(default)s); guidance doubles it")
    add("--labels", default="balanced", help="balanced, random, labels such as 207,360, or a .npy or .txt file")
    add("--seed", type=int, default=0, help="an image is a function of it and of its number (%(default)s)")
    add("--method", choices=METHODS, default="euler", help="three ODE solvers, and the SDE (%(default)s)")
    add("--steps", type=int, help=f"{ODE_STEPS}, or {SDE_STEPS} of the SDE; dopri5 chooses its own")
    add("--cfg-scale", type=float, default=1.0, help="guidance; 1 is none (%(default)s)")
    add("--guidance-interval", default="0,1", metavar="LOW,HIGH", help="guide while t is in there; t = 0 is data")
    add("--guided-channels", type=int, help="guide the first so many channels, 3 in the SiT repository (all)")
    add("--last-step", type=float, help="size of the last, noise-free step of the SDE (0.04)")
    add("--path", choices=("linear", "cosine"), help="the path it was trained on, which the SDE needs (the run's own)")
    add("--rtol", type=float, help="of dopri5 (1e-5)")
    add("--atol", type=float, help="of dopri5 (1e-5)")
    add("--weights", choices=("ema", "model"), default="ema", help="averaged, or as trained (%(default)s)")
    add("--vae", metavar="NAME_OR_PATH", help="decodes the latents (the one they were made with); none: in colours")
    add(
        "--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where products in it are fast"
    )
    add("--device", default=None, help="cpu, cuda, cuda:1 ... (cuda if there is one)")
    add("--compile", action="store_true", help="torch.compile: a minute at first, faster from then on")


def run(args: argparse.Namespace) -> int:
    """Draw what is missing in --out. 0 when it is whole, 130 after Ctrl-C; raises InputError for bad input."""
    _check_options(args)
    try:
        return _sample(args)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"sample: out of memory; lower --batch-size (now {args.batch_size})") from error


def _sample(args: argparse.Namespace) -> int:
    import torch

    from .. import backends
    from ..checkpoints import open_model
    from ..models import compile_blocks
    from .draw import ImageDrawer
    from .labels import make_labels
    from .origin import decoder_for, fingerprint
    from .store import SampleFolder

    device = _device(args)
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if backends.is_bf16_fast(device) else "fp32"
    model, origin = open_model(args.checkpoint, args.weights, args.source)
    labels, labels_plan = make_labels(args.labels, model.num_classes, args.seed)
    sampler = _sampler(args, model, origin.path)
    decode, decoder_plan = decoder_for(origin, args.vae, model, device)
    plan = {
        "weights": {"which": origin.weights, "step": origin.step, "sha256": fingerprint(model)},
        "seed": args.seed,
        "labels": labels_plan,
        **{name: value for name, value in vars(sampler).items() if value is not None},
        "decoder": decoder_plan,
        "precision": precision,
    }
    for note in (*origin.notes, *([decode.note] if decode.note else [])):
        print(note)
    about = {"checkpoint": str(origin.file), "model": model.config(), "versions": backends.versions()}
    folder = SampleFolder(Path(args.out), plan, about)
    try:
        model = model.to(device).eval().requires_grad_(False)
        draw = ImageDrawer(
            compile_blocks(model) if args.compile else model,
            origin.file,
            sampler,
            labels,
            decode,
            seed=args.seed,
            device=torch.device(device),
            precision=precision,
            padded_to=args.batch_size if args.compile else 0,
        )
        return _fill(args, folder, draw, labels)
    finally:
        folder.close()


def _fill(args: argparse.Namespace, folder: SampleFolder, draw: ImageDrawer, labels: Labels) -> int:
    import numpy as np

    count, size = args.num_images, args.batch_size
    missing = folder.missing(count)
    began = time.perf_counter()
    try:
        _draw_missing(folder, draw, missing, count, size)
    except KeyboardInterrupt:
        done = count - len(folder.missing(count))
        print(
            f"\nsra2-fast sample: interrupted with {done} of {count} images there; "
            "run the same command again to go on after them",
            file=sys.stderr,
        )
        return 130
    rate = len(missing) / (time.perf_counter() - began)
    if len(missing) or not folder.has_arrays(count):
        folder.write_grid(count)
        folder.write_arrays(labels(np.arange(count)), range(count))
    how = f" ({rate:.3g} images/s)" if len(missing) else ", already complete"
    print(f"{count} images in {folder.images}{how}; {folder.path / 'samples.npz'}, {folder.path / 'grid.png'}")
    return 0


def _draw_missing(folder: SampleFolder, draw: ImageDrawer, missing: Any, count: int, size: int) -> None:
    """Every batch with a missing image is drawn whole; PNGs are packed while the next one is drawn."""
    import numpy as np

    from ..progress import progress_bar

    bar = progress_bar(desc="sample", unit=" images", total=count, initial=count - len(missing))
    with bar, ThreadPoolExecutor(min(PNG_THREADS, os.cpu_count() or 1)) as threads:
        under_way: list[Any] = []
        for start in np.unique(missing // size) * size:
            indices = np.arange(start, min(start + size, count))
            images = draw(indices)
            for job in under_way:
                job.result()
            is_missing = np.isin(indices, missing)
            under_way = [
                threads.submit(folder.write_image, int(index), image)
                for index, image in zip(indices[is_missing], images[is_missing], strict=True)
            ]
            bar.update(int(is_missing.sum()))
        for job in under_way:
            job.result()


def _sampler(args: argparse.Namespace, model: Any, path: str | None) -> Sampler:
    """The sampler of the options, checked against the model."""
    from .draw import Sampler

    is_sde, is_adaptive, is_guided = args.method == "sde", args.method == "dopri5", args.cfg_scale != 1.0
    interval = parse_interval(args.guidance_interval)
    if is_guided and model.class_dropout_prob == 0:
        raise InputError(
            "sample: --cfg-scale must be 1 for a model without a null label; train with --label-dropout above 0 to "
            "guide"
        )
    if args.guided_channels is not None and not 1 <= args.guided_channels <= model.in_channels:
        raise must_be("sample", "--guided-channels", f"from 1 to {model.in_channels}", args.guided_channels)
    if is_sde and not (args.path or path):
        raise InputError(
            "sample: --method sde needs the path the model was trained on, and the checkpoint records none; "
            "give --path linear or --path cosine"
        )
    return Sampler(
        method=args.method,
        steps=None if is_adaptive else args.steps or (SDE_STEPS if is_sde else ODE_STEPS),
        cfg_scale=args.cfg_scale,
        guidance_interval=interval if is_guided else None,
        guided_channels=args.guided_channels if is_guided else None,
        rtol=(args.rtol or 1e-5) if is_adaptive else None,
        atol=(args.atol or 1e-5) if is_adaptive else None,
        last_step=(args.last_step or 0.04) if is_sde else None,
        path=(args.path or path) if is_sde else None,
    )


def parse_interval(given: str, op: str = "sample") -> tuple[float, float]:
    """LOW,HIGH of --guidance-interval. Raises InputError."""
    try:
        low, high = (float(end) for end in given.split(","))
    except ValueError as error:
        raise must_be(op, "--guidance-interval", "two numbers LOW,HIGH", repr(given)) from error
    if not 0.0 <= low <= high <= 1.0:
        raise must_be(op, "--guidance-interval", "LOW,HIGH with 0 <= LOW <= HIGH <= 1", given)
    return low, high


def _check_options(args: argparse.Namespace) -> None:
    """What can be said without torch and without a model."""
    if os.environ.get("WORLD_SIZE", "") not in ("", "1"):
        raise InputError("sample: runs on one process and one device as yet, not under torchrun; start it by itself")
    if not args.checkpoint:
        raise InputError("sample: --checkpoint is missing; give a run or a checkpoint")
    at_least = {"num_images": 1, "batch_size": 1, "steps": 2 if args.method == "sde" else 1}
    for name, least in at_least.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise must_be("sample", _option(name), f"{least} or more", value)
    if not 0 <= args.seed < 2**64:
        raise must_be("sample", "--seed", "from 0 to 2^64 - 1", args.seed)
    if not 0.0 <= args.cfg_scale < float("inf"):
        raise must_be("sample", "--cfg-scale", "a finite number, 0 or more", args.cfg_scale)
    if args.last_step is not None and not 0.0 < args.last_step < 1.0:
        raise must_be("sample", "--last-step", "between 0 and 1", args.last_step)
    for name in ("rtol", "atol"):
        value = getattr(args, name)
        if value is not None and not 0.0 < value < 1.0:
            raise must_be("sample", _option(name), "between 0 and 1", value)
    of_method = {"steps": METHODS[:2] + METHODS[3:], "last_step": ("sde",), "path": ("sde",)}
    for name, methods in {**of_method, "rtol": ("dopri5",), "atol": ("dopri5",)}.items():
        if getattr(args, name) is not None and args.method not in methods:
            raise InputError(
                f"sample: {_option(name)} is for --method {' or '.join(methods)}, not {args.method}; leave it out"
            )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _device(args: argparse.Namespace) -> str:
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"sample: --device {device} cannot be used ({reason}); try --device cpu") from error
    return device
