"""What the compiler makes of every Triton kernel, for GPUs that need not be there: `python benchmarks/aot_table.py`.

One row a kernel, element types, model size and architecture: registers, spills, shared memory, resident warps, matrix
instructions, 16-byte accesses, and the bytes a call moves against the fewest it could (each input once, each output
once). Appends to benchmarks/results/aot.jsonl and rewrites aot-triton-VERSION.md there, a page for each version of
Triton: `pip install --no-deps --target FOLDER triton==VERSION` and PYTHONPATH=FOLDER try another. Takes minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from lib.timing import append_json_line, commit  # noqa: E402  (found on the path set just above)

from sra2_fast import backends  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
WIDTHS = {"SiT-S": 384, "SiT-B": 768, "SiT-L": 1024, "SiT-XL": 1152}
BATCH, TOKENS = 32, 256
F32, BF16 = torch.float32, torch.bfloat16
# name: the residual stream, then branch, y and modulation. Autocast keeps the stream in float32.
TYPES = {"float32": (F32, F32), "autocast": (F32, BF16), "bfloat16": (BF16, BF16)}
HEADER = (
    "| op | kernel | size | types | sm | registers | spills | shared KiB | warps of 64 | programs | HGMMA | HMMA "
    "| 16-byte loads | 16-byte stores | MB | floor MB |"
)


@dataclass(frozen=True)
class Case:
    """One launcher at one size. run(): calls it, returns the tensors it must read and those it must write.

    tabled: the launcher reaches those tensors through a table of addresses, not as arguments of its kernels.
    """

    op: str
    direction: str
    size: str
    types: str
    run: Callable[[], tuple[list[torch.Tensor], list[torch.Tensor]]]
    tabled: bool = False


def _modulations(D: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    conditioning = torch.empty(BATCH, 6 * D, dtype=dtype)
    return conditioning[:, :D], conditioning[:, D : 2 * D], conditioning[:, 2 * D : 3 * D]


def row_cases(size: str, types: str) -> Iterator[Case]:
    from sra2_fast.kernels import gated_residual_layer_norm_modulate as gated
    from sra2_fast.kernels import layer_norm_modulate as plain

    D = WIDTHS[size]
    stream, other = TYPES[types]
    x = torch.empty(BATCH, TOKENS, D, dtype=stream)
    dx_new = torch.empty_like(x)
    dy, branch = torch.empty_like(x, dtype=other), torch.empty_like(x, dtype=other)
    shift, scale, gate = _modulations(D, other)
    mean, rstd = torch.empty(BATCH, TOKENS), torch.empty(BATCH, TOKENS)

    def plain_fwd():
        return [x, shift, scale], list(plain.layer_norm_modulate_fwd(x, shift, scale, 1e-6, other))

    def plain_bwd():
        return [dy, x, scale, mean, rstd], list(plain.layer_norm_modulate_bwd(dy, x, scale, mean, rstd))

    def gated_fwd():
        given = [x, branch, gate, shift, scale]
        return given, list(gated.gated_residual_layer_norm_modulate_fwd(*given, 1e-6, other))

    def gated_bwd():
        given = [dx_new, dy, x, branch, gate, scale, mean, rstd]
        return given, list(gated.gated_residual_layer_norm_modulate_bwd(*given))

    yield Case("layer_norm_modulate", "forward", size, types, plain_fwd)
    yield Case("layer_norm_modulate", "backward", size, types, plain_bwd)
    yield Case("gated_residual_layer_norm_modulate", "forward", size, types, gated_fwd)
    yield Case("gated_residual_layer_norm_modulate", "backward", size, types, gated_bwd)


def loss_case(size: str, types: str, channels: int = 4, patch: int = 2, align: str = "cosine") -> Case:
    from sra2_fast.kernels import alignment_velocity_loss as kernels

    K, P, (_, dtype) = 2 * WIDTHS[size], patch * patch * channels, TYPES[types]

    def run():
        image = (BATCH, channels, 16 * patch, 16 * patch)
        given = [
            torch.empty(BATCH, TOKENS, K, dtype=dtype),
            torch.empty(P, K, dtype=dtype),
            torch.empty(P),
            torch.empty(BATCH, TOKENS, P, dtype=dtype),
            torch.empty(image),
            torch.empty(image),
            torch.empty(BATCH),
        ]
        return given, list(kernels.alignment_velocity_loss_fwd(*given, patch, "linear", align, 0.05, 1e-6))

    return Case("alignment_velocity_loss", "forward", f"{size} P={P} {align}", types, run)


def optimizer_cases() -> Iterator[Case]:
    from sra2_fast.kernels import adamw_ema

    lists = [[torch.empty(33_000_000)] for _ in range(5)]
    settings = SimpleNamespace(
        lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, ema_decay=0.9999, max_grad_norm=1.0
    )

    low = [torch.empty(33_000_000, dtype=torch.bfloat16)]

    def norm(grads):
        return grads, [adamw_ema.global_norm(grads)]

    def step(grads, shadows):
        given = [lists[0], grads, *lists[2:]]
        adamw_ema.adamw_ema_step(*given, shadows, torch.ones(1), torch.ones(()), None, settings)
        written = [tensor for tensors in (lists[0], *lists[2:]) for tensor in tensors]
        return [*written, *grads], [*written, *shadows]

    for name, grads, shadows in (("float32", lists[1], []), ("bf16 gradients", low, low)):
        yield Case("adamw_ema", "norm", "33 M elements", name, partial(norm, grads), tabled=True)
        yield Case("adamw_ema", "step", "33 M elements", name, partial(step, grads, shadows), tabled=True)


def cases(sizes: tuple[str, ...] = tuple(WIDTHS), types: tuple[str, ...] = tuple(TYPES)) -> Iterator[Case]:
    """All launchers at these sizes and types, smaller losses and the optimizer once."""
    for size in sizes:
        for name in types:
            yield from row_cases(size, name)
            if name != "autocast":
                yield loss_case(size, name)
    for channels, patch, align in ((3, 2, "cosine"), (4, 4, "cosine"), (4, 8, "cosine"), (4, 2, "smooth_l1")):
        yield loss_case(sizes[-1], "bfloat16", channels, patch, align)
    yield from optimizer_cases()


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def records(case: Case, arch: int) -> list[dict[str, object]]:
    """Compile one case for sm_<arch>; one record a kernel it launches.

    floor_bytes: what the call must move. call_bytes: what all its launches move, each tensor of a launch counted once.
    """
    from lib.aot_compile import compile_only, inspect

    with compile_only(arch) as launches:
        read, written = case.run()
    floor = _bytes(read) + _bytes(written)
    moved = sum(launch.tensor_bytes for launch in launches) + (floor if case.tabled else 0)
    shared: dict[str, object] = {
        "op": case.op,
        "direction": case.direction,
        "size": case.size,
        "types": case.types,
        "arch": arch,
        "call_bytes": moved,
        "floor_bytes": floor,
    }
    return [
        shared | {"kernel": launch.kernel, "programs": launch.programs} | dataclasses.asdict(inspect(launch, arch))
        for launch in launches
    ]


def row(record: dict[str, object]) -> str:
    """One line of the readable table."""
    r = record
    cells = [
        f"{r['op']} {r['direction']}",
        r["kernel"],
        r["size"],
        r["types"],
        r["arch"],
        r["registers"],
        r["spill_instructions"],
    ]
    cells += [round(int(str(r["shared_bytes"])) / 1024, 1), r["warps"], r["programs"], r["hgmma"], r["hmma"]]
    cells += [f"{r['loads_128']} of {r['loads']}", f"{r['stores_128']} of {r['stores']}"]
    cells += [f"{int(str(r[name])) / 1e6:.1f}" for name in ("call_bytes", "floor_bytes")]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main(argv: list[str] | None = None) -> int:
    """Print the table, append its rows to RESULTS/aot.jsonl, rewrite this Triton's page; 2 where Triton is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=[80, 90])
    parser.add_argument("--sizes", nargs="+", default=list(WIDTHS), choices=list(WIDTHS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of aot.jsonl and the pages")
    args = parser.parse_args(argv)
    try:
        import triton
    except ImportError as error:
        print(f"aot_table: Triton does not import: {error}", file=sys.stderr)
        return 2
    about: dict[str, object] = {"bench": "aot", "commit": commit(), **backends.versions()}
    lines = [HEADER, "|" + " --- |" * (HEADER.count("|") - 1)]
    print("\n".join(lines))
    args.out.mkdir(parents=True, exist_ok=True)
    for arch in args.arch:
        for case in cases(tuple(args.sizes)):
            for record in records(case, arch):
                append_json_line(args.out / "aot.jsonl", about | record)
                lines.append(row(record))
                print(lines[-1], flush=True)
    title = (
        f"# Triton kernels compiled ahead of time\n\n`python benchmarks/aot_table.py` at {about['commit']}, torch "
        f"{torch.__version__}, triton {triton.__version__}; batch {BATCH}, {TOKENS} tokens. Instruction counts are "
        "static. MB and floor belong to the whole call: floor is every input and output once, MB every tensor of every "
        "launch once.\n\n"
    )
    (args.out / f"aot-triton-{triton.__version__}.md").write_text(title + "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
