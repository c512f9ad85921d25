"""`sra2-fast convert-data`: latents of any layout that --data reads, into shards, which are read fastest.

Nothing is encoded again: stored values, labels, mirrored images, normalisation and the autoencoder's name are carried
over. The samples are shuffled once, so that a block of neighbours on disk mixes the classes. A shard knows what it was
made from, so a run that was stopped is continued by the same command, and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import InputError, must_be
from .files import FolderLock, make_folder, write_whole
from .progress import progress_bar

if TYPE_CHECKING:
    import numpy as np

    from .data import LatentSource
    from .data.layouts.shards import Shard

PLAN_FILE = "convert-data.json"
CHUNK_SAMPLES = 256
MAX_WORKERS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sra2-fast convert-data`."""
    parser.add_argument("--data", metavar="PATH", required=True, help="latents in any layout that `train --data` reads")
    parser.add_argument("--out", metavar="DIR", required=True, help="where the shards go; the same command goes on")
    parser.add_argument("--latent-scale", default=None, help="as in sra2-fast train, where the data record none")
    parser.add_argument("--latent-shift", default=None, help="the shift of --latent-scale")
    parser.add_argument("--ignore-labels", action="store_true", help="leave the labels out")
    parser.add_argument(
        "--precision",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="what the latents are stored in; the others halve the bytes and round (%(default)s)",
    )
    parser.add_argument("--shard-size", type=int, default=4096, help="samples in a shard (%(default)s)")
    parser.add_argument("--num-workers", type=int, default=None, help="processes that read (one a core, up to 8)")


