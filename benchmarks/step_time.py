"""What SRA 2 costs a training step: the table of the paper's Table 5, measured here, variants interleaved.

    python benchmarks/step_time.py                       SiT-S/2 on a CPU (three minutes at most), SiT-XL/2 on a GPU
    python benchmarks/step_time.py --implementation eager --rows baseline,sra2-cosine --json results.jsonl

Rows: the SiT alone, SRA 2 with cosine and with smooth-L1, SRA (its teacher is the EMA copy that training keeps anyway)
and REPA (a DINOv2-B-sized encoder run on images every step). A row's GFLOPs are those of a whole training step of one
image; its MFU is those over the time and over the highest rate measured in the same run, of products or of a step.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping

import torch
from lib.doing import Doing
from lib.energy import EnergyMeter
from lib.outcome import check_can_write, exit_code
from lib.step_rows import (
    DTYPES,
    ROWS,
    Setting,
    StepRow,
    add_setting_arguments,
    prepared,
    resolve_setting,
    ways_to_be_faster,
)
from lib.timing import Timing, append_json_line, environment, interleave, paired_ratio
from peak import Product, best_flop_per_s, step_products
from plot import check_can_plot, plot_step_time

from sra2_fast.errors import InputError, must_be

WARMUP = {"cpu": 0, "cuda": 1}  # rounds; every row has run three steps before, and a CPU has no clocks to bring up
ROUNDS = (5, 20)  # on a CPU, on a GPU
ENERGY_SECONDS = 2.0


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="step_time", description="What SRA 2 costs a training step.")
    add_setting_arguments(parser, cpu_batch_size=4)
    parser.add_argument("--implementation", choices=("eager", "fused"), help="[fused where its kernels are there]")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"some of {','.join(ROWS)}")
    parser.add_argument("--plot", metavar="FILE", help="draw what --json FILE holds, as PNG, SVG or PDF")
    return parser.parse_args(argv)


def resolve(args: argparse.Namespace) -> tuple[Setting, list[str], int]:
    """(setting, rows, steps) with every default filled in. Raises InputError naming the option."""
    rows = [row.strip() for row in args.rows.split(",") if row.strip()]
    unknown = [row for row in rows if row not in ROWS]
    if unknown or not rows:
        raise must_be("step_time", "--rows", f"some of {','.join(ROWS)}", unknown[0] if unknown else repr(args.rows))
    if args.plot and not args.json:
        raise InputError("step_time: --plot draws what --json FILE holds; give both")
    setting = resolve_setting(args, "step_time", args.implementation, ROUNDS)
    return setting, list(dict.fromkeys(rows)), args.steps


def measure(setting: Setting, rows: list[str], steps: int) -> list[dict[str, object]]:
    """Build, check and time the rows; one record a row, in order.

    Raises InputError for a model that cannot be built, WrongStep where a step computes something wrong.
    """
    warmup = WARMUP[setting.device.type]
    products = step_products(setting.config(), setting.batch_size, DTYPES[setting.precision], setting.device)
    total = len(rows) * (1 + warmup + steps)
    title = f"{setting.model}, batch {setting.batch_size}"
    with Doing("step_time", title, total, ways_to_be_faster(setting)) as doing:
        step_of: dict[str, StepRow] = {}
        peak_bytes: dict[str, int] = {}
        for row in rows:
            step_of[row], peak_bytes[row] = prepared(row, setting, doing)
            doing.bar.update()
        losses: dict[str, torch.Tensor] = {}
        calls = {row: keeping_loss(row, step_of[row], losses) for row in rows}
        # The machine's product rate is measured among the steps: before or after them it may be another machine's.
        calls.update({name: product.call for name, product in products.items()})
        after = doing.rounds(tuple(calls), warmup, steps, counted=rows)
        timings = interleave(calls, device=setting.device, rounds=steps, warmup=warmup, on_call=after)
        doing("energy")
        joules = joules_per_image(setting, step_of)
    for row in rows:
        step_of[row].check_after(losses[row])
    rates = measured_rates(step_of, products, timings)
    where = environment(setting.device)
    return [
        record(step_of[row], timings[row], timings.get("baseline"), step_of.get("baseline"), rates)
        | {"peak_memory_bytes": peak_bytes[row], "joules_per_image": joules.get(row), "steps": steps}
        | {"loss": float(losses[row]), **where}
        for row in rows
    ]


def keeping_loss(row: str, step: StepRow, losses: dict[str, torch.Tensor]) -> Callable[[], object]:
    """The step, its last loss left in `losses` for the check afterwards."""

    def call() -> None:
        losses[row] = step()

    return call


def joules_per_image(setting: Setting, step_of: dict[str, StepRow]) -> dict[str, float]:
    """Energy of the GPU a training image, every row alone for about two seconds; empty on a CPU or without NVML."""
    meter = EnergyMeter.of(setting.device)
    if meter is None:
        return {}
    found = {}
    for row, step in step_of.items():
        torch.cuda.synchronize()
        begin, start, taken = time.perf_counter(), meter.joules(), 0
        while time.perf_counter() - begin < ENERGY_SECONDS:
            for _ in range(4):
                step()
            torch.cuda.synchronize()
            taken += 4
        found[row] = (meter.joules() - start) / (taken * setting.batch_size)
    return found


def measured_rates(
    step_of: Mapping[str, StepRow], products: Mapping[str, Product], timings: Mapping[str, Timing]
) -> dict[str, float]:
    """FLOP/s of the fastest product, and of the fastest step: where that is higher (in tiny models), it is the better
    measure of the machine, and with it no MFU is above 1."""
    flops = {name: product.flops for name, product in products.items()}
    step_flops = {row: step.flops_per_image * step.setting.batch_size for row, step in step_of.items()}
    return {"product": best_flop_per_s(flops, timings), "step": best_flop_per_s(step_flops, timings)}


def record(
    step: StepRow,
    timing: Timing,
    baseline: Timing | None,
    baseline_step: StepRow | None,
    rates: Mapping[str, float],
) -> dict[str, object]:
    """The figures of one row; overhead and GFLOP share are None where the baseline was not measured."""
    setting = step.setting
    images_per_s = setting.batch_size / timing.ms_median * 1e3
    return {
        **step.about(),
        **timing.quantiles(),
        "images_per_s": images_per_s,
        "overhead_percent": overhead_percent(timing, baseline) if baseline is not None else None,
        "gflop_per_image": step.flops_per_image * 1e-9,
        "gflop_extra_percent": 100 * (step.flops_per_image / baseline_step.flops_per_image - 1)
        if baseline_step is not None
        else None,
        "params_head": step.params_head,
        "params_external": step.params_external,
        "mfu": step.flops_per_image * images_per_s / max(rates.values()),
        "product_tflop_per_s": rates["product"] * 1e-12,
        "best_step_tflop_per_s": rates["step"] * 1e-12,
    }


def overhead_percent(timing: Timing, baseline: Timing) -> float:
    """How much longer a step takes than the baseline's of the same round, in %, median over rounds."""
    return 100 * (paired_ratio(timing, baseline) - 1)


