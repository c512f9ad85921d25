"""Numbers of kernels/layer_norm_modulate.py and kernels/gated_residual_layer_norm_modulate.py, interpreted.

Run by test_triton.py in a process of its own.
"""

from __future__ import annotations

import bf16_interpreter
import pytest
import torch
from guards import between_nans, guarded_allocations
from sra2_fast.kernels import gated_residual_layer_norm_modulate as gated
from sra2_fast.kernels import layer_norm_modulate as plain
from sra2_fast.kernels import norm_rows, row_tiles
from tolerance import assert_close

from sra2_fast.reference import layer_norm_modulate as reference

bf16_interpreter.install()

EPS = 1e-6
F32, BF16 = torch.float32, torch.bfloat16
SHAPES = [(1, 1, 8), (2, 7, 100), (2, 6, 384), (3, 1, 768), (1, 6, 1152), (1, 5, 1153), (1, 2, 8191)]
# x, y and branch, modulation
TYPES = [(F32, F32, F32), (F32, BF16, BF16), (BF16, BF16, F32), (BF16, BF16, BF16)]
# In float32: mean, centring, variance and its root, two products, a sum and the store.
F32_ROUNDINGS = 8


@pytest.fixture(autouse=True)
def _a_device_of_one_multiprocessor(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that even few rows make programs of several rows, as many rows do on a real device."""
    monkeypatch.setattr(row_tiles, "ASSUMED_MULTIPROCESSORS", 1)


def roundings(dtype: torch.dtype) -> int:
    return F32_ROUNDINGS if dtype == F32 else 1


def tensors(shape: tuple[int, int, int], types: tuple[torch.dtype, ...]) -> dict[str, torch.Tensor]:
    """Random operands; the modulations are slices of one matrix, all memory is surrounded by NaNs."""
    x_type, y_type, modulation_type = types
    B, N, D = shape
    conditioning = between_nans(torch.randn(B, 6 * D).to(modulation_type))
    slices = dict(
        zip(("shift", "scale", "gate"), (conditioning[:, i * D : (i + 1) * D] for i in (0, 3, 5)), strict=True)
    )
    x = 2 * torch.randn(B, N, D) + 0.5
    draws = {"x": x.to(x_type), "dx_new": torch.randn(B, N, D).to(x_type)}
    draws |= {name: torch.randn(B, N, D).to(y_type) for name in ("branch", "dy")}
    return slices | {name: between_nans(value) for name, value in draws.items()}


def check_gradient_sums(dshift: torch.Tensor, dscale: torch.Tensor, dy: torch.Tensor, normalized: torch.Tensor) -> None:
    """Both against float64, relative to the sums of absolute terms over the N tokens."""
    N, dtype = dy.shape[1], dshift.dtype
    terms = dy.double() * normalized
    assert_close(dshift, dy.double().sum(1), dtype, 1, N, dy.double().abs().sum(1), name="dshift")
    assert_close(dscale, terms.sum(1), dtype, roundings(dtype), N + dy.shape[2], terms.abs().sum(1), name="dscale")


@pytest.mark.parametrize("types", TYPES[:3])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_modulate(shape: tuple[int, int, int], types: tuple[torch.dtype, ...]) -> None:
    given = tensors(shape, types)
    x, shift, scale, dy = (given[name] for name in ("x", "shift", "scale", "dy"))
    D = shape[2]
    with guarded_allocations():
        y, mean, rstd = plain.layer_norm_modulate_fwd(x, shift, scale, EPS, types[1])
        dx, dshift, dscale = plain.layer_norm_modulate_bwd(dy, x, scale, mean, rstd)
    assert (y.dtype, dx.dtype, dshift.dtype, dscale.dtype) == (types[1], types[0], types[2], types[2])
    want_y = reference.forward(x.double(), shift.double(), scale.double(), EPS)
    want_dx, _, _ = reference.backward(dy.double(), x.double(), scale.double(), EPS)
    normalized, want_rstd = reference.normalize(x.double(), EPS)
    assert_close(mean, x.double().mean(-1), F32, 2, D, name="mean")
    assert_close(rstd, want_rstd[..., 0], F32, F32_ROUNDINGS, D, name="rstd")
    assert_close(y, want_y, types[1], roundings(types[1]), D, name="y")
    assert_close(dx, want_dx, types[0], roundings(types[0]), D, name="dx")
    check_gradient_sums(dshift, dscale, dy, normalized)


@pytest.mark.parametrize(
    ("types", "has_dx_new"), [(TYPES[0], False), (TYPES[1], True), (TYPES[3], False), (TYPES[2], True)]
)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4], SHAPES[5]])
def test_gated_residual(shape: tuple[int, int, int], types: tuple[torch.dtype, ...], has_dx_new: bool) -> None:
    given = tensors(shape, types)
    x, branch, gate, shift, scale, dy = (given[n] for n in ("x", "branch", "gate", "shift", "scale", "dy"))
    dx_new = given["dx_new"] if has_dx_new else None
    D = shape[2]
    with guarded_allocations():
        x_new, y, mean, rstd = gated.gated_residual_layer_norm_modulate_fwd(
            x, branch, gate, shift, scale, EPS, types[1]
        )
        dx, dbranch, dgate, dshift, dscale = gated.gated_residual_layer_norm_modulate_bwd(
            dx_new, dy, x_new, branch, gate, scale, mean, rstd
        )
    assert (x_new.dtype, y.dtype, dx.dtype, dbranch.dtype) == (types[0], types[1], types[0], types[1])
    assert (dgate.dtype, dshift.dtype, dscale.dtype) == (types[2],) * 3
    want_x_new = x.double() + gate.double()[:, None] * branch.double()
    assert_close(x_new, want_x_new, types[0], 2 if types[0] == F32 else 1, name="x_new")
    # The norm is that of x_new as stored.
    stored = x_new.double()
    assert_close(
        y, reference.forward(stored, shift.double(), scale.double(), EPS), types[1], roundings(types[1]), D, name="y"
    )
    total, _, _ = reference.backward(dy.double(), stored, scale.double(), EPS)
    if has_dx_new:
        total = total + dx_new.double()
    terms = branch.double() * total
    assert_close(dx, total, types[0], roundings(types[0]), D, name="dx")
    assert_close(dbranch, gate.double()[:, None] * total, types[1], roundings(types[1]), D, name="dbranch")
    in_sums = D + shape[1]
    assert_close(dgate, terms.sum(1), types[2], roundings(types[2]), in_sums, terms.abs().sum(1), name="dgate")
    check_gradient_sums(dshift, dscale, dy, reference.normalize(stored, EPS)[0])


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_what_is_not_needed_is_none_and_the_rest_is_the_same(needs: tuple[bool, bool]) -> None:
    given = tensors((2, 7, 100), TYPES[1])
    _, mean, rstd = plain.layer_norm_modulate_fwd(given["x"], given["shift"], given["scale"], EPS, BF16)
    arguments = given["dy"], given["x"], given["scale"], mean, rstd
    check_same_or_none(plain.layer_norm_modulate_bwd, arguments, needs, (needs[0], needs[1], needs[1]))


@pytest.mark.parametrize("has_dx_new", [True, False])
@pytest.mark.parametrize("needs", [*([i == j for j in range(4)] for i in range(4)), [True, False, True, False]])
def test_gated_what_is_not_needed_is_none_and_the_rest_is_the_same(needs: list[bool], has_dx_new: bool) -> None:
    given = tensors((2, 7, 100), TYPES[2])
    modulation = given["gate"], given["shift"], given["scale"]
    x_new, _, mean, rstd = gated.gated_residual_layer_norm_modulate_fwd(
        given["x"], given["branch"], *modulation, EPS, BF16
    )
    dx_new = given["dx_new"] if has_dx_new else None
    arguments = dx_new, given["dy"], x_new, given["branch"], given["gate"], given["scale"], mean, rstd
    check_same_or_none(gated.gated_residual_layer_norm_modulate_bwd, arguments, needs, (*needs, needs[3]))


def check_same_or_none(backward, arguments, needs, wanted) -> None:
    everything = backward(*arguments)
    for got, want, needed in zip(backward(*arguments, *needs), everything, wanted, strict=True):
        assert torch.equal(got, want) if needed else got is None


def test_many_slices_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than one program takes: partial sums of several programs, the last one ragged."""
    monkeypatch.setattr(row_tiles, "ASSUMED_MULTIPROCESSORS", 3)
    x, dy = torch.randn(1, 101, 40), torch.randn(1, 101, 40)
    scale, shift = torch.randn(1, 40), torch.randn(1, 40)
    config = plain.launch_config(101, 40, F32)
    slices, slice_rows = row_tiles.cut_samples(1, 101, config.backward.rows, norm_rows.BACKWARD_PROGRAMS * 3)
    assert config.backward.rows > 1 and slices > 2 and 101 % slice_rows != 0
    _, mean, rstd = plain.layer_norm_modulate_fwd(x, shift, scale, EPS, F32)
    _, dshift, dscale = plain.layer_norm_modulate_bwd(dy, x, scale, mean, rstd)
    check_gradient_sums(dshift, dscale, dy, reference.normalize(x.double(), EPS)[0])


@pytest.mark.parametrize("shape", [(0, 4, 64), (2, 0, 64)])
def test_empty_batches_launch_nothing(shape: tuple[int, int, int]) -> None:
    B, N, D = shape
    x, c = torch.empty(shape), torch.empty(B, D)
    y, mean, rstd = plain.layer_norm_modulate_fwd(x, c, c, EPS, BF16)
    assert y.shape == shape and mean.shape == rstd.shape == (B, N)
    dx, *sums = plain.layer_norm_modulate_bwd(y, x, c, mean, rstd)
    x_new, y, mean, rstd = gated.gated_residual_layer_norm_modulate_fwd(x, x, c, c, c, EPS, F32)
    dx, dbranch, *more = gated.gated_residual_layer_norm_modulate_bwd(None, y, x_new, x, c, c, mean, rstd)
    assert dx.shape == dbranch.shape == shape
    assert all(torch.equal(total, torch.zeros(B, D)) for total in sums + more)


def test_equal_runs_are_bitwise_equal() -> None:
    given = tensors((2, 33, 200), TYPES[1])
    results = []
    for _ in range(2):
        _, mean, rstd = plain.layer_norm_modulate_fwd(given["x"], given["shift"], given["scale"], EPS, BF16)
        results.append(plain.layer_norm_modulate_bwd(given["dy"], given["x"], given["scale"], mean, rstd))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_sample_reads_only_its_own_modulation() -> None:
    """Zeroing sample 0's scale and shift changes its rows and no others."""
    given = tensors((3, 5, 96), TYPES[0])
    before, _, _ = plain.layer_norm_modulate_fwd(given["x"], given["shift"], given["scale"], EPS, F32)
    given["shift"][0], given["scale"][0] = 0.0, 0.0
    after, _, _ = plain.layer_norm_modulate_fwd(given["x"], given["shift"], given["scale"], EPS, F32)
    assert torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0], after[0])
    assert_close(after[0], reference.normalize(given["x"][0].double(), EPS)[0], F32, F32_ROUNDINGS, 96)
