"""gated_residual_layer_norm_modulate against gate + add + `F.layer_norm` + modulate, compiled, libraries', and a copy.

    pytest benchmarks/bench_gated_residual_layer_norm_modulate.py [--bench-device cuda] [--bench-json FILE]

Forward reads x and branch and writes x' and y; backward reads dx', dy, x' and branch and writes dx and dbranch.
`training`: float32 x and x'; bf16 branch, modulation, y and dy.
"""

from __future__ import annotations

import pytest
import torch
from lib.op_bench import TYPES, OpCase, as_in_training, compiled, passes, without_failing_peers
from lib.peers import gated_residual_layer_norm_modulate_peers

from sra2_fast.ops.gated_residual_layer_norm_modulate import eager, gated_residual_layer_norm_modulate
from sra2_fast.reference import gated_residual_layer_norm_modulate as reference

SHAPES = {
    "cpu": [(8, 256, 384), (4, 256, 1152)],
    "cuda": [(32, 256, 1152), (256, 256, 768)],
    "small": [(2, 3, 96), (2, 1, 64)],
}


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("size", [0, 1])
def test_gated_residual_layer_norm_modulate(compare, bench_device, bench_size, size, types, direction):
    b, n, d = SHAPES[bench_size][size]
    stream, other = TYPES[types]
    x, dx_new = torch.randn(2, b, n, d, device=bench_device).to(stream).unbind()
    branch, dy = torch.randn(2, b, n, d, device=bench_device).to(other).unbind()
    modulation = torch.randn(b, 6 * d, device=bench_device).to(other)
    inputs = [t.detach().requires_grad_() for t in (x, branch, *modulation.chunk(6, 1)[:3])]
    functions = {"fused": gated_residual_layer_norm_modulate, "eager": eager, "compile": eager}
    if bench_device.type == "cuda":
        functions |= gated_residual_layer_norm_modulate_peers()
    if types == "training":
        functions = {name: as_in_training(function, bench_device) for name, function in functions.items()}
    functions["compile"] = compiled(functions["compile"])
    variants = {name: passes(f, inputs, (dx_new, dy), direction) for name, f in functions.items()}
    variants = without_failing_peers(variants)

    def check() -> None:
        doubles = [t.detach().double() for t in inputs]
        want = list(reference.forward(*doubles))
        if direction == "both":
            x_new = want[0].to(stream).double()
            want = list(reference.backward(dx_new.double(), dy.double(), x_new, doubles[1], doubles[2], doubles[4]))
        for got, true in zip(variants["fused"](), want, strict=True):
            allowed = 2 * 2.0 ** (-24 if got.dtype == torch.float32 else -8)
            assert float((got.double() - true).norm() / true.norm()) < allowed

    stream_bytes, other_bytes = stream.itemsize, other.itemsize
    moved = (2 + 3 * (direction == "both")) * (stream_bytes + other_bytes) * x.numel()
    compare(OpCase("gated_residual_layer_norm_modulate", (b, n, d), types, direction, moved), variants, check=check)