def table(records: list[dict[str, object]]) -> str:
    """The records for a terminal."""
    first = records[0]
    ways = [way for way in ("compiled", "captured") if first[way]]
    how = ", ".join([str(first["implementation"]), str(first["precision"]), *ways])
    head = f"{first['model']}, batch {first['batch_size']}, {how}, {first['device']}, commit {first['commit']}"
    rate = f"matrix products in this run: {first['product_tflop_per_s']:.3g} TFLOP/s"
    if first["best_step_tflop_per_s"] > first["product_tflop_per_s"]:  # type: ignore[operator]
        rate += f"; the fastest step did more, so MFU is a share of its {first['best_step_tflop_per_s']:.3g}"
    columns = (
        "row",
        "ext + head M",
        "GFLOP/img",
        "extra",
        "ms a step",
        "20-80 %",
        "img/s",
        "overhead",
        "peak GiB",
        "MFU",
    )
    has_energy = any(one["joules_per_image"] is not None for one in records)
    cells = [[*columns, "J/img"] if has_energy else list(columns)]
    for one in records:
        line = [
            str(one["row"]),
            f"{one['params_external'] / 1e6:.1f} + {one['params_head'] / 1e6:.1f}",  # type: ignore[operator]
            f"{one['gflop_per_image']:.1f}",
            _percent(one["gflop_extra_percent"]),
            f"{one['ms_median']:.1f}",
            f"{one['ms_p20']:.1f}-{one['ms_p80']:.1f}",
            f"{one['images_per_s']:.1f}",
            _percent(one["overhead_percent"]),
            f"{one['peak_memory_bytes'] / 2**30:.2f}",  # type: ignore[operator]
            f"{100 * one['mfu']:.0f} %",  # type: ignore[operator]
        ]
        if has_energy:
            line.append("-" if one["joules_per_image"] is None else f"{one['joules_per_image']:.2f}")
        cells.append(line)
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        line[0].ljust(widths[0]) + "".join("  " + c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))
        for line in cells
    ]
    return "\n".join([head, rate, "", *lines])


def _percent(value: object) -> str:
    return "-" if value is None else f"{value:+.1f} %"


def run(args: argparse.Namespace) -> None:
    """Measure, record, print, draw."""
    setting, rows, steps = resolve(args)
    if args.json:
        check_can_write("step_time", "--json", args.json)
    if args.plot:
        check_can_plot("step_time", "--plot", args.plot)
    records = measure(setting, rows, steps)
    for one in records if args.json else []:
        append_json_line(args.json, one)
    print(table(records))
    if args.plot:
        plot_step_time(args.json, args.plot)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 with one line for input that cannot be used, 1 where a timed step was wrong."""
    args = parse_arguments(argv)
    return exit_code("step_time", "--batch-size, or have fewer --rows", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
