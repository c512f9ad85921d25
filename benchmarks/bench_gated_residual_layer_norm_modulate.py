"""gated_residual_layer_norm_modulate against gate + add + `F.layer_norm` + modulate, the same compiled, and a copy.

    pytest benchmarks/bench_gated_residual_layer_norm_modulate.py [--bench-device cuda] [--bench-json FILE]

Forward reads x and branch and writes x' and y; backward reads dx', dy, x' and branch and writes dx and dbranch.
"""

from __future__ import annotations

import pytest
import torch
from lib.op_bench import OpCase, compiled, passes
from lib.peers import liger_gated_residual_layer_norm_modulate

from sra2_fast.ops.gated_residual_layer_norm_modulate import eager, gated_residual_layer_norm_modulate
from sra2_fast.reference import gated_residual_layer_norm_modulate as reference

SHAPES = {"cpu": [(8, 256, 384), (4, 256, 1152)], "cuda": [(32, 256, 1152), (256, 256, 768)]}
TENSORS_MOVED = {"forward": 4, "backward": 6, "both": 10}


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [0, 1])
def test_gated_residual_layer_norm_modulate(compare, bench_device, size, dtype, direction):
    b, n, d = SHAPES[bench_device.type][size]
    x, branch, dx_new, dy = torch.randn(4, b, n, d, device=bench_device).to(dtype).unbind()
    modulation = torch.randn(b, 6 * d, device=bench_device).to(dtype)
    inputs = [t.detach().requires_grad_() for t in (x, branch, *modulation.chunk(6, 1)[:3])]
    functions = {
        "fused": gated_residual_layer_norm_modulate,
        "eager": eager,
        "compile": compiled(eager),
    }
    if bench_device.type == "cuda" and (liger := liger_gated_residual_layer_norm_modulate()) is not None:
        functions["liger"] = liger
    variants = {name: passes(f, inputs, (dx_new, dy), direction) for name, f in functions.items()}

    def check() -> None:
        doubles = [t.detach().double() for t in inputs]
        want = list(reference.forward(*doubles))
        if direction == "both":
            x_new = want[0].to(dtype).double()
            want = list(reference.backward(dx_new.double(), dy.double(), x_new, doubles[1], doubles[2], doubles[4]))
        for got, true in zip(variants["fused"](), want, strict=True):
            allowed = 2 * 2.0 ** (-24 if dtype == torch.float32 else -8)
            assert float((got.double() - true).norm() / true.norm()) < allowed

    moved = TENSORS_MOVED[direction] * x.numel() * x.element_size()
    compare(OpCase("gated_residual_layer_norm_modulate", (b, n, d), dtype, direction, moved), variants, check=check)
