"""layer_norm_modulate: the reference by finite differences, the op against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close, relative_error

from sra2_fast import backends, ops
from sra2_fast.errors import InputError, InputTypeError
from sra2_fast.ops.layer_norm_modulate import eager
from sra2_fast.reference import layer_norm_modulate as reference

F32, BF16 = torch.float32, torch.bfloat16
EPS = 1e-6
SHAPES = [(2, 1, 64), (3, 5, 31), (2, 33, 200), (2, 70, 384), (1, 3, 1152), (1, 2, 8192)]
TYPES = [(F32, F32, F32), (F32, BF16, BF16), (BF16, BF16, BF16), (BF16, F32, BF16), (F32, F32, BF16)]
needs_extension = pytest.mark.skipif(not backends.has_extension("cpu"), reason="the extension is not built")


def make_inputs(shape, x_dtype=F32, modulation_dtype=F32) -> list[torch.Tensor]:
    """x and two slices of one conditioning matrix, all requiring gradients."""
    b, _, d = shape
    x = (torch.randn(shape) * torch.rand(shape[1], 1).add(0.1) + torch.randn(shape[1], 1)).to(x_dtype)
    _, shift, scale = torch.randn(b, 3 * d).to(modulation_dtype).chunk(3, dim=1)
    return [t.requires_grad_() for t in (x, shift, scale)]


def doubles(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.detach().double() for t in tensors]


def run(x, shift, scale, y_dtype, dy=None):
    """(y, dy, gradients) of the op, y_dtype by autocast where it is not x's."""
    with torch.autocast("cpu", BF16, enabled=y_dtype != x.dtype):
        y = ops.layer_norm_modulate(x, shift, scale, EPS)
    assert y.dtype == y_dtype
    dy = torch.randn_like(y) if dy is None else dy
    return y, dy, torch.autograd.grad(y, (x, shift, scale), dy)


class Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, scale):
        ctx.save_for_backward(x, scale)
        return reference.forward(x, shift, scale, 0.01)

    @staticmethod
    def backward(ctx, dy):
        return reference.backward(dy, *ctx.saved_tensors, 0.01)


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 1, 7), (2, 2, 1)])
def test_reference_gradients_are_those_of_finite_differences(shape):
    x, shift, scale = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (shape, *[shape[::2]] * 2))
    assert torch.autograd.gradcheck(Reference.apply, (x, shift, scale))


def test_reference_is_the_eager_composition():
    x, shift, scale = doubles(*make_inputs((2, 5, 31)))
    assert_close(reference.forward(x, shift, scale, EPS), eager(x, shift, scale, EPS), torch.float64, 8, 31)


