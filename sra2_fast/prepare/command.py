"""`sra2-fast prepare`: a folder of images, encoded once with a frozen autoencoder, into latents to train on.

The images are laid out in a shuffled order (so that a block of neighbours on disk mixes the classes) and cut into
shards. A shard is encoded in the same batches whatever was done before, and knows from which images, weights and
options it was made. So a run that was killed is continued by the same command and ends with the same bytes, and on a
finished folder the same command compares every checksum and every image, and makes damaged shards anew.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, must_be

if TYPE_CHECKING:
    from ..data.layouts.shards import Shard, ShardSource
    from .encode import EncodeOptions
    from .listing import ImageList

MAX_WORKERS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sra2-fast prepare`."""
    parser.add_argument(
        "--images",
        metavar="FOLDER",
        help="a folder or a zip archive with a subfolder for every class, of PNG, JPEG, WebP, GIF, BMP or TIFF files; "
        "turned as EXIF says, alpha on white, 16 bits brought to 8",
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="the class of every image: a CSV of file,class or a dataset.json like REPA's (one in FOLDER is found)",
    )
    parser.add_argument("--class-names", metavar="CSV", help="what classes are called: lines of class,name")
    parser.add_argument("--ignore-labels", action="store_true", help="one class, wherever the images lie")
    parser.add_argument(
        "--vae", metavar="NAME_OR_PATH", help="AutoencoderKL or AutoencoderDC of diffusers: a hub name or a folder"
    )
    parser.add_argument(
        "--out", metavar="DIR", required=True, help="where the latents go; the same command again goes on"
    )
    parser.add_argument(
        "--features",
        metavar="ENCODER",
        help="write an encoder's features too, for train --target features: dinov2-vitb14 and its like, timm:NAME, or "
        "a folder",
    )
    parser.add_argument("--image-size", type=int, default=256, help="side of the square images (%(default)s)")
    parser.add_argument(
        "--crop",
        choices=("center", "random"),
        default="center",
        help="from the middle, or from a random place and with 80 to 100 %% of the shorter side (%(default)s)",
    )
    parser.add_argument("--flip", action="store_true", help="encode the mirrored images too; training draws which")
    parser.add_argument(
        "--latent-scale", help="z = (value - shift) * scale, one number or one a channel separated by commas"
    )
    parser.add_argument("--latent-shift", help="both by default as the autoencoder's configuration says")
    parser.add_argument("--batch-size", type=int, default=32, help="images encoded together (%(default)s)")
    parser.add_argument(
        "--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 on a GPU, fp32 on a CPU"
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1 ... (cuda if there is one)")
    parser.add_argument("--shard-size", type=int, default=4096, help="images in a shard (%(default)s: 134 MB)")
    parser.add_argument(
        "--num-workers", type=int, default=None, help="processes that read images (one a core, up to 16)"
    )
    parser.add_argument("--skip-unreadable", action="store_true", help="leave unreadable images out")
    parser.add_argument(
        "--verify",
        metavar="N",
        nargs="?",
        type=int,
        const=0,
        help="only compare the finished latents with their checksums; with a number, decode so many into a picture",
    )


def run(args: argparse.Namespace) -> int:
    """Encode what is missing in --out. 0 when it is whole, 130 after Ctrl-C.

    Raises InputError for bad input, TemporaryFailure where another process works in --out.
    """
    from ..data.layouts.shards import ShardSource

    out = Path(args.out)
    if args.verify is not None:
        if args.verify < 0:
            raise must_be("prepare", "--verify", "0 or more", args.verify)
        source = ShardSource(out)
        source.verify()
        print(f"all checksums right: {_summary(source)} in {out}")
        if args.verify:
            from .verify import decode_some

            device, _ = _device_and_precision(args)
            print(decode_some(out, args.verify, images=args.images, vae=args.vae, device=device))
        return 0
    with contextlib.ExitStack() as held:
        return _prepare(args, out, held)


def _prepare(args: argparse.Namespace, out: Path, held: contextlib.ExitStack) -> int:
    from ..data.layouts.shards import INDEX_FILE, ShardSource, discard_damaged_index
    from ..files import FolderLock, make_folder
    from ..vae.autoencoder import fingerprint, load_vae
    from .earlier import PLAN_FILE, keep_to_plan, survey
    from .encode import EncodeOptions, encode_shards, latent_shape, shard_jobs
    from .encoders import load_encoder
    from .features import feature_grid, write_features
    from .listing import list_images
    from .reading import check_classes

    _check_options(args)
    images = list_images(
        Path(args.images),
        labels=args.labels and Path(args.labels),
        class_names=args.class_names and Path(args.class_names),
        ignore_labels=args.ignore_labels,
    )
    for note in images.notes:
        print(note)
    device, precision = _device_and_precision(args)
    vae = load_vae(args.vae, device)
    shape = latent_shape(vae, args.image_size)
    shift, scale = _normalisation(args, vae)
    encoder = load_encoder(args.features, feature_grid(args.image_size), device) if args.features else None
    options = EncodeOptions(
        images=str(images.store.path.resolve()),
        vae=str(Path(args.vae).resolve()) if Path(args.vae).exists() else args.vae,
        vae_fingerprint=fingerprint(vae),
        image_size=args.image_size,
        batch_size=args.batch_size,
        precision=precision,
        shard_size=args.shard_size,
        crop=args.crop,
        flip=args.flip,
        labels=args.labels and str(Path(args.labels).resolve()),
        ignore_labels=args.ignore_labels,
        latent_scale=args.latent_scale,
        latent_shift=args.latent_shift,
    )
    make_folder(out)
    held.enter_context(contextlib.closing(FolderLock(out, "prepare")))
    if (out / PLAN_FILE).is_file():
        discard_damaged_index(out)
    keep_to_plan(out, options, images)
    jobs = shard_jobs(images, options)
    workers = min(MAX_WORKERS, os.cpu_count() or 1) if args.num_workers is None else args.num_workers
    shards, works = survey(out, images, jobs, workers)
    if works:
        check_classes(images, args.image_size)
        (out / INDEX_FILE).unlink(missing_ok=True)
    encoding = encode_shards(
        out, images, vae, options, works, num_workers=workers, skip_unreadable=args.skip_unreadable
    )
    try:
        for job, shard in encoding:
            shards[job.number] = shard
    except KeyboardInterrupt:
        done = sum(len(job.positions) for job in jobs if job.number in shards)
        done += sum(work.images_done for work in works if work.job.number not in shards)
        print(
            f"\nsra2-fast prepare: interrupted with {done} of {len(images.files)} images encoded; "
            "run the same command again to go on after them",
            file=sys.stderr,
        )
        return 130
    if not (out / INDEX_FILE).is_file():
        about = _about_latents(vae, options, shape, shift, scale)
        _finish(out, [shards[job.number] for job in jobs], images, options, about)
    how = "" if works else "already complete, all checksums right: "
    print(f"{how}{_summary(ShardSource(out))} in {out}; train on them with sra2-fast train --data {out}")
    if encoder is None:
        return 0
    try:
        finished = [shards[job.number] for job in jobs]
        how = "" if write_features(out, images, jobs, finished, encoder, options, workers) else "already complete: "
    except KeyboardInterrupt:
        print(
            "\nsra2-fast prepare: interrupted; run the same command again for the rest of the features", file=sys.stderr
        )
        return 130
    tokens = f"{encoder.grid**2}x{encoder.width}"
    print(f"{how}features of {tokens} by {encoder.name}; align with them by sra2-fast train --target features")
    return 0


def _normalisation(args: argparse.Namespace, vae: Any) -> tuple[list[float], list[float]]:
    """shift and scale of every channel: as the options say, or else the autoencoder's configuration."""
    from ..data.normalisation import per_channel
    from ..vae.autoencoder import normalisation

    about = normalisation(vae)
    shift, scale = about.shift, about.scale
    if args.latent_shift is not None:
        shift = per_channel("--latent-shift", args.latent_shift, about.channels)
    if args.latent_scale is not None:
        scale = per_channel("--latent-scale", args.latent_scale, about.channels)
    return [float(value) for value in shift], [float(value) for value in scale]


def _about_latents(
    vae: Any, options: EncodeOptions, shape: tuple[int, int, int], shift: list[float], scale: list[float]
) -> dict[str, Any]:
    """What index.json says about the latents and the autoencoder they are of."""
    from ..vae.autoencoder import normalisation

    recorded = {key: value for key, value in vars(normalisation(vae)).items() if key != "channels"}
    made_with = {
        "name": options.vae,
        "class": type(vae).__name__,
        "fingerprint": options.vae_fingerprint,
        "downsample_factor": options.image_size // shape[-1],
        **recorded,
    }
    return {"shape": list(shape), "shift": shift, "scale": scale, "vae": made_with}


def _finish(out: Path, shards: list[Shard], images: ImageList, options: EncodeOptions, about: dict[str, Any]) -> None:
    """Say what was left out or converted, remove what an earlier list of images left, and write the index."""
    from ..data.layouts.shards import SHARD_PATTERN, write_index
    from ..files import write_whole
    from . import convert
    from .earlier import digest_of
    from .encode import UNREADABLE_FILE
    from .listing import name_some
    from .shard_work import total

    unreadable = [name for shard in shards for name in shard.unreadable]
    (out / UNREADABLE_FILE).unlink(missing_ok=True)
    if unreadable:
        write_whole(out / UNREADABLE_FILE, "".join(f"{name}\n" for name in unreadable).encode())
        print(f"left out {len(unreadable)} unreadable images: {name_some(unreadable)}; see {out / UNREADABLE_FILE}")
    converted = total(shard.record["converted"] for shard in shards)
    if converted:
        print(convert.summary(converted))
    current = {shard.file for shard in shards}
    for path in out.glob(f"{SHARD_PATTERN}*"):  # the half-written too
        if path.name not in current:
            path.unlink()
    origin = {
        **vars(options),
        "alpha_on": convert.BACKGROUND,
        "converted": converted,
        "pictures": {shard.file: digest_of(shard.record["marks"]) for shard in shards},
    }
    write_index(
        out,
        shards,
        has_flips=options.flip,
        num_classes=images.num_classes,
        class_names=images.class_names,
        **about,
        prepared_from=origin,
        versions={name: importlib.metadata.version(name) for name in ("torch", "diffusers", "pillow")},
    )


def _check_options(args: argparse.Namespace) -> None:
    if args.labels and args.ignore_labels:
        raise InputError(f"prepare: --labels {args.labels} and --ignore-labels exclude each other; leave one out")
    for name in ("images", "vae"):
        if not getattr(args, name):
            raise InputError(f"prepare: --{name} is missing")
    for name, least in (("image_size", 1), ("batch_size", 1), ("shard_size", 1), ("num_workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise must_be("prepare", "--" + name.replace("_", "-"), f"{least} or more", value)


def _device_and_precision(args: argparse.Namespace) -> tuple[str, str]:
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=device).item()  # meta has no values
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"prepare: --device {device} cannot be used ({reason}); try --device cpu") from error
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if device.startswith("cuda") else "fp32"
    return device, precision


def _summary(source: ShardSource) -> str:
    shape = "x".join(str(size) for size in source.shape)
    flips = ", each mirrored too" if source.has_flips else ""
    return f"{source.num_samples} latents of {shape}{flips}, {source.num_classes} classes, {len(source.shards)} shards"
