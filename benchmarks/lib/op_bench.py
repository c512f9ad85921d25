"""What every `bench_<op>.py` shares: building the passes, checking and timing variants interleaved, one JSON line each.

A bench file is a pytest-benchmark suite. Its test makes inputs, names the bytes and FLOPs that belong to the op (not to
a variant), and hands callables to the `compare` fixture of conftest.py:

    def test_layer_norm_modulate(compare, shape, dtype, direction):
        variants = {name: passes(fn, inputs, output_gradients, direction) for name, fn in functions.items()}
        case = OpCase("layer_norm_modulate", shape, dtype, direction, bytes_moved=...)
        compared = compare(case, variants, check=check)
        print(compared.speedup("fused", "eager"), compared.copy_share("fused"))

`compare` adds the variant `copy`: a copy of as many bytes, which is the measured floor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .timing import (
    Timing,
    append_json_line,
    capture_stream,
    environment,
    graphed,
    interleave,
    paired_ratio,
    peak_memory_bytes,
)

OURS_AND_TORCHS = ("fused", "eager", "compile")
DIRECTIONS = ("forward", "backward", "both")
# name: (the residual stream's type, that of all else). In training, autocast keeps the stream in float32.
TYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "training": (torch.float32, torch.bfloat16),
}


@dataclass(frozen=True)
class OpCase:
    """One measured situation.

    dtype: of all tensors, or a name of TYPES.
    bytes_moved: what the op must read and write at least, each tensor once [bytes].
    flops: what it must compute, 0 where memory is the bound.
    extra: further keys of the JSON line (path, alignment, implementation details).
    """

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    direction: str
    bytes_moved: int
    flops: int = 0
    extra: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Timings of one interleaved run, the copy of as many bytes among them, and each variant's extra peak memory."""

    case: OpCase
    timings: Mapping[str, Timing]
    peak_bytes: Mapping[str, int]
    was_graphed: bool

    def speedup(self, variant: str, over: str) -> float:
        """How many times faster `variant` is than `over`, paired by round."""
        return paired_ratio(self.timings[over], self.timings[variant])

    def copy_share(self, variant: str) -> float:
        """The share of the copy bandwidth measured in the same run that `variant` reaches, 0 to 1."""
        return paired_ratio(self.timings["copy"], self.timings[variant])

    def records(self, device: torch.device | str) -> list[dict[str, object]]:
        """One JSON-able object a variant."""
        where = environment(device)
        lines = []
        for name, timing in self.timings.items():
            lines.append(
                {
                    "op": self.case.op,
                    "variant": name,
                    "shape": list(self.case.shape),
                    "dtype": str(self.case.dtype).removeprefix("torch."),
                    "direction": self.case.direction,
                    **timing.quantiles(),
                    "gb_per_s": self.case.bytes_moved / timing.ms_median * 1e-6,
                    "tflop_per_s": self.case.flops / timing.ms_median * 1e-9 if self.case.flops else None,
                    "copy_share": self.copy_share(name),
                    "speedup_over_eager": self.speedup(name, "eager") if "eager" in self.timings else None,
                    "peak_memory_bytes": self.peak_bytes.get(name),
                    "bytes_moved": self.case.bytes_moved,
                    "cuda_graph": self.was_graphed,
                    **self.case.extra,
                    **where,
                }
            )
        return lines

    def table(self) -> str:
        """The comparison for a terminal."""
        case = self.case
        dtype = str(case.dtype).removeprefix("torch.")
        head = f"{case.op} {tuple(case.shape)} {dtype} {case.direction}, {case.bytes_moved / 2**20:.1f} MiB moved"
        lines = [
            head,
            f"  {'variant':<14}{'ms':>9}{'20 %':>9}{'80 %':>9}{'vs eager':>10}{'of copy':>9}{'peak MiB':>10}",
        ]
        for name, timing in self.timings.items():
            versus = f"{self.speedup(name, 'eager'):.2f}x" if "eager" in self.timings else "-"
            peak = f"{self.peak_bytes[name] / 2**20:.2f}" if name in self.peak_bytes else "-"
            lines.append(
                f"  {name:<14}{timing.ms_median:>9.3f}{timing.ms_p20:>9.3f}{timing.ms_p80:>9.3f}{versus:>10}"
                f"{100 * self.copy_share(name):>8.0f}%{peak:>10}"
            )
        return "\n".join(lines)


