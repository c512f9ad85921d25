"""alignment_velocity_loss against the eager composition, the same compiled, and a copy of as many bytes.

    pytest benchmarks/bench_alignment_velocity_loss.py [--bench-device cuda] [--bench-json FILE]

Forward reads hidden, the velocity tokens, the latents and the noise, and writes dp and dvelocity. Backward reads dp,
hidden and dvelocity, and writes dhidden and the scaled dvelocity; W is small beside them and not counted.
"""

from __future__ import annotations

import pytest
import torch
from lib.op_bench import OpCase, compiled, passes

from sra2_fast.ops.alignment_velocity_loss import alignment_velocity_loss, eager
from sra2_fast.reference import alignment_velocity_loss as reference

SHAPES = {"cpu": [(8, 256, 768)], "cuda": [(32, 256, 2304), (256, 256, 1536)]}  # B, N, K: S/2; XL/2, B/2
CHANNELS, SIDE, PATCH = 4, 32, 2
PATCH_ELEMENTS = PATCH * PATCH * CHANNELS
FORWARD_SCRATCH_BYTES = 2**20  # what forward may take beside dp and dvelocity


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("align", ["cosine", "smooth_l1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [0, 1])
def test_alignment_velocity_loss(compare, bench_device, size, dtype, align, direction):
    if size >= len(SHAPES[bench_device.type]):
        pytest.skip("one shape on this device")
    b, n, k = SHAPES[bench_device.type][size]
    torch.manual_seed(0)
    shapes = ((b, n, k), (PATCH_ELEMENTS, k), (PATCH_ELEMENTS,), (b, n, PATCH_ELEMENTS))
    trained = [torch.randn(s, device=bench_device).to(dtype).requires_grad_() for s in shapes]
    latents, noise = torch.randn(2, b, CHANNELS, SIDE, SIDE, device=bench_device)
    t = torch.rand(b, device=bench_device)
    one = torch.ones((), device=bench_device)
    settings = {"patch_size": PATCH, "align": align}

    def of(function):
        return lambda *tensors: function(*tensors, **settings)

    functions = {"fused": of(alignment_velocity_loss), "eager": of(eager), "compile": compiled(of(eager))}
    inputs = (*trained, latents, noise, t)
    variants = {name: passes(f, inputs, (one, one), direction) for name, f in functions.items()}

    def check() -> None:
        doubles = [x.detach().double() for x in inputs]
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
    case = OpCase("alignment_velocity_loss", shape, dtype, direction, moved, flops, {"align": align})
    compared = compare(case, variants, check=check)
    if direction == "forward":
        assert compared.peak_bytes["fused"] <= 2 * small + FORWARD_SCRATCH_BYTES
