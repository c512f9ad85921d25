"""Latents a second from every layout that `--data` reads: what one worker reads, warm and cold, and whole batches.

    python benchmarks/data_throughput.py [--samples 8192] [--rounds 3] [--layouts shards] [--dir DISK] [--json FILE]

Columns, in latents/s, medians over the rounds with 20 and 80 % quantiles; all layouts take turns in every round:

    warm      one process reads normalised latents in the loader's order, everything in the page cache
    cold      the same with the files out of the page cache; left out where the system keeps them (a RAM disk)
    batches   one worker process makes whole batches, which draws the noise too; warm

Cold is proved by the bytes that the process read from the device. A cold figure needs files larger than what the device
keeps itself; directory entries stay in memory, which helps layouts of many files.
"""

from __future__ import annotations

import argparse
import gc
import os
import pickle
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from lib.data_sets import LAYOUTS, draw
from lib.doing import Doing
from lib.outcome import WrongStep, check_can_write, exit_code
from lib.timing import append_json_line, environment, quantile

from sra2_fast.data import LatentSource, make_loader, open_data
from sra2_fast.data.loader import ReadAhead
from sra2_fast.data.shuffle import EndlessShuffle
from sra2_fast.errors import InputError, must_be

BATCH_SIZE = 256
TARGET_WARM, TARGET_COLD_RATIO = 10_000, 10
LEAST_READ_SHARE = 0.8  # of a layout's bytes, for a pass to count as cold


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for input that cannot be used, 1 where what was read is wrong."""
    parser = argparse.ArgumentParser(prog="data_throughput", description="Latents a second from every layout.")
    parser.add_argument("--samples", type=int, default=8192, help="latents in every layout [%(default)s: 268 MB each]")
    parser.add_argument("--rounds", type=int, default=3, help="passes over every layout [%(default)s]")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="[all]")
    parser.add_argument("--dir", help="where the data are written, on the disk to be measured [the temporary folder]")
    parser.add_argument("--json", help="append a JSON line for every layout to this file")
    args = parser.parse_args(argv)
    return exit_code("data_throughput", "--samples", lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Write the data, check and time every layout, print the table and how it stands to the targets."""
    for option, least in (("samples", BATCH_SIZE), ("rounds", 1)):
        if getattr(args, option) < least:
            raise must_be("data_throughput", f"--{option}", f"{least} or more", getattr(args, option))
    if args.dir and not os.path.isdir(args.dir):
        raise InputError(f"data_throughput: --dir {args.dir} is no folder; name one on the disk to be measured")
    if args.json:
        check_can_write("data_throughput", "--json", args.json)
    rates: dict[str, dict[str, list[float]]] = {name: {} for name in args.layouts}
    total = len(args.layouts) * (1 + 3 * args.rounds)
    with (
        tempfile.TemporaryDirectory(prefix="data_throughput-", dir=args.dir) as folder,
        Doing("data_throughput", "layouts", total, "--samples or --layouts") as doing,
    ):
        sources = {}
        moments, labels = draw(args.samples)
        for name in args.layouts:
            doing(f"{name}: writing")
            path = LAYOUTS[name](Path(folder) / name.replace(" ", "-"), moments, labels)
            sources[name] = pickle.dumps(_checked(name, open_data(path), moments, labels))
            doing.bar.update()
        del moments
        size = {name: _evict(Path(folder) / name.replace(" ", "-")) for name in args.layouts}
        for round_number in range(args.rounds):
            for name in args.layouts:
                for kind, measure in (("cold", _pass), ("warm", _pass), ("batches", _batches)):
                    doing(f"{name}: {kind}, round {round_number + 1} of {args.rounds}")
                    gc.collect()  # maps that are still open keep their pages in memory
                    if kind == "cold":
                        _evict(Path(folder) / name.replace(" ", "-"))
                    before = _bytes_read()
                    rate = measure(pickle.loads(sources[name]), args.samples)
                    if kind != "cold" or _bytes_read() - before >= LEAST_READ_SHARE * size[name]:
                        rates[name].setdefault(kind, []).append(rate)
                    doing.bar.update()
    _print(args, rates)


