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
from lib.doing import Doing
from lib.outcome import check_can_write, exit_code
from lib.step_rows import ROWS, StepRow, add_setting_arguments, prepared, resolve_setting, ways_to_be_faster
from lib.timing import append_json_line, environment, interleave, paired_ratio
from step_time import keeping_loss

IMPLEMENTATIONS = ("eager", "fused")
WARMUP = 1


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for input that cannot be used, 1 where a timed step was wrong."""
    parser = argparse.ArgumentParser(prog="fused_speedup", description="A training step, fused against eager.")
    add_setting_arguments(parser, cpu_batch_size=8)
    parser.add_argument("--row", choices=ROWS, default="sra2-cosine", help="[%(default)s]")
    args = parser.parse_args(argv)
    return exit_code("fused_speedup", "--batch-size", lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Check both steps, time them in turn, print the ratio."""
    setting = resolve_setting(args, "fused_speedup", "fused", rounds=(8, 20))
    if args.json:
        check_can_write("fused_speedup", "--json", args.json)
    steps: dict[str, StepRow] = {}
    peak_bytes: dict[str, int] = {}
    losses: dict[str, torch.Tensor] = {}
    total = len(IMPLEMENTATIONS) * (1 + WARMUP + args.steps)
    with Doing("fused_speedup", args.row, total, ways_to_be_faster(setting)) as doing:
        for name in IMPLEMENTATIONS:
            one = dataclasses.replace(setting, implementation=name)
            steps[name], peak_bytes[name] = prepared(args.row, one, doing)
            doing.bar.update()
        calls = {name: keeping_loss(name, step, losses) for name, step in steps.items()}
        after = doing.rounds(IMPLEMENTATIONS, WARMUP, args.steps, counted=IMPLEMENTATIONS)
        timings = interleave(calls, device=setting.device, rounds=args.steps, warmup=WARMUP, on_call=after)
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
