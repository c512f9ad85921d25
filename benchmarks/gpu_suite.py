"""Everything that needs a GPU, in stages of at most eight minutes that stand alone and add to one record.

    python benchmarks/gpu_suite.py --out DIR --stage kernels     are the kernels right
    python benchmarks/gpu_suite.py --out DIR --stage step        the step against the public one, eager and compiled
    python benchmarks/gpu_suite.py --out DIR                     these, then profile, ops, memory, sample, sanitize
    python benchmarks/gpu_suite.py --out DIR --rehearse          the same code without a GPU, shrunken

Works from a checkout with no network and nothing installed but torch, pytest and pytest-benchmark: a stage that needs
the extension builds it in place, and the children find the package through PYTHONPATH. Each part is a process of its
own with a time limit; what no longer fits into its stage's time is listed as not run. DIR gets `gpu_suite.jsonl` (one
line a part, a bench variant, a row of a step), `gpu_suite.log` (all their output) and the trace; a rehearsal's record
is `rehearsal.jsonl`. Without a GPU it says so and exits 0. Exit code 1: some part failed.

To rehearse with the torch and Triton of the machine that has the GPU, which need not be this one's, run it from an
environment that has them: `python3.12 -m venv FOLDER; FOLDER/bin/pip install torch==2.11.0 triton==3.6.0` and the
extras train and benchmark of pyproject.toml.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import torch
from lib import peers
from lib.outcome import exit_code
from lib.suite_parts import Outcome, run_parts
from lib.suite_report import step_report
from lib.suite_stages import STAGES, Plan, parts_of
from lib.timing import append_json_line, environment

from sra2_fast import backends
from sra2_fast.errors import InputError, must_be

OP = "gpu_suite"
STAGE_SECONDS = 460.0
REHEARSAL_SECONDS = 3600.0


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog=OP, description="Build, test and benchmark on a GPU, in stages.")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the record and the log")
    parser.add_argument("--stage", default=",".join(STAGES), help="some of %(default)s")
    parser.add_argument("--rehearse", action="store_true", help="run the stages' code without a GPU, shrunken")
    parser.add_argument("--seconds", type=float, default=STAGE_SECONDS, help="for all parts of a stage [%(default)s]")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> list[str]:
    """The stages, in order. Raises InputError naming the option."""
    stages = [stage.strip() for stage in args.stage.split(",") if stage.strip()]
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or not stages:
        got = unknown[0] if unknown else repr(args.stage)
        raise must_be(OP, "--stage", f"some of {','.join(STAGES)}", got)
    if not args.seconds > 0:
        raise must_be(OP, "--seconds", "above 0", args.seconds)
    if importlib.util.find_spec("triton") is None:
        raise InputError(f"{OP}: triton is not installed here; it comes with a torch for CUDA, or: pip install triton")
    return list(dict.fromkeys(stages))


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 where all parts passed or there is no GPU, 1 where one failed, 2 for input that cannot be used."""
    args = parse_arguments(argv)
    outcomes: list[Outcome] = []
    code = exit_code(OP, "--stage: fewer stages at once", lambda: outcomes.extend(run(args)))
    return code or int(any(one.is_failure for one in outcomes))


def run(args: argparse.Namespace) -> list[Outcome]:
    """Run the stages, print and record what came of them. Raises InputError naming the option."""
    stages = check(args)
    if not (args.rehearse or torch.cuda.is_available()):
        print(f"{OP}: torch sees no GPU here; nothing was run (--rehearse runs the same code without one)")
        return []
    begin = time.monotonic()
    out = Path(args.out).resolve()
    records = out / ("rehearsal.jsonl" if args.rehearse else "gpu_suite.jsonl")
    about = environment("cpu" if args.rehearse else "cuda")
    told = peers.report()
    try:
        out.mkdir(parents=True, exist_ok=True)
        append_json_line(records, {"part": "peers", "peers": told, "backends": backends.status(), **about})
    except OSError as error:
        raise InputError(f"{OP}: --out {out} cannot be written ({error.strerror}); name another folder") from error
    seconds = REHEARSAL_SECONDS if args.rehearse else args.seconds
    outcomes: list[Outcome] = []
    for stage in stages:
        planned = parts_of(stage, Plan(records, args.rehearse))
        if not planned:
            print(f"{stage}: not run: its tool is not installed here")
        outcomes += run_parts(stage, planned, records, seconds, about)
    print("\n".join(f"{one.name:<48} {one.result:<24} {one.seconds:6.0f} s" for one in outcomes))
    print("\n".join(f"peer {name}: {why}" for name, why in told.items()))
    print(step_report(records))
    print(f"{time.monotonic() - begin:.0f} s in all; {records}")
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
