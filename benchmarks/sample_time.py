"""How much faster images are drawn than in the public loop: whole sampling runs, interleaved, of the same noise.

    python benchmarks/sample_time.py                       SiT-S/2 on a CPU (some minutes), SiT-XL/2 on a GPU
    python benchmarks/sample_time.py --method heun --guidance-interval 0,1 --json results.jsonl

Rows, on the model in the public style (eager) and in ours (fused):

    doubled     the loop of generate.py that guides by a doubled batch, at every step
    repa        REPA's own sampler, which doubles the batch inside the interval only
    ours        sample_ode: likewise, a time and label embedded once
    ours bf16   the same with bf16 products, where those are fast

The public rows and `ours` compute in float32, with TF32 products on a GPU as the public scripts set them. What a row
computes is checked against `repa` in the same run. Decoding is left out: it costs all of them the same.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lib.doing import Doing
from lib.outcome import WrongStep, check_can_write, exit_code
from lib.step_rows import UNIT_ROUNDOFF, fill_zeros
from lib.timing import append_json_line, environment, interleave, paired_ratio
from torch import Tensor

from sra2_fast import SiT, backends, sample_ode
from sra2_fast.errors import InputError, must_be
from sra2_fast.models import compile_blocks, model_sizes
from sra2_fast.sample.command import parse_interval
from sra2_fast.sample.draw import round_products

PUBLIC = ("doubled", "repa")
WARMUP = 1
AMPLIFIED = 64  # how far steps carry a rounding of the first one; ten blocks' worth of them are allowed at each


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="sample_time", description="Images a second, ours against the public loop.")
    add = parser.add_argument
    add("--model", help="registry name or 'D,depth,heads,patch' [SiT-S/2; on a GPU SiT-XL/2]")
    add("--batch-size", type=int, help="images drawn together [4; on a GPU 64]")
    add("--method", choices=("euler", "heun"), default="euler", help="[%(default)s]")
    add("--sampling-steps", type=int, default=10, help="of the solver [%(default)s]")
    add("--cfg-scale", type=float, default=1.8, help="[%(default)s]")
    add("--guidance-interval", default="0,0.7", metavar="LOW,HIGH", help="REPA's [%(default)s]")
    add("--compile", action="store_true", help="torch.compile the models, the public ones too")
    add("--device", help="cpu or cuda [cuda where there is one]")
    add("--steps", type=int, help="timed rounds, one sampling run of each [3; on a GPU 10]")
    add("--json", metavar="FILE", help="append the records as JSON lines")
    return parser.parse_args(argv)


def public_sampler(
    model: Any,
    noise: Tensor,
    labels: Tensor,
    *,
    steps: int,
    method: str,
    cfg_scale: float,
    interval: tuple[float, float],
    always_doubled: bool,
) -> Tensor:
    """Euler and Heun as public loops have them: float64 state, labels and null labels concatenated at every call."""
    null = torch.full_like(labels, model.num_classes)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def slope(x: Tensor, t: Tensor, decides: Tensor) -> Tensor:
        is_guided = bool(interval[0] <= decides <= interval[1])
        x, y = (torch.cat([x, x]), torch.cat([labels, null])) if is_guided or always_doubled else (x, labels)
        time = torch.ones(len(x), dtype=torch.float64, device=x.device) * t
        out = model(x.to(noise.dtype), time.to(noise.dtype), y).to(torch.float64)
        if not (is_guided or always_doubled):
            return out
        conditional, unconditional = out.chunk(2)
        return unconditional + cfg_scale * (conditional - unconditional) if is_guided else conditional

    x = noise.to(torch.float64)
    with torch.no_grad():
        for number, (t, t_next) in enumerate(itertools.pairwise(times), start=1):
            first = slope(x, t, t)
            if method == "heun" and number < steps:
                first = 0.5 * first + 0.5 * slope(x + (t_next - t) * first, t_next, t)
            x = x + (t_next - t) * first
    return x.to(noise.dtype)


def rows(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """row -> one sampling run; all of the same weights, noise and labels."""
    models = {implementation: build(args, device, implementation) for implementation in ("eager", "fused")}
    eager = models["eager"]
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch_size, eager.in_channels, *eager.latent_size)
    noise = torch.randn(shape, generator=generator).to(device)
    labels = torch.randint(0, eager.num_classes, (args.batch_size,), generator=generator).to(device)
    given = {"steps": args.sampling_steps, "method": args.method, "cfg_scale": args.cfg_scale}
    called = torch.compile(eager) if args.compile else eager
    called.num_classes = eager.num_classes
    public = partial(public_sampler, called, noise, labels, interval=args.interval, **given)
    found: dict[str, Callable[[], Tensor]] = {
        name: partial(public, always_doubled=name == "doubled") for name in PUBLIC
    }

    def ours(model: SiT, is_bf16: bool) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bf16):
            return sample_ode(model, noise, labels, guidance_interval=args.interval, **given)

    found["ours"] = partial(ours, models["fused"], is_bf16=False)
    if backends.is_bf16_fast(device):
        rounded = build(args, device, "fused")
        round_products(rounded)
        found["ours bf16"] = partial(ours, rounded, is_bf16=True)
    return found


def build(args: argparse.Namespace, device: torch.device, implementation: str) -> SiT:
    """Random weights, none left at zero, the same for both implementations."""
    torch.manual_seed(0)
    with device:
        model = SiT(**model_sizes(args.model, "sample_time"), learn_sigma=False, implementation=implementation)
        fill_zeros(model)
    model.eval().requires_grad_(False)
    return compile_blocks(model) if args.compile and implementation == "fused" else model


def check(results: dict[str, Tensor], depth: int, device: torch.device) -> dict[str, float]:
    """row -> relative difference from `repa`. Raises WrongStep where it is more than roundings."""
    truth = results["repa"].double()
    found = {}
    for name, made in results.items():
        of = "bf16" if name == "ours bf16" else "tf32" if device.type == "cuda" else "fp32"
        found[name] = float((made.double() - truth).norm() / truth.norm())
        allowed = AMPLIFIED * UNIT_ROUNDOFF[of] * (10 * depth) ** 0.5
        if not found[name] <= allowed:
            raise WrongStep(f"row {name} differs from repa by {found[name]:.1e}, more than {allowed:.1e}")
    return found


def resolve(args: argparse.Namespace) -> torch.device:
    """The device, with every default of `args` filled in. Raises InputError naming the option."""
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise must_be("sample_time", "--device", "cpu or cuda", name)
    on_gpu = name == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise InputError("sample_time: --device cuda: torch sees no GPU here; leave the option out or use cpu")
    args.model = args.model or ("SiT-XL/2" if on_gpu else "SiT-S/2")
    args.batch_size = (64 if on_gpu else 4) if args.batch_size is None else args.batch_size
    args.steps = (10 if on_gpu else 3) if args.steps is None else args.steps
    for option in ("batch_size", "sampling_steps", "steps"):
        if getattr(args, option) < 1:
            raise must_be("sample_time", f"--{option.replace('_', '-')}", "1 or more", getattr(args, option))
    args.interval = parse_interval(args.guidance_interval, "sample_time")
    if args.json:
        check_can_write("sample_time", "--json", args.json)
    return torch.device(name)


def run(args: argparse.Namespace) -> None:
    """Check and time the rows, print and record them."""
    device = resolve(args)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    results: dict[str, Tensor] = {}

    def keep(name: str, call: Callable[[], Tensor]) -> None:
        results[name] = call()

    with Doing("sample_time", args.model, 0, "a smaller --model, --batch-size or --sampling-steps") as doing:
        doing("building")
        calls = {name: partial(keep, name, call) for name, call in rows(args, device).items()}
        doing.bar.total = len(calls) * (WARMUP + args.steps)
        after = doing.rounds(tuple(calls), WARMUP, args.steps, counted=tuple(calls))
        timings = interleave(calls, device=device, rounds=args.steps, warmup=WARMUP, on_call=after)
    differences = check(results, model_sizes(args.model, "sample_time")["depth"], device)
    where = environment(device)
    about = {
        name: getattr(args, name)
        for name in ("model", "batch_size", "method", "sampling_steps", "cfg_scale", "compile")
    }
    low, high = args.interval
    print(
        f"{args.model}, batch {args.batch_size}, {args.sampling_steps} steps of {args.method}, guided for "
        f"{low:g} <= t <= {high:g}, {where['device']}, commit {where['commit']}"
    )
    for name, timing in timings.items():
        over = {f"speedup_over_{base}": paired_ratio(timings[base], timing) for base in PUBLIC}
        images_per_s = args.batch_size / timing.ms_median * 1e3
        print(
            f"  {name:<9} {timing.ms_median:10.1f} ms ({timing.ms_p20:.1f}-{timing.ms_p80:.1f})  "
            f"{images_per_s:8.3g} images/s  {over['speedup_over_doubled']:5.2f}x doubled  "
            f"{over['speedup_over_repa']:5.2f}x repa"
        )
        if args.json:
            interval = {"guidance_interval": list(args.interval), "difference": differences[name]}
            figures = {**timing.quantiles(), "images_per_s": images_per_s, **over}
            append_json_line(
                args.json, {"benchmark": "sample_time", "row": name, **about, **interval, **figures, **where}
            )


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 with one line for input that cannot be used, 1 where a row computed something else."""
    args = parse_arguments(argv)
    return exit_code("sample_time", "--batch-size", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