def passes(
    function: Callable[..., object], inputs: Sequence[object], output_gradients: Sequence[torch.Tensor], direction: str
) -> Callable[[], object]:
    """A call that runs one pass of `function(*inputs)` on tensors that exist already.

    forward: with gradients recorded wherever an input requires one, as in training. backward: the graph is built once
    and kept. both: forward, then the gradients of all inputs that require one. Returns what the call computed.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"passes: direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    wanted = [one for one in inputs if isinstance(one, torch.Tensor) and one.requires_grad]

    def forward() -> tuple[torch.Tensor, ...]:
        out = function(*inputs)
        return (out,) if isinstance(out, torch.Tensor) else tuple(out)  # type: ignore[arg-type]

    def both() -> object:
        return torch.autograd.grad(forward(), wanted, output_gradients)

    if direction == "forward":
        return forward
    if direction == "both":
        return both
    if wanted[0].is_cuda:
        with torch.cuda.stream(capture_stream()):
            outputs = forward()
        torch.cuda.synchronize()
    else:
        outputs = forward()
    return lambda: torch.autograd.grad(outputs, wanted, output_gradients, retain_graph=True)


def as_in_training(function: Callable[..., object], device: torch.device) -> Callable[..., object]:
    """`function` under autocast to bf16, its last result in that type: a product reads it, and would cast it first."""

    def call(*inputs: object, **named: object) -> object:
        with torch.autocast(device.type, torch.bfloat16):
            out = function(*inputs, **named)
        if isinstance(out, torch.Tensor):
            return out.to(torch.bfloat16)
        *others, last = out  # type: ignore[misc]
        return (*others, last.to(torch.bfloat16))

    return call


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    """`torch.compile(fullgraph=True)` of the eager composition, the rival of every op.

    Donated buffers are off, since they forbid the kept graph that timing a backward alone needs.
    """
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def without_failing_peers(variants: Mapping[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """The variants less those of other libraries that do not run here, each with a line that says why.

    Such a one, built for other types or another card, must not cost ours its timing.
    """
    running = {}
    for name, call in variants.items():
        try:
            if name not in OURS_AND_TORCHS:
                call()
        except Exception as error:  # each library has errors of its own
            print(f"{name}: unmeasured: {type(error).__name__}: {error}".splitlines()[0])
        else:
            running[name] = call
    return running


def copy_of(nbytes: int, device: torch.device | str) -> Callable[[], object]:
    """A copy that reads nbytes / 2 and writes nbytes / 2."""
    source = torch.randint(0, 127, (max(1, nbytes // 2),), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def compare_variants(
    case: OpCase,
    variants: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    check: Callable[[], None] | None = None,
    rounds: int | None = None,
    max_seconds: float = 4.0,
    use_graphs: bool = True,
    measure_memory: bool = True,
    json_path: str | None = None,
) -> Comparison:
    """Check, then measure memory, then time all variants and the copy in one interleaved run.

    check: raises where a variant computes something else than the reference; called before and after the timing.
    use_graphs: on CUDA, time the replay of each variant's graph; where one cannot be captured, all run as they are
    and the record says so.
    """
    device = torch.device(device)
    if check is not None:
        check()
    calls = {**variants, "copy": copy_of(case.bytes_moved, device)}
    peak_bytes = {}
    for name, call in variants.items():
        call()
        if measure_memory:
            peak_bytes[name] = peak_memory_bytes(call, device)
    was_graphed = False
    if device.type == "cuda" and use_graphs:
        try:
            calls, was_graphed = ({name: graphed(call) for name, call in calls.items()}, True)
        except RuntimeError as error:
            print(f"{case.op}: not captured in a CUDA graph ({str(error).splitlines()[0]}); timed with launches")
    timings = interleave(calls, device=device, rounds=rounds, warmup=3, max_seconds=max_seconds)
    if check is not None:
        check()
    compared = Comparison(case, timings, peak_bytes, was_graphed)
    if json_path is not None:
        for record in compared.records(device):
            append_json_line(json_path, record)
    return compared
