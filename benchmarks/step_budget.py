"""Where one training step goes: each part's FLOPs, bytes, operators, floor and time; the last line is the MFU.

    python benchmarks/step_budget.py --predict h200                  SiT-XL/2, batch 32, bf16; seconds, on any machine
    python benchmarks/step_budget.py --row sra2-cosine --predict h100 --json results.jsonl --plot budget.png
    python benchmarks/step_budget.py --device cpu                    SiT-S/2, measured here

The step is the one that trains, with the fused ops. Predicted, it runs on fake tensors, and every operator takes the
longer of its FLOPs at the GPU's product rate and its bytes at the GPU's bandwidth (results/peaks.json), attention the
rate that was published for it; launches that overlap nothing are counted apart. Measured, torch's profiler times the
operators of each part, and the step's own time is taken without it. What an operator's arguments and results hold is
read and written once: caches make that less, a kernel's second pass more. Left out: the eager implementation and a
compiled step, whose operators are not seen from here.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lib.budget import DEFAULT_ATTENTION, Peaks, Record, parts_of, predicted_ms, read_peaks, totals
from lib.ledger import MARK, Ledger, Operator, trace
from lib.outcome import check_can_write, exit_code
from lib.step_parts import ATTENTION_PARTS, PRODUCT_PARTS, REST
from lib.step_rows import DTYPES, ROWS, Setting, StepRow, add_attention_argument, resolve_setting
from lib.timing import append_json_line, commit, environment, interleave, without_profiler_chatter
from peak import best_flop_per_s, copy_bytes_per_s, step_products

from sra2_fast import backends
from sra2_fast.errors import InputError, must_be

OP = "step_budget"
GPUS = ("h100", "h200")
ROUNDS = (5, 20)  # on a CPU, on a GPU
PROFILED_STEPS = 3


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog=OP, description="Where one training step goes.")
    parser.add_argument("--model", help="registry name or 'D,depth,heads,patch' [SiT-XL/2; measured on a CPU SiT-S/2]")
    parser.add_argument("--batch-size", type=int, help="images a step [32; measured on a CPU 4]")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    add_attention_argument(parser)
    parser.add_argument("--row", default="baseline", help=f"one of {', '.join(ROWS)}")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--device", help="measure on cpu or cuda")
    where.add_argument("--predict", help=f"predict for {' or '.join(GPUS)} [h200, unless there is --device]")
    parser.add_argument("--steps", type=int, help="measured: timed rounds, one step each")
    parser.add_argument("--json", metavar="FILE", help="append the budget as a JSON line")
    parser.add_argument("--plot", metavar="FILE", help="draw what --json FILE holds, as PNG or SVG")
    parser.set_defaults(compile=False, graph=False, cpu_batch_size=4)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raises InputError naming the option."""
    if args.row not in ROWS:
        raise must_be(OP, "--row", f"one of {', '.join(ROWS)}", args.row)
    if args.predict is not None and args.predict not in GPUS:
        raise must_be(OP, "--predict", " or ".join(GPUS), args.predict)
    if args.plot and not args.json:
        raise InputError(f"{OP}: --plot draws what --json FILE holds; give both")
    if args.json:
        check_can_write(OP, "--json", args.json)


def predict(args: argparse.Namespace) -> Record:
    """The record of a predicted step. Raises InputError for a model that cannot be built."""
    gpu = args.predict or "h200"
    batch_size = 32 if args.batch_size is None else args.batch_size
    if batch_size < 1:
        raise must_be(OP, "--batch-size", "1 or more", batch_size)
    precision = "bf16" if args.precision == "auto" else args.precision
    name = DEFAULT_ATTENTION if args.attention == "auto" else args.attention
    peaks, sources = read_peaks(gpu, precision, name)
    setting = Setting(args.model or "SiT-XL/2", batch_size, precision, "fused", False, torch.device("cpu"), name)
    step, operators = trace(args.row, setting)
    record = budget(step, operators, peaks, predicted_ms(operators, peaks))
    launch_ms = 1e3 * peaks.launch_s * record["operators"]
    attention = (peaks.attention_forward_flop_per_s, peaks.attention_backward_flop_per_s)
    return {
        **record,
        "is_measured": False,
        "beside_ms": launch_ms,
        **whole(step, record["parts_ms"] + launch_ms, peaks),
        "attention_flop_per_s": attention,
        "launch_us": 1e6 * peaks.launch_s,
        "sources": sources,
        "commit": commit(),
        "device": peaks.name,
        "versions": backends.versions(),
    }