def _checked(name: str, source: LatentSource, moments: np.ndarray, labels: np.ndarray) -> LatentSource:
    """The source, once it was seen to give the latents that were written."""
    chosen = source.evenly_spaced(64)
    values, found = source.read(chosen)
    want = moments[chosen].reshape(values.shape) if values.shape[1] != 4 else moments[chosen, :4]
    allowed = 2.0**-8 if "bfloat16" in name else 4 * 2.0**-24
    if not np.allclose(values, want, rtol=allowed, atol=1e-6) or (
        source.has_labels and (found != labels[chosen]).any()
    ):
        raise WrongStep(f"{name} does not give the latents that were written")
    return source


def _pass(source: LatentSource, samples: int) -> float:
    """Latents/s of one process that reads and normalises a whole epoch, in the loader's order and batches."""
    shuffle = EndlessShuffle(source.num_samples, 0, source.block_size)
    shuffle.take(0, 1)  # the order itself is made once an epoch
    flipped = np.arange(BATCH_SIZE) % 2 == 0
    read_ahead = ReadAhead(source, shuffle)
    begin = time.perf_counter()
    for first in range(0, samples - BATCH_SIZE + 1, BATCH_SIZE):
        read_ahead(first)
        indices = shuffle.take(first, BATCH_SIZE)
        values, _ = source.read_flipped(indices, flipped) if source.has_flips else source.read(indices)
        source.check_finite(values, indices)
        source.latents(values)
    return samples // BATCH_SIZE * BATCH_SIZE / (time.perf_counter() - begin)


def _batches(source: LatentSource, samples: int) -> float:
    """Latents/s of a loader with one worker, from its first batch on."""
    loader = make_loader(source, batch_size=BATCH_SIZE, seed=0, num_steps=samples // BATCH_SIZE, num_workers=1)
    batches = iter(loader)
    next(batches)  # starting the process is not reading
    begin, count = time.perf_counter(), 0
    for batch in batches:
        count += len(batch.labels)
    return count / max(time.perf_counter() - begin, 1e-9) if count else float("nan")


def _evict(folder: Path) -> int:
    """Ask the system to drop the files of `folder` from its page cache; returns their bytes."""
    total = 0
    os.sync()  # what is not on the disk yet cannot be dropped
    for path in folder.rglob("*"):
        if path.is_file():
            total += path.stat().st_size
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
    return total


def _bytes_read() -> int:
    """Bytes that this process had read from block devices so far."""
    text = Path("/proc/self/io").read_text()
    return int(text.split("read_bytes:")[1].split()[0])


def _print(args: argparse.Namespace, rates: dict[str, dict[str, list[float]]]) -> None:
    where = environment("cpu")
    print(f"{args.samples} latents, batches of {BATCH_SIZE}, {where['device']}, commit {where['commit']}; latents/s")
    print(f"  {'layout':<16}" + "".join(f"{kind:>26}" for kind in ("warm", "cold", "batches")))
    for name, kinds in rates.items():
        print(f"  {name:<16}" + "".join(f"{_shown(kinds.get(kind)):>26}" for kind in ("warm", "cold", "batches")))
        if args.json:
            figures = {
                kind: {"median": quantile(one, 0.5), "p20": quantile(one, 0.2), "p80": quantile(one, 0.8)}
                for kind, one in kinds.items()
            }
            append_json_line(args.json, {"layout": name, "samples": args.samples, "latents_per_s": figures, **where})
    if "shards" in rates:
        _say("one worker, warm shards", rates["shards"].get("warm"), TARGET_WARM, "latents/s")
    if "shards" in rates and "vae-sd" in rates:
        ours, files = (rates[name].get("cold", []) for name in ("shards", "vae-sd"))
        ratios = [a / b for a, b in zip(ours, files, strict=False)]
        _say("cold, shards against files of 32 KB", ratios, TARGET_COLD_RATIO, "x")


def _shown(rates: list[float] | None) -> str:
    if not rates:
        return "not measured"
    return f"{quantile(rates, 0.5):,.0f} ({quantile(rates, 0.2):,.0f}-{quantile(rates, 0.8):,.0f})"


def _say(what: str, figures: list[float] | None, target: float, unit: str) -> None:
    if figures:
        median = quantile(figures, 0.5)
        print(f"  {what}: {median:,.1f} {unit}, target {target:,} {'met' if median >= target else 'not met'}")
    else:
        print(f"  {what}: not measured")


if __name__ == "__main__":
    sys.exit(main())
