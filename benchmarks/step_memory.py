"""Peak memory and throughput of a training step by batch, up to the batch that no longer fits.

    python benchmarks/step_memory.py --batches 8,16,32,64 [--implementation eager] [--json FILE]

The peak counts what lives between steps (weights, averages, moments, batches) and the most that a step takes on top.
Batches are built one after another, each freed before the next; the first that does not fit ends the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
from collections.abc import Iterator

import torch
from lib.doing import Doing
from lib.outcome import check_can_write, exit_code
from lib.step_rows import ROWS, Setting, add_setting_arguments, prepared, resolve_setting, ways_to_be_faster
from lib.timing import append_json_line, environment, interleave

from sra2_fast.errors import is_out_of_memory, must_be

OP = "step_memory"
ROUNDS = (1, 5)  # on a CPU, on a GPU


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for input that cannot be used, 1 where a step was wrong."""
    parser = argparse.ArgumentParser(prog=OP, description="Peak memory of a training step by batch.")
    add_setting_arguments(parser, cpu_batch_size=1)
    parser.add_argument("--batches", default="1,2,4,8", metavar="N,N", help="images a step, in turn [%(default)s]")
    parser.add_argument("--row", choices=ROWS, default="sra2-cosine", help="[%(default)s]")
    parser.add_argument("--implementation", choices=("eager", "fused"), help="[fused where its kernels are there]")
    args = parser.parse_args(argv)
    return exit_code(OP, "--batches", lambda: run(args))


def batches_of(text: str) -> list[int]:
    """The batch sizes, ascending. Raises InputError naming the option."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise must_be(OP, "--batches", "whole numbers above 0, such as 8,16,32", repr(text))
    return sorted(map(int, words))


def measured(row: str, setting: Setting, rounds: int, doing: Doing) -> dict[str, object]:
    """The figures of one batch size, or `is_out_of_memory`; nothing of the step is left."""
    try:
        step, peak_bytes = prepared(row, setting, doing)
        timing = interleave({"step": step}, device=setting.device, rounds=rounds, warmup=1)["step"]
        step.check_after(step())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {"is_out_of_memory": True}
    images_per_s = setting.batch_size / timing.ms_median * 1e3
    figures = {"peak_memory_bytes": peak_bytes, "persistent_bytes": step.persistent_bytes()}
    return {"is_out_of_memory": False, **figures, "images_per_s_here": images_per_s, **timing.quantiles()}


def records(args: argparse.Namespace, setting: Setting, batches: list[int]) -> Iterator[dict[str, object]]:
    """One record a batch size, until one does not fit."""
    with Doing(OP, args.row, len(batches), ways_to_be_faster(setting)) as doing:
        for batch_size in batches:
            one = dataclasses.replace(setting, batch_size=batch_size)
            figures = measured(args.row, one, args.steps, doing)
            doing.bar.update()
            gc.collect()
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()
            about = dataclasses.asdict(one) | {"device": None, "row": args.row}
            yield {"bench": OP, **about, **figures, **environment(setting.device)}
            if figures["is_out_of_memory"]:
                return


def run(args: argparse.Namespace) -> None:
    """Measure, print and record every batch. Raises InputError naming the option."""
    batches = batches_of(args.batches)
    args.batch_size = batches[0]
    setting = resolve_setting(args, OP, args.implementation, ROUNDS)
    if args.json:
        check_can_write(OP, "--json", args.json)
    print(f"{setting.model}, {args.row}, {setting.implementation}, {setting.precision}")
    print(f"{'batch':>6}{'peak GiB':>10}{'between steps':>15}{'MiB an image':>14}{'img/s':>9}")
    for one in records(args, setting, batches):
        if args.json:
            append_json_line(args.json, one)
        if one["is_out_of_memory"]:
            print(f"{one['batch_size']:>6}  does not fit")
            continue
        peak, kept = int(str(one["peak_memory_bytes"])), int(str(one["persistent_bytes"]))
        batch = int(str(one["batch_size"]))
        an_image = (peak - kept) / batch
        line = f"{batch:>6}{peak / 2**30:>10.2f}{kept / 2**30:>15.2f}{an_image / 2**20:>14.1f}"
        print(f"{line}{one['images_per_s_here']:>9.1f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