def run(args: argparse.Namespace) -> int:
    """Write what is missing in --out. 0 when it is whole, 130 after Ctrl-C.

    Raises InputError for bad input, TemporaryFailure where another process works in --out.
    """
    from .data import open_data

    for name, least in (("shard_size", 1), ("num_workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise must_be("convert-data", "--" + name.replace("_", "-"), f"{least} or more", value)
    if args.data == "digits":
        raise InputError("convert-data: --data digits is held in memory and needs no shards; give a folder of latents")
    source = open_data(
        args.data,
        latent_scale=args.latent_scale,
        latent_shift=args.latent_shift,
        ignore_labels=args.ignore_labels,
    )
    for note in source.notes:
        print(note)
    out = Path(args.out)
    if out.resolve() == Path(args.data).resolve():
        raise InputError(f"convert-data: --out {out} is --data itself; give another folder")
    make_folder(out)
    with contextlib.closing(FolderLock(out, "convert-data")):
        return _convert(args, source, out)


def _convert(args: argparse.Namespace, source: LatentSource, out: Path) -> int:
    from .data.layouts.shards import INDEX_FILE, discard_damaged_index

    _keep_to_plan(out, source, args)
    discard_damaged_index(out)
    jobs = _jobs(source, args.shard_size, args.precision)
    shards = _finished(out, jobs)
    todo = [job for job in jobs if job.name not in shards]
    if todo:
        (out / INDEX_FILE).unlink(missing_ok=True)
    workers = min(MAX_WORKERS, os.cpu_count() or 1) if args.num_workers is None else args.num_workers
    try:
        for shard in _write_shards(out, source, todo, args.precision, workers):
            shards[shard.file] = shard
    except KeyboardInterrupt:
        done = sum(shard.samples for shard in shards.values())
        print(
            f"\nsra2-fast convert-data: interrupted with {done} of {source.num_samples} latents in finished shards; "
            "run the same command again to go on after them",
            file=sys.stderr,
        )
        return 130
    if not (out / INDEX_FILE).is_file():
        _finish(out, [shards[job.name] for job in jobs], source, args)
    how = "" if todo else "already complete, all checksums right: "
    shape = "x".join(map(str, source.shape))
    print(
        f"{how}{source.num_samples} latents of {shape}, {source.num_classes} classes, {len(jobs)} shards in {out}; "
        f"train on them with sra2-fast train --data {out}"
    )
    return 0


class _Job(NamedTuple):
    """A shard to be made: its name, the samples it holds in their order, and a hash of all that it depends on."""

    name: str
    samples: np.ndarray  # (n,) int64
    key: str


def _jobs(source: LatentSource, shard_size: int, precision: str) -> list[_Job]:
    from .data.layouts.shards import shard_name
    from .randomness import Stream, generator

    order = generator(Stream.PREPARE, seed=0).permutation(source.num_samples)
    parts = [order[start : start + shard_size] for start in range(0, len(order), shard_size)]
    content = f"{source.fingerprint()} {precision} ".encode()
    keys = [hashlib.sha256(content + part.tobytes()).hexdigest() for part in parts]
    return [_Job(shard_name(i, len(parts)), part, key) for i, (part, key) in enumerate(zip(parts, keys, strict=True))]


def _keep_to_plan(out: Path, source: LatentSource, args: argparse.Namespace) -> None:
    """Refuse to mix two data sets in one folder, and remember what this one is made from."""
    from .data.layouts.shards import is_shards

    path = out / PLAN_FILE
    plan = {"fingerprint": source.fingerprint(), "precision": args.precision, "shard_size": args.shard_size}
    if path.is_file():
        try:
            before = dict(json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"convert-data: {path} cannot be read ({error}); remove it or give another --out"
            ) from error
        if before.get("fingerprint") != plan["fingerprint"]:
            raise InputError(
                f"convert-data: {out} was begun with other data ({before.get('data')}); give another --out"
            )
        for name in ("precision", "shard_size"):
            if before.get(name) != plan[name]:
                option = "--" + name.replace("_", "-")
                raise InputError(
                    f"convert-data: {out} was begun with {option} {before.get(name)}, not {plan[name]}; "
                    "give another --out"
                )
    elif is_shards(out):
        raise InputError(f"convert-data: --out {out} holds latents of another origin; give another folder")
    write_whole(path, json.dumps({**plan, "data": str(Path(args.data).resolve())}, indent=1).encode())


def _finished(out: Path, jobs: list[_Job]) -> dict[str, Shard]:
    """The shards that are there and undamaged, by name."""
    from .data.layouts.shards import finished_shard

    found = {}
    for job in progress_bar(iterable=jobs, desc="comparing checksums", unit="shard", delay=2.0, leave=False):
        shard = finished_shard(out, job.name, job.key)
        if shard is not None:
            found[job.name] = shard
    return found


def _write_shards(
    out: Path, source: LatentSource, jobs: list[_Job], precision: str, num_workers: int
) -> Iterator[Shard]:
    """Read `jobs` in the background, each in the order of the source, and write them one after the other."""
    import numpy as np
    import torch

    from .data.layouts.shards import write_shard
    from .data.loader import BatchLoader, ignore_interrupts
    from .data.reading import Chunks

    sorted_samples = [np.sort(job.samples) for job in jobs]
    chunks = [
        samples[start : start + CHUNK_SAMPLES]
        for samples in sorted_samples
        for start in range(0, len(samples), CHUNK_SAMPLES)
    ]
    loader = BatchLoader(
        Chunks(source, chunks),
        batch_size=None,
        num_workers=min(num_workers, len(chunks)),
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator().manual_seed(0),
    )
    total = sum(len(job.samples) for job in jobs)
    with progress_bar(total=total, unit="latent", desc="converting", disable=not jobs) as bar:
        read: Iterator[Any] = iter(loader)
        for job, samples in zip(jobs, sorted_samples, strict=True):
            parts = []
            for _ in range(0, len(samples), CHUNK_SAMPLES):
                parts.append(next(read))
                bar.update(len(parts[-1].labels))
            place = np.searchsorted(samples, job.samples)
            flips = None
            if source.has_flips:
                flips = torch.cat([part.flips for part in parts if part.flips is not None]).numpy()[place]
            yield write_shard(
                out,
                job.name,
                torch.cat([part.values for part in parts]).numpy()[place],
                torch.cat([part.labels for part in parts]).numpy()[place],
                job.key,
                flips=flips,
                has_posterior=source.has_posterior,
                precision=precision,
            )


def _finish(out: Path, shards: list[Shard], source: LatentSource, args: argparse.Namespace) -> None:
    """Remove what an earlier run left half-written, and write the index."""
    from .data.layouts.shards import SHARD_PATTERN, write_index

    current = {shard.file for shard in shards}
    for path in out.glob(f"{SHARD_PATTERN}*"):
        if path.name not in current:
            path.unlink()
    info = source.decode_info()
    write_index(
        out,
        shards,
        shape=list(source.shape),
        num_classes=source.num_classes,
        class_names=source.class_names,
        shift=info.shift.tolist(),
        scale=info.scale.tolist(),
        vae=None if info.vae is None else {"name": info.vae, "fingerprint": info.vae_fingerprint},
        has_flips=source.has_flips,
        has_posterior=source.has_posterior,
        has_labels=source.has_labels,
        precision=args.precision,
        converted_from={"data": str(Path(args.data).resolve()), "fingerprint": source.fingerprint()},
    )


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["convert-data", *sys.argv[1:]]))
