"""alignment_velocity_loss against the eager composition, the same compiled, and a copy of as many bytes.

    pytest benchmarks/bench_alignment_velocity_loss.py [--bench-device cuda] [--bench-json FILE]

Forward reads hidden, the velocity tokens, the latents and the noise, and writes dp and dvelocity. Backward reads dp,
hidden and dvelocity, and writes dhidden and the scaled dvelocity; W is small beside them and not counted.
`training`: hidden and the velocity tokens in bf16, W in float32 under autocast.
"""

from __future__ import annotations

import math

import pytest
import torch
from lib.op_bench import TYPES, OpCase, compiled, passes

from sra2_fast.ops.alignment_velocity_loss import alignment_velocity_loss, eager
from sra2_fast.reference import alignment_velocity_loss as reference

# B, N, K: S/2; XL/2, B/2
SHAPES = {"cpu": [(8, 256, 768)], "cuda": [(32, 256, 2304), (256, 256, 1536)], "small": [(2, 16, 96)]}
CHANNELS, PATCH = 4, 2
PATCH_ELEMENTS = PATCH * PATCH * CHANNELS
FORWARD_SCRATCH_BYTES = 2**20  # what forward may take beside dp and dvelocity


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("align", ["cosine", "smooth_l1"])
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("size", [0, 1])
def test_alignment_velocity_loss(compare, bench_device, bench_size, size, types, align, direction):
    if size >= len(SHAPES[bench_size]):
        pytest.skip("one shape on this device")
    b, n, k = SHAPES[bench_size][size]
    weight_dtype, dtype = TYPES[types]
    torch.manual_seed(0)
    shapes = ((b, n, k), (PATCH_ELEMENTS, k), (PATCH_ELEMENTS,), (b, n, PATCH_ELEMENTS))
    dtypes = (dtype, weight_dtype, weight_dtype, dtype)
    drawn = zip(shapes, dtypes, strict=True)
    trained = [torch.randn(s, device=bench_device).to(one).requires_grad_() for s, one in drawn]
    side = PATCH * math.isqrt(n)
    latents, noise = torch.randn(2, b, CHANNELS, side, side, device=bench_device)
    t = torch.rand(b, device=bench_device)
    one = torch.ones((), device=bench_device)
    settings = {"patch_size": PATCH, "align": align}

    def of(function):
        def call(*tensors):
            with torch.autocast(bench_device.type, torch.bfloat16, enabled=types == "training"):
                return function(*tensors, **settings)

        return call

    functions = {"fused": of(alignment_velocity_loss), "eager": of(eager), "compile": compiled(of(eager))}
    inputs = (*trained, latents, noise, t)
    variants = {name: passes(f, inputs, (one, one), direction) for name, f in functions.items()}

    def check() -> None:
        doubles = [x.detach().double() for x in inputs]
        doubles[1:3] = [x.to(dtype).double() for x in doubles[1:3]]  # as they are multiplied
        *want, dvelocity, dp = reference.forward(*doubles, **settings)
        if direction == "both":
            want = list(reference.backward(one.double(), one.double(), dvelocity, dp, doubles[0], doubles[1]))
        for got, true in zip(variants["fused"](), want, strict=True):
            allowed = 2.0**-14 if dtype == torch.float32 else 2.0**-6  # sums of cosines cancel
            assert float((got.double() - true).norm()) < allowed * float(true.norm()) + 2.0**-16

    element, tokens = trained[0].element_size(), b * n
    small = tokens * PATCH_ELEMENTS * element
    forward_bytes = tokens * k * element + 3 * small + 2 * latents.numel() * 4
    moved = forward_bytes + (2 * tokens * k * element + 3 * small if direction == "both" else 0)
    flops = 2 * tokens * k * PATCH_ELEMENTS * (3 if direction == "both" else 1)
    shape = (b, n, k, PATCH_ELEMENTS)
    case = OpCase("alignment_velocity_loss", shape, types, direction, moved, flops, {"align": align})
    compared = compare(case, variants, check=check)
    if direction == "forward":
        assert compared.peak_bytes["fused"] <= 2 * small + FORWARD_SCRATCH_BYTES
