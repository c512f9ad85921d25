"""What SRA 2 costs a training step: the table of the paper's Table 5, measured here, variants interleaved.

    python benchmarks/step_time.py                       SiT-S/2 on a CPU (three minutes at most), SiT-XL/2 on a GPU
    python benchmarks/step_time.py --implementation eager --rows baseline,sra2-cosine --json results.jsonl

Rows: the SiT alone, SRA 2 with cosine and with smooth-L1, SRA (its teacher is the EMA copy that training keeps anyway)
and REPA (a DINOv2-B-sized encoder run on images every step). A row's GFLOPs are those of a whole training step of one
image; its MFU is those over the time and over the matrix-product rate measured in the same run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lib.energy import EnergyMeter
from lib.step_rows import DTYPES, ROWS, Setting, StepRow, add_setting_arguments, prepared, resolve_setting
from lib.timing import Timing, append_json_line, environment, interleave, paired_ratio, peak_memory_bytes
from peak import best_flop_per_s, step_products
from tqdm import tqdm

from sra2_fast.errors import InputError, must_be

WARMUP = 1
ROUNDS = (5, 20)  # on a CPU, on a GPU
ENERGY_SECONDS = 2.0


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="step_time", description="What SRA 2 costs a training step.")
    add_setting_arguments(parser, cpu_batch_size=4)
    parser.add_argument("--implementation", choices=("eager", "fused"), help="[fused where its kernels are there]")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"some of {','.join(ROWS)}")
    parser.add_argument("--plot", metavar="FILE", help="draw what --json FILE holds, as PNG or SVG")
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


def check_can_append(path: str, op: str = "step_time") -> None:
    """Raises InputError for a file that cannot be written, before minutes of measuring are lost to it."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        open(path, "a").close()
    except OSError as error:
        raise InputError(f"{op}: --json {path} cannot be written ({error.strerror}); name another file") from error


def measure(setting: Setting, rows: list[str], steps: int) -> list[dict[str, object]]:
    """Build, check and time the rows; one record a row, in order.

    Raises InputError for a model that cannot be built, RuntimeError where a step computes something wrong.
    """
    products = step_products(setting.config(), setting.batch_size, DTYPES[setting.precision], setting.device)
    total = len(rows) * (2 + WARMUP + steps)
    with tqdm(total=total, desc=f"{setting.model}, batch {setting.batch_size}", unit="step", leave=False) as bar:
        step_of: dict[str, StepRow] = {}
        peak_bytes: dict[str, int] = {}
        for row in rows:
            bar.set_postfix_str(f"{row}: build and check")
            step_of[row] = prepared(row, setting)
            bar.update()
            bar.set_postfix_str(f"{row}: memory")
            peak_bytes[row] = step_of[row].persistent_bytes() + peak_memory_bytes(step_of[row], setting.device)
            bar.update()
        losses: dict[str, torch.Tensor] = {}

        def after(row: str) -> None:
            bar.set_postfix_str(row)
            bar.update(row in rows)

        calls = {row: keeping_loss(row, step_of[row], losses) for row in rows}
        # The machine's product rate is measured among the steps: before or after them it may be another machine's.
        calls.update({name: product.call for name, product in products.items()})
        timings = interleave(calls, device=setting.device, rounds=steps, warmup=WARMUP, on_call=after)
        product_rate = best_flop_per_s(products, timings)
        bar.set_postfix_str("energy")
        joules = joules_per_image(setting, step_of)
    for row in rows:
        step_of[row].check_after(losses[row])
    where = environment(setting.device)
    return [
        record(step_of[row], timings[row], timings.get("baseline"), step_of.get("baseline"), product_rate)
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


def record(
    step: StepRow, timing: Timing, baseline: Timing | None, baseline_step: StepRow | None, product_rate: float
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
        "mfu": step.flops_per_image * images_per_s / product_rate,
        "product_tflop_per_s": product_rate * 1e-12,
    }


def overhead_percent(timing: Timing, baseline: Timing) -> float:
    """How much longer a step takes than the baseline's of the same round, in %, median over rounds."""
    return 100 * (paired_ratio(timing, baseline) - 1)


def table(records: list[dict[str, object]]) -> str:
    """The records for a terminal."""
    first = records[0]
    how = f"{first['implementation']}, {first['precision']}" + (", compiled" if first["compiled"] else "")
    head = f"{first['model']}, batch {first['batch_size']}, {how}, {first['device']}, commit {first['commit']}"
    rate = f"matrix products in this run: {first['product_tflop_per_s']:.3g} TFLOP/s"
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


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 with one line for input that cannot be used, 1 where a timed step was wrong."""
    args = parse_arguments(argv)
    try:
        setting, rows, steps = resolve(args)
        if args.json:
            check_can_append(args.json)
        records = measure(setting, rows, steps)
        for one in records if args.json else []:
            append_json_line(args.json, one)
        print(table(records))
        if args.plot:
            from plot import plot_step_time

            plot_step_time(args.json, args.plot)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(
            f"step_time: out of GPU memory ({str(error).splitlines()[0]}); try fewer --rows or a smaller --batch-size",
            file=sys.stderr,
        )
        return 2
    except RuntimeError as error:
        if not str(error).startswith("step_time:"):
            raise
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
