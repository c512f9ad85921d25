"""The extension's CUDA C++ kernels against the float64 reference, called by their own names."""

from __future__ import annotations

import pytest
import torch
from rehearsal import sized
from tolerance import assert_close

from sra2_fast import backends
from sra2_fast.ops import layer_norm_modulate  # noqa: F401  (defines the ops)
from sra2_fast.reference import gated_residual_layer_norm_modulate as gated_reference
from sra2_fast.reference import layer_norm_modulate as norm_reference

pytestmark = pytest.mark.skipif(not backends.has_extension("cuda"), reason="the CUDA extension is not loaded")

# The last: more samples than a grid holds in y or z.
SHAPES = [(2, 256, 1152), (3, 7, 130), (1, 1, 1), (2, 5, 8192), (4, 33, 384), (65_600, 1, 64)]
SHAPES = sized(SHAPES, [(3, 7, 130), (1, 1, 1)])
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    b, _, d = shape
    modulation = torch.randn(b, 6 * d, device=device).to(dtype).chunk(6, dim=1)
    drawn = {name: torch.randn(shape, device=device).to(dtype) for name in ("x", "branch", "dy", "dx_new")}
    return {**drawn, "shift": modulation[0], "scale": modulation[1], "gate": modulation[2]}


def in_float64(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in given.items()}


def check_gradients(
    got: dict[str, torch.Tensor],
    want: dict[str, torch.Tensor],
    true: dict[str, torch.Tensor],
    stream: torch.Tensor,
    dx_new: torch.Tensor | float,
    roundings: int,
) -> None:
    """dx, dshift, dscale of a norm of `stream`; each denominator is a sum of absolute terms."""
    n, d = stream.shape[1:]
    dtype = got["dx"].dtype
    centred = stream - stream.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS)
    dy = true["dy"].abs()
    dx_terms = dy * (1 + true["scale"].abs())[:, None] * rstd + dx_new
    dscale_terms = (dy * (centred * rstd).abs()).sum(1)
    assert_close(got["dx"], want["dx"], dtype, roundings, summed=d, absolute_terms=dx_terms, name="dx")
    assert_close(got["dshift"], want["dshift"], dtype, 2, summed=n, absolute_terms=dy.sum(1), name="dshift")
    assert_close(got["dscale"], want["dscale"], dtype, 4, summed=n + d, absolute_terms=dscale_terms, name="dscale")


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm_modulate(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    given = inputs(shape, dtype, device)
    true = in_float64(given)
    ops = torch.ops.sra2_fast
    x, scale = given["x"], given["scale"]
    y, mean, rstd = ops.layer_norm_modulate_fwd_cuda(x, given["shift"], scale, EPS, dtype == torch.bfloat16)
    want = norm_reference.forward(true["x"], true["shift"], true["scale"], EPS)
    assert_close(y, want, dtype, 4, summed=shape[2], name="y")
    names = ("dx", "dshift", "dscale")
    got = ops.layer_norm_modulate_bwd_cuda(given["dy"], x, scale, mean, rstd, True, True)
    gradients = norm_reference.backward(true["dy"], true["x"], true["scale"], EPS)
    check_gradients(
        dict(zip(names, got, strict=True)), dict(zip(names, gradients, strict=True)), true, true["x"], 0.0, roundings=4
    )


@pytest.mark.parametrize("has_dx_new", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_residual_layer_norm_modulate(
    shape: tuple[int, int, int], dtype: torch.dtype, has_dx_new: bool, device: torch.device
) -> None:
    given = inputs(shape, dtype, device)
    true = in_float64(given)
    ops = torch.ops.sra2_fast
    branch, gate, scale = given["branch"], given["gate"], given["scale"]
    x_new, y, mean, rstd = ops.gated_residual_layer_norm_modulate_fwd_cuda(
        given["x"], branch, gate, given["shift"], scale, EPS, dtype == torch.bfloat16
    )
    want_x, _ = gated_reference.forward(true["x"], true["branch"], true["gate"], true["shift"], true["scale"], EPS)
    assert_close(x_new, want_x, dtype, 2, name="x_new")
    # What follows is the norm of the stream as it was stored: its rounding is not the norm's error.
    stream = x_new.double()
    want_y = norm_reference.forward(stream, true["shift"], true["scale"], EPS)
    assert_close(y, want_y, dtype, 4, summed=shape[2], name="y")
    dx_new = given["dx_new"] if has_dx_new else given["x"].new_empty(0)  # empty: no gradient arrives at x_new directly
    got = ops.gated_residual_layer_norm_modulate_bwd_cuda(
        dx_new, given["dy"], x_new, branch, gate, scale, mean, rstd, True, True, True, True
    )
    names = ("dx", "dbranch", "dgate", "dshift", "dscale")
    gradients = gated_reference.backward(
        true["dx_new"] if has_dx_new else None, true["dy"], stream, true["branch"], true["gate"], true["scale"], EPS
    )
    got_of, want_of = dict(zip(names, got, strict=True)), dict(zip(names, gradients, strict=True))
    extra = true["dx_new"].abs() if has_dx_new else 0.0
    check_gradients(got_of, want_of, true, stream, extra, roundings=5)
    centred = stream - stream.mean(-1, keepdim=True)
    rstd64 = torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS)
    terms = true["dy"].abs() * (1 + true["scale"].abs())[:, None] * rstd64 + extra
    branch_terms = terms * true["gate"].abs()[:, None]
    gate_terms = (terms * true["branch"].abs()).sum(1)
    assert_close(got_of["dbranch"], want_of["dbranch"], dtype, 6, shape[2], branch_terms, "dbranch")
    assert_close(got_of["dgate"], want_of["dgate"], dtype, 6, sum(shape[1:]), gate_terms, "dgate")


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_backward_is_bitwise_repeatable(dtype: torch.dtype, device: torch.device) -> None:
    given = inputs((4, 256, 1152), dtype, device)
    ops = torch.ops.sra2_fast
    is_bf16 = dtype == torch.bfloat16
    _, mean, rstd = ops.layer_norm_modulate_fwd_cuda(given["x"], given["shift"], given["scale"], EPS, is_bf16)
    runs = [
        ops.layer_norm_modulate_bwd_cuda(given["dy"], given["x"], given["scale"], mean, rstd, True, True)
        for _ in range(5)
    ]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
