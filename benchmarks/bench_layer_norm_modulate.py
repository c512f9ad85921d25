"""layer_norm_modulate against `F.layer_norm` + modulate, the same compiled, libraries' kernels, and a copy.

    pytest benchmarks/bench_layer_norm_modulate.py [--bench-device cuda] [--bench-json FILE]

Forward reads x and writes y; backward reads x and dy and writes dx. The rest is (B, D) or (B, N), and not counted.
`training`: float32 x; bf16 modulation, y and dy.
"""

from __future__ import annotations

import pytest
import torch
from lib.op_bench import TYPES, OpCase, as_in_training, compiled, passes, without_failing_peers
from lib.peers import layer_norm_modulate_peers

from sra2_fast.ops.layer_norm_modulate import eager, layer_norm_modulate
from sra2_fast.reference import layer_norm_modulate as reference

SHAPES = {
    "cpu": [(8, 256, 384), (4, 256, 1152)],
    "cuda": [(32, 256, 1152), (256, 256, 768)],
    "small": [(2, 3, 96), (2, 1, 64)],
}


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("size", [0, 1])
def test_layer_norm_modulate(compare, bench_device, bench_size, size, types, direction):
    b, n, d = SHAPES[bench_size][size]
    stream, other = TYPES[types]
    x = torch.randn(b, n, d, device=bench_device).to(stream).requires_grad_()
    shift, scale = (
        chunk.detach().requires_grad_()
        for chunk in torch.randn(b, 6 * d, device=bench_device).to(other).chunk(6, 1)[:2]
    )
    dy = torch.randn(b, n, d, device=bench_device).to(other)
    functions = {"fused": layer_norm_modulate, "eager": eager, "compile": eager}
    if bench_device.type == "cuda":
        functions |= layer_norm_modulate_peers()
    if types == "training":
        functions = {name: as_in_training(function, bench_device) for name, function in functions.items()}
    functions["compile"] = compiled(functions["compile"])
    variants = {name: passes(f, (x, shift, scale), (dy,), direction) for name, f in functions.items()}
    variants = without_failing_peers(variants)

    def check() -> None:
        doubles = [t.detach().double() for t in (x, shift, scale)]
        want = [reference.forward(*doubles)]
        if direction == "both":
            want = list(reference.backward(dy.double(), doubles[0], doubles[2]))
        for got, true in zip(variants["fused"](), want, strict=True):
            allowed = 2 * 2.0 ** (-24 if got.dtype == torch.float32 else -8)
            assert float((got.double() - true).norm() / true.norm()) < allowed

    stream_bytes, other_bytes = stream.itemsize, other.itemsize
    moved = stream_bytes + other_bytes + (2 * stream_bytes + other_bytes if direction == "both" else 0)
    compare(OpCase("layer_norm_modulate", (b, n, d), types, direction, moved * x.numel()), variants, check=check)