def measure(args: argparse.Namespace) -> Record:
    """The record of a step measured on this machine's device.

    Raises InputError for a missing device or kernel, RuntimeError where the step computes something wrong.
    """
    setting = resolve_setting(args, OP, "fused", ROUNDS)
    step = StepRow(args.row, setting)
    step.check()
    step.remember()
    ledger = Ledger(step, marks=True)
    with ledger:
        step()  # the optimizer's state is made, and what copies of weights live on
    products = step_products(setting.config(), setting.batch_size, DTYPES[setting.precision], setting.device)
    calls = {"step": step, **{name: product.call for name, product in products.items()}}
    timings = interleave(calls, device=setting.device, rounds=args.steps, warmup=1)
    flops = {name: product.flops for name, product in products.items()}
    # Where the step did more than the products, the machine can do as much, and an MFU stays below 1.
    rate = best_flop_per_s({**flops, "step": step.flops_per_image * setting.batch_size}, timings)
    peaks = Peaks(backends.device_name(setting.device), rate, copy_bytes_per_s(setting.device))
    ms_of = profile(step, ledger)
    record = budget(step, ledger.operators, peaks, ms_of)
    step.check_after(step())
    return {
        **record,
        "is_measured": True,
        "chosen": step.chosen,
        "beside_ms": timings["step"].ms_median - record["parts_ms"],
        **whole(step, timings["step"].ms_median, peaks),
        **timings["step"].quantiles(),
        **environment(setting.device),
    }


def profile(step: StepRow, ledger: Ledger) -> dict[str, float]:
    """{part: ms} of a step: a CPU's time, or that of a GPU's kernels; a mean of some steps, the last in `ledger`.

    The profiler knows an operator's part by the mark around it, under which the operator's own calls and kernels stand.
    """
    on_gpu = step.setting.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with without_profiler_chatter(), torch.profiler.profile(activities=activities) as profiled:
        for _ in range(PROFILED_STEPS):
            ledger.operators.clear()
            with ledger:
                step()
        if on_gpu:
            torch.cuda.synchronize()
    taken_ms = marked_ms(profiled.events(), on_gpu)
    return {one.part: taken_ms.get(one.part, 0.0) / PROFILED_STEPS for one in ledger.operators}


def marked_ms(events: Iterable[Any], on_gpu: bool) -> dict[str, float]:
    """{part: ms} of all of a profile's marks: of the kernels launched under them, or else of the CPU.

    A profile with a GPU has every mark a second time, as a range on the GPU: that one would count its kernels twice.
    """
    ms_of: dict[str, float] = {}
    for event in events:
        if event.name.startswith(MARK) and event.device_type == torch.autograd.DeviceType.CPU:
            part = event.name.removeprefix(MARK)
            taken_us = event.device_time_total if on_gpu else event.cpu_time_total
            ms_of[part] = ms_of.get(part, 0.0) + taken_us * 1e-3
    return ms_of


def budget(step: StepRow, operators: Sequence[Operator], peaks: Peaks, ms_of: dict[str, float]) -> Record:
    """What a predicted and a measured record have in common: `parts`, each with its `ms`, and their sums."""
    parts = parts_of(operators, peaks)
    for part, one in parts.items():
        one["ms"] = ms_of[part]
    return {
        "bench": OP,
        **step.about(),
        "parts": parts,
        **totals(parts),
        "parts_ms": sum(ms_of.values()),
        "product_flop_per_s": peaks.flop_per_s,
        "copy_bytes_per_s": peaks.bytes_per_s,
    }


def whole(step: StepRow, ms: float, peaks: Peaks) -> Record:
    """The step's time and its MFU: the FLOPs that everybody counts (counting.py) over the time and the product rate."""
    flops = step.flops_per_image * step.setting.batch_size
    return {"ms": ms, "model_flops": flops, "mfu": flops / (ms * 1e-3) / peaks.flop_per_s}