@pytest.mark.parametrize(("x_dtype", "modulation_dtype", "y_dtype"), TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_op_against_reference(shape, x_dtype, modulation_dtype, y_dtype):
    x, shift, scale = make_inputs(shape, x_dtype, modulation_dtype)
    y, dy, (dx, dshift, dscale) = run(x, shift, scale, y_dtype)
    n, d = shape[1:]
    xd, shift_d, scale_d, dyd = doubles(x, shift, scale, dy)
    assert_close(y, reference.forward(xd, shift_d, scale_d, EPS), y_dtype, 4 if y_dtype == F32 else 1, d, name="y")
    want_dx, want_dshift, want_dscale = reference.backward(dyd, xd, scale_d, EPS)
    h = reference.normalize(xd, EPS)[0]
    assert_close(dx, want_dx, x_dtype, 8 if x_dtype == F32 else 1, d, name="dx")
    k = 3 if modulation_dtype == F32 else 1
    assert_close(dshift, want_dshift, modulation_dtype, k, n, dyd.abs().sum(1), name="dshift")
    assert_close(dscale, want_dscale, modulation_dtype, k, n + d, (dyd * h).abs().sum(1), name="dscale")
    assert dx.dtype == x_dtype and dshift.dtype == dscale.dtype == modulation_dtype


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("offset", [0.0, 300.0], ids=["centred", "mean far from zero"])
def test_no_less_accurate_than_eager(dtype, offset):
    x, shift, scale = make_inputs((2, 64, 384), dtype, dtype)
    x = (x.detach() + offset).requires_grad_()
    y, dy, gradients = run(x, shift, scale, dtype)
    y_eager = eager(x, shift, scale, EPS)
    of_eager = torch.autograd.grad(y_eager, (x, shift, scale), dy)
    want = reference.forward(*doubles(x, shift, scale), EPS)
    assert relative_error(y.detach(), want)[0] <= 1.05 * relative_error(y_eager.detach(), want)[0]
    wanted = reference.backward(*doubles(dy, x, scale), EPS)
    for got, other, true in zip(gradients, of_eager, wanted, strict=True):
        assert relative_error(got, true)[0] <= 1.05 * relative_error(other, true)[0] + 2.0**-24


@needs_extension
@pytest.mark.parametrize("x_dtype", [F32, BF16])
def test_rounding_to_bf16_is_torchs_bit_for_bit(x_dtype):
    """With scale = -1 every y is its shift: ties, subnormals, overflow, infinities and NaN of any payload."""
    bits = torch.randint(-(2**31), 2**31 - 1, (1, 4099))
    special = [0x00008000, 0x00018000, 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800001, 0x7FFFFFFF, 0x7F800000, 1]
    bits[0, : len(special)] = torch.tensor(special)
    bits[0, 100 : 100 + len(special)] = torch.tensor(special) - 2**31
    shift = bits.to(torch.int32).view(F32)
    x = torch.randn(1, 1, 4099).to(x_dtype)
    with torch.autocast("cpu", BF16):
        y = ops.layer_norm_modulate(x, shift, -torch.ones_like(shift))[0]
    want = shift.to(BF16)
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y[~want.isnan()].view(torch.int16), want[~want.isnan()].view(torch.int16))


def test_rows_of_one_element_are_their_shift():
    x, shift, scale = make_inputs((2, 3, 1))
    y, dy, (dx, dshift, dscale) = run(x, shift, scale, F32)
    assert torch.equal(y, shift[:, None].expand_as(y))
    # dx is a difference of two equal numbers of size rstd |g|, with rstd = eps^-1/2
    assert (dx.abs() <= 2.0**-22 * EPS**-0.5 * (dy * (1 + scale[:, None])).abs()).all()
    assert torch.equal(dscale, torch.zeros_like(scale))
    assert_close(dshift, dy.double().sum(1), F32, 3)


def test_a_bad_row_spoils_no_other():
    x, shift, scale = make_inputs((1, 9, 40))
    with torch.no_grad():
        x[0, 4, 7], x[0, 6, 3] = float("nan"), float("inf")
        y = ops.layer_norm_modulate(x, shift, scale)
    assert y[0, 4].isnan().all() and y[0, 6].isnan().all()
    good = [0, 1, 2, 3, 5, 7, 8]
    assert_close(y[:, good], reference.forward(*doubles(x, shift, scale), EPS)[:, good], F32, 4, 40)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_strided_inputs_and_gradients(dtype):
    wide = torch.randn(2, 12, 3, 40).to(dtype)
    x = wide[:, ::2, 1].requires_grad_()
    _, shift, scale = make_inputs((2, 6, 40), dtype, dtype)
    y, dy, gradients = run(x, shift, scale, dtype, dy=torch.randn(2, 40, 6).to(dtype).transpose(1, 2))
    dense = [t.detach().clone().requires_grad_() for t in (x, shift, scale)]
    y_dense, _, gradients_dense = run(*dense, dtype, dy=dy.contiguous())
    assert torch.equal(y, y_dense)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_dense, strict=True))
    expanded = torch.autograd.grad(ops.layer_norm_modulate(*dense).sum(), dense)
    ones = torch.autograd.grad(ops.layer_norm_modulate(*dense), dense, torch.ones_like(y_dense))
    assert all(torch.equal(a, b) for a, b in zip(expanded, ones, strict=True))


