"""The two ceilings of a machine, measured: how fast it multiplies matrices and how fast it copies memory.

Shares of a peak are shares of these, measured in the same run, never of a datasheet. Random data, since zeros run
faster (13 % on an H200 in bf16). `python benchmarks/peak.py [--device cuda] [--json FILE]` prints both.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from lib.timing import Timing, append_json_line, environment, interleave

from sra2_fast.backends import device_name, is_bf16_fast

PRODUCT_SIZE = {"cuda": 8192, "cpu": 2048}
EMULATED_SIZE = 512  # in bf16 on a CPU without bf16 units, where 2048 can take minutes
COPY_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
CUDA_COPY_SHARE = 8  # never take more than an eighth of the free memory for one of the two buffers


def product_flop_per_s(
    device: torch.device | str, dtype: torch.dtype, rounds: int = 9, size: int | None = None
) -> float:
    """FLOP/s of a square matrix product in `dtype`, median of `rounds`, two operations a multiply-add.

    In float32 on a GPU the rate is TF32's where `torch.set_float32_matmul_precision` allows it, as in the timed step.
    """
    device = torch.device(device)
    size = size or product_size(device, dtype)
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty(size, size, device=device, dtype=dtype)
    timing = interleave({"product": lambda: torch.mm(a, b, out=out)}, device=device, rounds=rounds, warmup=2)["product"]
    return 2 * size**3 / (timing.ms_median * 1e-3)


def product_size(device: torch.device, dtype: torch.dtype) -> int:
    """The side of the square matrices that are multiplied."""
    is_emulated = device.type == "cpu" and dtype == torch.bfloat16 and not is_bf16_fast(device)
    return EMULATED_SIZE if is_emulated else PRODUCT_SIZE[device.type]


class Product(NamedTuple):
    """A matrix product among a step's timings: its call and its FLOPs."""

    call: Callable[[], object]
    flops: int


def step_products(
    config: Mapping[str, Any], batch_size: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Product]:
    """The two largest products of a SiT's forward, at the step's own shapes: tokens by D by the MLP's width, and back.

    Timed between the steps and the best of all rounds taken, they are the rate that an MFU divides by: a square product
    measured once, on a machine busier then than later, gave an MFU of 1.27. Both together are less work than a block's
    forward, so that a round of them is short whatever the type costs here.
    """
    tokens = batch_size * (config["input_size"] // config["patch_size"]) ** 2
    width, wide = config["hidden_size"], int(config["hidden_size"] * config["mlp_ratio"])
    found = {}
    for name, inner, outer in (("product in", width, wide), ("product out", wide, width)):
        a, b = torch.randn(tokens, inner, device=device).to(dtype), torch.randn(inner, outer, device=device).to(dtype)
        out = torch.empty(tokens, outer, device=device, dtype=dtype)
        found[name] = Product(functools.partial(torch.mm, a, b, out=out), 2 * tokens * inner * outer)
    return found


def best_flop_per_s(flops: Mapping[str, int], timings: Mapping[str, Timing]) -> float:
    """The highest rate of anything in any round; flops: name -> FLOPs of a call."""
    return max(count / (min(timings[name].samples_ms) * 1e-3) for name, count in flops.items())


def copy_bytes_per_s(device: torch.device | str, rounds: int = 9, nbytes: int | None = None) -> float:
    """Bytes read plus bytes written a second by a large copy within the device's memory, median of `rounds`."""
    device = torch.device(device)
    nbytes = nbytes or COPY_BYTES[device.type]
    if device.type == "cuda":
        nbytes = min(nbytes, torch.cuda.mem_get_info(device)[0] // CUDA_COPY_SHARE)
    source = torch.randint(0, 127, (nbytes,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    timing = interleave({"copy": lambda: target.copy_(source)}, device=device, rounds=rounds, warmup=2)["copy"]
    return 2 * nbytes / (timing.ms_median * 1e-3)


def main(argv: list[str] | None = None) -> None:
    """Print both ceilings of the chosen device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, help="side of the square matrices [8192 on a GPU, 2048 on a CPU]")
    parser.add_argument("--copy-mib", type=int, help="MiB copied [4096 on a GPU, 256 on a CPU]")
    parser.add_argument("--json", metavar="FILE", help="append both as a JSON line")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    print(device_name(device))
    record: dict[str, object] = {"part": "peaks"}
    for dtype in (torch.float32, torch.bfloat16):
        rate, name = product_flop_per_s(device, dtype, size=args.size) * 1e-12, str(dtype).removeprefix("torch.")
        record[f"product_tflop_per_s_{name}"] = rate
        print(f"  {name:<9} matrix product {rate:9.3f} TFLOP/s")
    copied = copy_bytes_per_s(device, nbytes=args.copy_mib and args.copy_mib << 20) * 1e-9
    print(f"  {'copy':<9} read + written {copied:9.1f} GB/s")
    if args.json:
        append_json_line(args.json, {**record, "copy_gb_per_s": copied, **environment(device)})


if __name__ == "__main__":
    main()
