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
from lib.step_rows import PRECISIONS, ROWS, Setting, TrainingStep, check_setting
from lib.timing import Timing, append_json_line, environment, interleave, paired_ratio, peak_memory_bytes
from peak import product_flop_per_s
from tqdm import tqdm

from sra2_fast import backends
from sra2_fast.errors import InputError, must_be

WARMUP = 1
ENERGY_SECONDS = 2.0
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="step_time", description="What SRA 2 costs a training step.")
    parser.add_argument("--model", help="registry name or 'D,depth,heads,patch' [SiT-S/2; on a GPU SiT-XL/2]")
    parser.add_argument("--batch-size", type=int, help="images a step [4; on a GPU 32]")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    parser.add_argument("--implementation", choices=("eager", "fused"), help="[fused where its kernels are there]")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
    parser.add_argument("--device", help="cpu or cuda [cuda where there is one]")
    parser.add_argument("--steps", type=int, help="timed rounds, one step of every row each [5; on a GPU 20]")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"some of {','.join(ROWS)}")
    parser.add_argument("--json", metavar="FILE", help="append one JSON object a row")
    parser.add_argument("--plot", metavar="FILE", help="draw what --json FILE holds, as PNG or SVG")
    return parser.parse_args(argv)


def resolve(args: argparse.Namespace) -> tuple[Setting, list[str], int]:
    """(setting, rows, steps) with every default filled in. Raises InputError naming the option."""
    has_gpu = torch.cuda.is_available()
    name = args.device or ("cuda" if has_gpu else "cpu")
    if name not in ("cpu", "cuda"):
        raise must_be("step_time", "--device", "cpu or cuda", name)
    device = torch.device(name)
    if device.type == "cuda" and not has_gpu:
        raise InputError("step_time: --device cuda: torch sees no GPU here; leave the option out or use cpu")
    on_gpu = device.type == "cuda"
    rows = [row.strip() for row in args.rows.split(",") if row.strip()]
    unknown = [row for row in rows if row not in ROWS]
    if unknown or not rows:
        raise must_be("step_time", "--rows", f"some of {','.join(ROWS)}", unknown[0] if unknown else repr(args.rows))
    batch_size = (32 if on_gpu else 4) if args.batch_size is None else args.batch_size
    steps = (20 if on_gpu else 5) if args.steps is None else args.steps
    for option, value in (("--batch-size", batch_size), ("--steps", steps)):
        if value < 1:
            raise must_be("step_time", option, "1 or more", value)
    if args.plot and not args.json:
        raise InputError("step_time: --plot draws what --json FILE holds; give both")
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if backends.is_bf16_fast(device) else "fp32"
    model = args.model or ("SiT-XL/2" if on_gpu else "SiT-S/2")
    implementation = chosen_implementation(args.implementation, device)
    setting = Setting(model, batch_size, precision, implementation, args.compile, device)
    check_setting(setting)
    return setting, list(dict.fromkeys(rows)), steps


def check_can_append(path: str) -> None:
    """Raises InputError for a file that cannot be written, before minutes of measuring are lost to it."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        open(path, "a").close()
    except OSError as error:
        raise InputError(f"step_time: --json {path} cannot be written ({error.strerror}); name another file") from error


def chosen_implementation(asked: str | None, device: torch.device) -> str:
    """`fused` where its kernels are there, else `eager`, with a line that says so.

    Raises InputError where `fused` was asked for and is not there.
    """
    if device.type == "cuda":
        is_there, what, found = backends.cuda_kernels() is not None, "Triton", backends.status()["triton"]
    else:
        is_there, what, found = backends.has_extension("cpu"), "the extension", backends.status()["cpu_extension"]
    if is_there or asked == "eager":
        return asked or "fused"
    if asked == "fused":
        raise InputError(f"step_time: --implementation fused on {device.type} needs {what}: {found}; use eager")
    print(f"step_time: {what}: {found}; measuring --implementation eager", file=sys.stderr)
    return "eager"


def measure(setting: Setting, rows: list[str], steps: int) -> list[dict[str, object]]:
    """Build, check and time the rows; one record a row, in order.

    Raises InputError for a model that cannot be built, RuntimeError where a step computes something wrong.
    """
    if setting.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    total = len(rows) * (2 + WARMUP + steps) + 1
    with tqdm(total=total, desc=f"{setting.model}, batch {setting.batch_size}", unit="step", leave=False) as bar:
        product_rate = product_flop_per_s(setting.device, DTYPES[setting.precision])
        bar.update()
        step_of: dict[str, TrainingStep] = {}
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
            bar.update()

        calls = {row: keeping_loss(row, step_of[row], losses) for row in rows}
        timings = interleave(calls, device=setting.device, rounds=steps, warmup=WARMUP, on_call=after)
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


def prepared(row: str, setting: Setting) -> TrainingStep:
    """The row, checked, after a first step: compiled, its optimizer's state there."""
    step = TrainingStep(row, setting)
    step.check()
    step.remember()
    step()
    return step


def keeping_loss(row: str, step: TrainingStep, losses: dict[str, torch.Tensor]) -> Callable[[], object]:
    """The step, its last loss left in `losses` for the check afterwards."""

    def call() -> None:
        losses[row] = step()

    return call


def joules_per_image(setting: Setting, step_of: dict[str, TrainingStep]) -> dict[str, float]:
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
    step: TrainingStep, timing: Timing, baseline: Timing | None, baseline_step: TrainingStep | None, product_rate: float
) -> dict[str, object]:
    """The figures of one row; overhead and GFLOP share are None where the baseline was not measured."""
    setting = step.setting
    images_per_s = setting.batch_size / timing.ms_median * 1e3
    return {
        "row": step.row,
        "model": setting.model,
        "batch_size": setting.batch_size,
        "implementation": setting.implementation,
        "precision": setting.precision,
        "compiled": setting.is_compiled,
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