def table(record: Record) -> str:
    """The record for a terminal; every figure is a sum of the lines above it, or says what it is made of."""
    is_measured = record["is_measured"]
    how = "measured on" if is_measured else "predicted for"
    head = (
        f"{record['row']}, {record['model']}, batch {record['batch_size']}, {record['implementation']}, "
        f"{record['precision']}, {how} {record['device']}, commit {record['commit']}"
    )
    time_name = "measured ms" if is_measured else "predicted ms"
    cells = [["part", "GFLOP", "GB", "operators", "floor ms", time_name, "share"]]
    line = functools.partial(_line, whole_ms=record["ms"])
    for title, group in (("products", PRODUCT_PARTS), ("attention", ATTENTION_PARTS), ("outside both", REST)):
        members = {part: one for part, one in record["parts"].items() if part in group}
        cells += [line(f"  {part}", one) for part, one in members.items()]
        keys = ("flops", "bytes", "operators", "floor_ms", "ms")
        cells.append(line(title, {key: sum(one[key] for one in members.values()) for key in keys}))
    beside = "between operators" if is_measured else "launches"
    cells.append([beside, "", "", "", "", *_time(record["beside_ms"], record["ms"])])
    cells.append(line("step", record))
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        (
            row[0].ljust(widths[0]) + "".join("  " + c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([head, "", *lines, "", *notes(record)])


def notes(record: Record) -> list[str]:
    """How the figures came about; the last line is the MFU."""
    rate, bandwidth = record["product_flop_per_s"] * 1e-12, record["copy_bytes_per_s"] * 1e-12
    operators, mfu = record["operators"], f"MFU {100 * record['mfu']:.1f} %"
    made_of = f"{record['model_flops'] * 1e-12:.4g} TFLOP in {record['ms']:.4g} ms at {rate:.4g} TFLOP/s"
    floor = f"floor: every operator the longer of its FLOPs at {rate:.4g} TFLOP/s and its bytes at {bandwidth:.3g} TB/s"
    other = f"other: {100 * record['other_share']:.2f} % of the bytes outside products and attention"
    if record["is_measured"]:
        parts = (
            f"parts: the profiler's time of their {operators:,} operators; between them: Python and autograd, "
            "less than nothing where the profiled steps ran slower than the step"
        )
        return [floor, parts, other, *record["chosen"], f"{mfu} (measured on {record['device']}: {made_of})"]
    forward, backward = (rate * 1e-12 for rate in record["attention_flop_per_s"])
    return [
        floor,
        f"attention: {_which(record['attention'])}",
        f"its rate: {forward:.3g} and {backward:.3g} TFLOP/s of what its kernel executes, forward and backward, "
        f"{forward / rate:.2f} and {backward / rate:.2f} of the product rate",
        f"launches: {operators:,} operators, {record['launch_us']:.2g} us each that overlaps nothing",
        other,
        *(f"source of {what}: {source}" for what, source in record["sources"].items()),
        f"{mfu} (predicted for {record['device']}: {made_of})",
    ]


def _which(attention: str) -> str:
    """The backend that a prediction is for, and where it is the one that runs."""
    if attention != DEFAULT_ATTENTION:
        return f"{attention} (--attention)"
    return f"{attention} (what runs where flash-attn is not installed; --attention flash-attn: where it is)"


def _line(name: str, one: Any, whole_ms: float) -> list[str]:
    counts = [f"{one['flops'] * 1e-9:,.1f}", f"{one['bytes'] * 1e-9:.2f}", f"{one['operators']:,}"]
    return [name, *counts, f"{one['floor_ms']:.2f}", *_time(one["ms"], whole_ms)]


def _time(ms: float, whole_ms: float) -> list[str]:
    return [f"{ms:.2f}", f"{100 * ms / whole_ms:.1f} %"]


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 with one line for input that cannot be used, 1 where the step was wrong."""
    args = parse_arguments(argv)
    return exit_code(OP, "--batch-size", lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Check, count, print. Raises InputError naming the option."""
    check(args)
    record = measure(args) if args.device else predict(args)
    if args.json:
        append_json_line(args.json, record)
    if args.plot:
        from plot import plot_step_budget

        plot_step_budget(args.json, args.plot)
    print(table(record))


if __name__ == "__main__":
    sys.exit(main())
