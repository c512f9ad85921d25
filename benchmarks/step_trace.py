"""A trace of training steps, compiled or not, and the kernels that take the most time.

    python benchmarks/step_trace.py --row sra2-cosine --compile --out trace.json.gz

The trace opens in ui.perfetto.dev. `step_budget.py` sums the same step by what each part is for, where it is not
compiled.
"""

from __future__ import annotations

import argparse
import sys

import torch
from lib.doing import Doing
from lib.outcome import check_can_write, exit_code
from lib.step_rows import ROWS, add_setting_arguments, prepared, resolve_setting, ways_to_be_faster
from lib.timing import append_json_line, environment, without_profiler_chatter

from sra2_fast.errors import must_be

OP = "step_trace"
ROUNDS = (2, 3)  # on a CPU, on a GPU
KERNELS = 30  # lines of the table
NAME_WIDTH = 70


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for input that cannot be used, 1 where the step was wrong."""
    parser = argparse.ArgumentParser(prog=OP, description="A trace of training steps.")
    add_setting_arguments(parser, cpu_batch_size=4)
    parser.add_argument("--row", choices=ROWS, default="sra2-cosine", help="[%(default)s]")
    parser.add_argument("--out", required=True, metavar="FILE", help="the trace, .json or .json.gz")
    args = parser.parse_args(argv)
    return exit_code(OP, "--batch-size", lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Profile some steps after the first ones; write the trace, print the kernels.

    Raises InputError naming the option.
    """
    setting = resolve_setting(args, OP, "fused", ROUNDS)
    if not args.out.endswith((".json", ".json.gz")):
        raise must_be(OP, "--out", "a file named .json or .json.gz", args.out)
    check_can_write(OP, "--out", args.out)
    if args.json:
        check_can_write(OP, "--json", args.json)
    with Doing(OP, args.row, 1 + args.steps, ways_to_be_faster(setting)) as doing:
        step, _ = prepared(args.row, setting, doing)
        on_gpu = setting.device.type == "cuda"
        activities = [torch.profiler.ProfilerActivity.CPU]
        if on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.synchronize()
        doing("profiling")
        with without_profiler_chatter(), torch.profiler.profile(activities=activities) as profiled:
            for _ in range(args.steps):
                loss = step()
                doing.bar.update()
            if on_gpu:
                torch.cuda.synchronize()
        step.check_after(loss)
        doing("writing the trace")
        profiled.export_chrome_trace(args.out)
    averages = profiled.key_averages()
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    print(averages.table(sort_by=by, row_limit=KERNELS, max_name_column_width=NAME_WIDTH))
    launches = sum(one.count for one in averages if on_gpu and one.device_type != torch.autograd.DeviceType.CPU)
    if on_gpu:
        print(f"{launches / args.steps:.0f} kernels and copies a step")
    print(f"{args.row}, {setting.model}, batch {setting.batch_size}, {args.steps} steps: {args.out}")
    if args.json:
        taken = {one.key: getattr(one, by) / args.steps * 1e-3 for one in averages if getattr(one, by) > 0}
        largest = dict(sorted(taken.items(), key=lambda item: -item[1])[:KERNELS])
        record = {"bench": OP, **step.about(), "steps": args.steps, "kernels_ms": largest, "launches": launches}
        append_json_line(args.json, {**record, **environment(setting.device)})


if __name__ == "__main__":
    sys.exit(main())