def test_empty_batch():
    x, shift, scale = make_inputs((0, 5, 16))
    y, _, (dx, dshift, dscale) = run(x, shift, scale, F32)
    assert y.shape == dx.shape == (0, 5, 16) and dshift.shape == dscale.shape == (0, 16)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_same_bits_every_run_and_for_any_number_of_threads(dtype):
    x, shift, scale = make_inputs((3, 130, 200), dtype, dtype)
    dy = torch.randn(3, 130, 200).to(dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 1, 2, 3, 7):
            torch.set_num_threads(count)
            y, _, gradients = run(x, shift, scale, dtype, dy)
            results.append((y, *gradients))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_the_gradients_asked_for(wanted):
    inputs = make_inputs((2, 5, 24))
    dy = torch.randn(2, 5, 24)
    everything = torch.autograd.grad(ops.layer_norm_modulate(*inputs), inputs, dy)
    some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    ops.layer_norm_modulate(*some).backward(dy)
    for i, t in enumerate(some):
        assert (t.grad is None) == (i not in wanted)
        assert t.grad is None or torch.equal(t.grad, everything[i])


@needs_extension
def test_what_is_not_wanted_is_not_computed():
    x, _, scale = doubles(*make_inputs((2, 5, 24)))
    arguments = (torch.randn(2, 5, 24), x.float(), scale.float(), torch.zeros(2, 5), torch.ones(2, 5))
    bwd = torch.ops.sra2_fast.layer_norm_modulate_bwd
    assert [t.numel() for t in bwd(*arguments, False, True)] == [0, 48, 48]
    assert [t.numel() for t in bwd(*arguments, True, False)] == [240, 0, 0]


@needs_extension
def test_second_derivatives_are_refused():
    """Without the refusal they would be zero, with a warning."""
    x, shift, scale = make_inputs((2, 5, 24))
    y = ops.layer_norm_modulate(x, shift, scale)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_compiled(dtype):
    torch._dynamo.reset()
    inputs = make_inputs((2, 9, 48), dtype, dtype)
    dy = torch.randn(2, 9, 48).to(dtype)
    compiled = torch.compile(ops.layer_norm_modulate, fullgraph=True)
    y, y_compiled = ops.layer_norm_modulate(*inputs), compiled(*inputs)
    assert torch.equal(y, y_compiled)
    for a, b in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(y_compiled, inputs, dy), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad(), torch.autocast("cpu", BF16):
        assert compiled(*inputs).dtype == BF16


@needs_extension
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_opcheck(dtype):
    x, shift, scale = (t.detach() for t in make_inputs((2, 5, 24), dtype, dtype))
    torch.library.opcheck(torch.ops.sra2_fast.layer_norm_modulate_fwd.default, (x, shift, scale, EPS, dtype == BF16))
    statistics = torch.randn(2, 5), torch.rand(2, 5)
    for needs in [(True, True), (True, False), (False, True)]:
        bwd = torch.ops.sra2_fast.layer_norm_modulate_bwd.default
        torch.library.opcheck(bwd, (x, x, scale, *statistics, *needs))


def bad(**changes) -> dict[str, object]:
    x, shift, scale = (t.detach() for t in make_inputs((2, 5, 24)))
    return {"x": x, "shift": shift, "scale": scale, **changes}


