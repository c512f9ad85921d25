"""How much faster a training step is with our ops than in the public style: eager and fused in one interleaved run.

    python benchmarks/fused_speedup.py [--model SiT-S/2] [--batch-size 8] [--row sra2-cosine] [--compile] [--json FILE]

`step_time.py` compares methods within one implementation; two of its runs minutes apart do not compare on a machine
whose speed drifts, so the ratio of implementations has its own run. Both train the same weights on the same batches.
"""

from __future__ import annotations

import argparse
import sys

import torch
from lib.step_rows import PRECISIONS, ROWS, Setting, TrainingStep, check_setting
from lib.timing import append_json_line, environment, interleave, paired_ratio, peak_memory_bytes
from step_time import chosen_implementation, keeping_loss, prepared

from sra2_fast import backends
from sra2_fast.errors import InputError, must_be

IMPLEMENTATIONS = ("eager", "fused")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for input that cannot be used."""
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="fused_speedup", description="A training step, fused against eager.")
    parser.add_argument("--model", default="SiT-XL/2" if has_gpu else "SiT-S/2", help="[%(default)s]")
    parser.add_argument("--batch-size", type=int, default=32 if has_gpu else 8, help="[%(default)s]")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    parser.add_argument("--row", choices=ROWS, default="sra2-cosine", help="[%(default)s]")
    parser.add_argument("--compile", action="store_true", help="torch.compile both")
    parser.add_argument("--steps", type=int, default=20 if has_gpu else 8, help="timed rounds [%(default)s]")
    parser.add_argument("--json", metavar="FILE", help="append one JSON object an implementation")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if has_gpu else "cpu")
    try:
        for option, value in (("--batch-size", args.batch_size), ("--steps", args.steps)):
            if value < 1:
                raise must_be("fused_speedup", option, "1 or more", value)
        chosen_implementation("fused", device)
        measure(args, device)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def measure(args: argparse.Namespace, device: torch.device) -> None:
    """Check both steps, time them in turn, print the ratio."""
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if backends.is_bf16_fast(device) else "fp32"
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    steps: dict[str, TrainingStep] = {}
    peak_bytes = {}
    for name in IMPLEMENTATIONS:
        setting = Setting(args.model, args.batch_size, precision, name, args.compile, device)
        check_setting(setting)
        steps[name] = prepared(args.row, setting)
        peak_bytes[name] = steps[name].persistent_bytes() + peak_memory_bytes(steps[name], device)
    losses: dict[str, torch.Tensor] = {}
    calls = {name: keeping_loss(name, step, losses) for name, step in steps.items()}
    timings = interleave(calls, device=device, rounds=args.steps, warmup=1)
    where = environment(device)
    print(
        f"{args.model}, batch {args.batch_size}, {args.row}, {precision}, {where['device']}, commit {where['commit']}"
    )
    for name, timing in timings.items():
        steps[name].check_after(losses[name])
        speedup = paired_ratio(timings["eager"], timing)
        print(
            f"  {name:<6} {timing.ms_median:9.1f} ms ({timing.ms_p20:.1f}-{timing.ms_p80:.1f})  {speedup:5.2f}x"
            f"  peak {peak_bytes[name] / 2**30:.2f} GiB"
        )
        if args.json:
            record = {
                "row": args.row,
                "model": args.model,
                "batch_size": args.batch_size,
                "implementation": name,
                "precision": precision,
                "compiled": args.compile,
                **timing.quantiles(),
                "speedup_over_eager": speedup,
                "peak_memory_bytes": peak_bytes[name],
                "loss": float(losses[name]),
                **where,
            }
            append_json_line(args.json, record)


if __name__ == "__main__":
    sys.exit(main())
