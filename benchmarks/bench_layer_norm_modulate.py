"""layer_norm_modulate against `F.layer_norm` + modulate, the same compiled, and a copy of as many bytes.

    pytest benchmarks/bench_layer_norm_modulate.py [--bench-device cuda] [--bench-json FILE]

Forward reads x and writes y; backward reads x and dy and writes dx. The rest is (B, D) or (B, N), and not counted.
"""

from __future__ import annotations

import pytest
import torch
from lib.op_bench import OpCase, compiled, passes
from lib.peers import liger_layer_norm_modulate

from sra2_fast.ops.layer_norm_modulate import eager, layer_norm_modulate
from sra2_fast.reference import layer_norm_modulate as reference

SHAPES = {"cpu": [(8, 256, 384), (4, 256, 1152)], "cuda": [(32, 256, 1152), (256, 256, 768)]}
TENSORS_MOVED = {"forward": 2, "backward": 3, "both": 5}


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [0, 1])
def test_layer_norm_modulate(compare, bench_device, size, dtype, direction):
    b, n, d = SHAPES[bench_device.type][size]
    x = torch.randn(b, n, d, device=bench_device).to(dtype).requires_grad_()
    shift, scale = (
        chunk.detach().requires_grad_()
        for chunk in torch.randn(b, 6 * d, device=bench_device).to(dtype).chunk(6, 1)[:2]
    )
    dy = torch.randn(b, n, d, device=bench_device).to(dtype)
    functions = {"fused": layer_norm_modulate, "eager": eager, "compile": compiled(eager)}
    if bench_device.type == "cuda" and (liger := liger_layer_norm_modulate()) is not None:
        functions["liger"] = liger
    variants = {name: passes(f, (x, shift, scale), (dy,), direction) for name, f in functions.items()}

    def check() -> None:
        doubles = [t.detach().double() for t in (x, shift, scale)]
        want = [reference.forward(*doubles)]
        if direction == "both":
            want = list(reference.backward(dy.double(), doubles[0], doubles[2]))
        for got, true in zip(variants["fused"](), want, strict=True):
            allowed = 2 * 2.0 ** (-24 if dtype == torch.float32 else -8)
            assert float((got.double() - true).norm() / true.norm()) < allowed

    moved = TENSORS_MOVED[direction] * x.numel() * x.element_size()
    compare(OpCase("layer_norm_modulate", (b, n, d), dtype, direction, moved), variants, check=check)