BAD_INPUT = [
    (bad(x=[1.0]), InputTypeError, r"layer_norm_modulate: x must be a tensor, got list"),
    (bad(x=torch.ones(5, 24)), InputError, r"x must be \(B, N, D\), got \(5, 24\)"),
    (bad(x=torch.ones(2, 0, 24)), InputError, r"x must be \(B, N, D\) with at least one row, got \(2, 0, 24\)"),
    (
        bad(x=torch.ones(2, 5, 9000)),
        InputError,
        r"D from 1 to 8192 \(implementation=\"eager\" takes more\), got \(2, 5,",
    ),
    (
        bad(x=torch.ones(2, 5, 24, dtype=torch.float16)),
        InputTypeError,
        r"x must be float32 or bfloat16 \(implementation=",
    ),
    (
        bad(x=torch.ones(2, 5, 24, dtype=torch.int64)),
        InputTypeError,
        r"x must be float32 or bfloat16 .* got torch.int64",
    ),
    (bad(x=torch.ones(2, 5, 48)[..., ::2]), InputError, r"x must be of stride 1 in its last dimension .* got stride 2"),
    (bad(shift=torch.ones(2, 25)), InputError, r"shift must be \(B, D\) = \(2, 24\), got \(2, 25\)"),
    (bad(scale=torch.ones(3, 24)), InputError, r"scale must be \(B, D\) = \(2, 24\), got \(3, 24\)"),
    (bad(scale=torch.ones(24, 2).T), InputError, r"scale must be of stride 1 in its last dimension .* got stride 2"),
    (bad(scale=torch.ones(2, 24).double()), InputTypeError, r"scale must be float32 or bfloat16 .* got torch.float64"),
    (bad(shift=torch.ones(2, 24, device="meta")), InputError, r"shift must be on cpu like x, got meta"),
    (bad(shift=None), InputTypeError, r"shift must be a tensor, got NoneType"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_INPUT)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.layer_norm_modulate(**arguments)


def test_float16_autocast_is_refused():
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(InputTypeError, match="the autocast dtype must be bfloat16"),
    ):
        ops.layer_norm_modulate(**bad())


CXX_BAD_INPUT = [
    ((torch.ones(5, 24), torch.ones(2, 24), torch.ones(2, 24)), r"x must be \(B, N, D\), got \(5, 24\)"),
    ((torch.ones(2, 5, 24), torch.ones(2, 23), torch.ones(2, 24)), r"shift must be \(2, 24\), got \(2, 23\)"),
    ((torch.ones(2, 5, 24), torch.ones(2, 24), torch.ones(24)), r"scale must be \(2, 24\), got \(24,\)"),
    (
        (torch.ones(2, 5, 24).half(), torch.ones(2, 24), torch.ones(2, 24)),
        r"x must be float32 or bfloat16, got torch.f",
    ),
    ((torch.ones(2, 5, 24), torch.ones(2, 48)[:, ::2], torch.ones(2, 24)), r"shift must be of stride 1 in the last"),
    (
        (torch.ones(5, 2, 24).transpose(0, 1), torch.ones(2, 24), torch.ones(2, 24)),
        r"x must be contiguous, got a strided",
    ),
    ((torch.ones(2, 5, 9000), torch.ones(2, 9000), torch.ones(2, 9000)), r"D must be from 1 to 8192, got 9000"),
]


@needs_extension
@pytest.mark.parametrize(("arguments", "message"), CXX_BAD_INPUT)
def test_bad_input_from_cxx(arguments, message):
    with pytest.raises(RuntimeError, match="layer_norm_modulate: " + message):
        torch.ops.sra2_fast.layer_norm_modulate_fwd(*arguments, EPS, False)


@needs_extension
def test_bad_gradient_from_cxx():
    x, shift, scale = bad().values()
    _, mean, rstd = torch.ops.sra2_fast.layer_norm_modulate_fwd(x, shift, scale, EPS, False)
    bwd = torch.ops.sra2_fast.layer_norm_modulate_bwd
    with pytest.raises(RuntimeError, match=r"dy must be \(2, 5, 24\), got \(2, 5, 25\)"):
        bwd(torch.ones(2, 5, 25), x, scale, mean, rstd, True, True)
    with pytest.raises(RuntimeError, match="dy must be contiguous, got a strided tensor"):
        bwd(torch.ones(5, 2, 24).transpose(0, 1), x, scale, mean, rstd, True, True)
    with pytest.raises(RuntimeError, match=r"rstd must be float32, got torch.bfloat16"):
        bwd(x, x, scale, mean, rstd.to(BF16), True, True)
