"""How much faster a training step is with our ops than in the public style: eager and fused in one interleaved run.

    python benchmarks/fused_speedup.py [--model SiT-S/2] [--batch-size 8] [--row sra2-cosine] [--compile] [--json FILE]

`step_time.py` compares methods within one implementation; two of its runs minutes apart do not compare on a machine
whose speed drifts, so the ratio of implementations has its own run. Both train the same weights on the same batches.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

import torch
from lib.step_rows import ROWS, Setting, StepRow, add_setting_arguments, prepared, resolve_setting
from lib.timing import append_json_line, environment, interleave, paired_ratio, peak_memory_bytes
from step_time import check_can_append, keeping_loss

from sra2_fast.errors import InputError

IMPLEMENTATIONS = ("eager", "fused")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="fused_speedup", description="A training step, fused against eager.")
    add_setting_arguments(parser, cpu_batch_size=8)
    parser.add_argument("--row", choices=ROWS, default="sra2-cosine", help="[%(default)s]")
    args = parser.parse_args(argv)
    try:
        setting = resolve_setting(args, "fused_speedup", "fused", rounds=(8, 20))
        if args.json:
            check_can_append(args.json)
        measure(args, setting)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def measure(args: argparse.Namespace, setting: Setting) -> None:
    """Check both steps, time them in turn, print the ratio."""
    steps: dict[str, StepRow] = {}
    peak_bytes = {}
    for name in IMPLEMENTATIONS:
        steps[name] = prepared(args.row, dataclasses.replace(setting, implementation=name))
        peak_bytes[name] = steps[name].persistent_bytes() + peak_memory_bytes(steps[name], setting.device)
    losses: dict[str, torch.Tensor] = {}
    calls = {name: keeping_loss(name, step, losses) for name, step in steps.items()}
    timings = interleave(calls, device=setting.device, rounds=args.steps, warmup=1)
    where = environment(setting.device)
    what = f"{setting.model}, batch {setting.batch_size}, {args.row}, {setting.precision}"
    print(f"{what}, {where['device']}, commit {where['commit']}")
    for name, timing in timings.items():
        steps[name].check_after(losses[name])
        speedup = paired_ratio(timings["eager"], timing)
        print(
            f"  {name:<6} {timing.ms_median:9.1f} ms ({timing.ms_p20:.1f}-{timing.ms_p80:.1f})  {speedup:5.2f}x"
            f"  peak {peak_bytes[name] / 2**30:.2f} GiB"
        )
        if args.json:
            record = {
                **steps[name].about(),
                **timing.quantiles(),
                "speedup_over_eager": speedup,
                "peak_memory_bytes": peak_bytes[name],
                "loss": float(losses[name]),
                **where,
            }
            append_json_line(args.json, record)


if __name__ == "__main__":
    sys.exit(main())
