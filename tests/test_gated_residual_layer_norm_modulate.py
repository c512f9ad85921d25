"""gated_residual_layer_norm_modulate: the reference by finite differences, the op against it in float64.

What it shares with layer_norm_modulate (rounding, bad rows, argument forms) is tested there once.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from tolerance import assert_close, relative_error

from sra2_fast import backends, ops
from sra2_fast.errors import InputError, InputTypeError
from sra2_fast.ops.gated_residual_layer_norm_modulate import eager
from sra2_fast.reference import gated_residual_layer_norm_modulate as reference
from sra2_fast.reference.layer_norm_modulate import normalize

F32, BF16 = torch.float32, torch.bfloat16
EPS = 1e-6
SHAPES = [(2, 1, 64), (3, 5, 31), (2, 33, 200), (2, 70, 384), (1, 3, 1152), (1, 2, 8192)]
# x, branch, modulation, y: the last two are what a model under autocast has
TYPES = [
    (F32, F32, F32, F32),
    (BF16, BF16, BF16, BF16),
    (BF16, F32, F32, BF16),
    (BF16, BF16, F32, BF16),
    (F32, BF16, F32, F32),
    (F32, F32, BF16, BF16),
    (F32, BF16, BF16, BF16),
]
NAMES = ("dx", "dbranch", "dgate", "dshift", "dscale")
needs_extension = pytest.mark.skipif(not backends.has_extension("cpu"), reason="the extension is not built")


def make_inputs(shape, x_dtype=F32, branch_dtype=F32, modulation_dtype=F32) -> list[torch.Tensor]:
    """x, branch and three slices of one conditioning matrix, all requiring gradients."""
    x, branch = torch.randn(shape).to(x_dtype), torch.randn(shape).to(branch_dtype)
    modulation = torch.randn(shape[0], 6 * shape[2]).to(modulation_dtype).chunk(6, dim=1)
    return [t.requires_grad_() for t in (x, branch, *modulation[2:5])]


def doubles(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.detach().double() for t in tensors]


def run(inputs, y_dtype, output_gradients=None):
    """(outputs, output gradients, gradients) of the op, y_dtype by autocast where it is not x's."""
    with torch.autocast("cpu", BF16, enabled=y_dtype != inputs[0].dtype):
        outputs = ops.gated_residual_layer_norm_modulate(*inputs, EPS)
    assert outputs[0].dtype == inputs[0].dtype and outputs[1].dtype == y_dtype
    output_gradients = output_gradients or [torch.randn_like(t) for t in outputs]
    return outputs, output_gradients, torch.autograd.grad(outputs, inputs, output_gradients)


class Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, gate, shift, scale):
        x_new, y = reference.forward(x, branch, gate, shift, scale, 0.01)
        ctx.save_for_backward(x_new, branch, gate, scale)
        return x_new, y

    @staticmethod
    def backward(ctx, dx_new, dy):
        return reference.backward(dx_new, dy, *ctx.saved_tensors, 0.01)


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 1, 7)])
def test_reference_gradients_are_those_of_finite_differences(shape):
    sizes = (shape, shape, *[shape[::2]] * 3)
    assert torch.autograd.gradcheck(
        Reference.apply, [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in sizes]
    )


def test_reference_is_the_eager_composition():
    inputs = doubles(*make_inputs((2, 5, 31)))
    for got, want in zip(reference.forward(*inputs, EPS), eager(*inputs, EPS), strict=True):
        assert_close(got, want, torch.float64, 8, 31)


@pytest.mark.parametrize(("x_dtype", "branch_dtype", "modulation_dtype", "y_dtype"), TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_op_against_reference(shape, x_dtype, branch_dtype, modulation_dtype, y_dtype):
    inputs = make_inputs(shape, x_dtype, branch_dtype, modulation_dtype)
    (x_new, y), output_gradients, gradients = run(inputs, y_dtype)
    n, d = shape[1:]
    want_x_new, _ = reference.forward(*doubles(*inputs), EPS)
    assert_close(x_new, want_x_new, x_dtype, 2 if x_dtype == F32 else 1, name="x_new")
    # y and the gradients are those at the x_new that was returned: its rounding is counted once, above
    x_new_d, branch, gate, shift, scale = doubles(x_new, *inputs[1:])
    want_y = normalize(x_new_d, EPS)[0] * (1 + scale[:, None]) + shift[:, None]
    assert_close(y, want_y, y_dtype, 4 if y_dtype == F32 else 1, d, name="y")

    dx_new, dy = doubles(*output_gradients)
    want = reference.backward(dx_new, dy, x_new_d, branch, gate, scale, EPS)
    terms = (None, None, branch * want[0], dy, dy * normalize(x_new_d, EPS)[0])
    for name, got, true, summed in zip(NAMES, gradients, want, terms, strict=True):
        absolute = None if summed is None else summed.abs().sum(1)
        assert_close(got, true, got.dtype, 9 if got.dtype == F32 else 1, n + d, absolute, name=name)
    assert [g.dtype for g in gradients] == [x_dtype, branch_dtype, *[modulation_dtype] * 3]


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_no_less_accurate_than_eager(dtype):
    inputs = make_inputs((2, 64, 384), dtype, dtype, dtype)
    outputs, output_gradients, gradients = run(inputs, dtype)
    outputs_eager = eager(*inputs, EPS)
    of_eager = torch.autograd.grad(outputs_eager, inputs, output_gradients)
    exact = reference.forward(*doubles(*inputs), EPS)
    exact_gradients = reference.backward(*doubles(*output_gradients), exact[0], *doubles(*inputs[1:3], inputs[4]), EPS)
    pairs = zip((*outputs, *gradients), (*outputs_eager, *of_eager), (*exact, *exact_gradients), strict=True)
    for got, other, true in pairs:
        ours, eagers = relative_error(got.detach(), true)[0], relative_error(other.detach(), true)[0]
        assert ours <= 1.05 * eagers + 2.0**-24


@pytest.mark.parametrize("used", [0, 1], ids=["x' only", "y only"])
def test_an_output_that_goes_nowhere(used):
    inputs = make_inputs((2, 5, 40))
    d_used = torch.randn(2, 5, 40)
    got = torch.autograd.grad(ops.gated_residual_layer_norm_modulate(*inputs)[used], inputs, d_used, allow_unused=True)
    zero = torch.zeros_like(d_used)
    _, branch, gate, _, scale = doubles(*inputs)
    x_new = reference.forward(*doubles(*inputs), EPS)[0]
    want = reference.backward(*doubles(*((d_used, zero) if used == 0 else (zero, d_used))), x_new, branch, gate, scale)
    absolute = (None, None, (branch * want[0]).abs().sum(1), d_used.abs().sum(1), None)
    for name, g, true, terms in zip(NAMES, got, want, absolute, strict=True):
        if true.any():
            assert_close(g, true, F32, 9, 45, terms, name=name)
        else:
            assert g is None or not g.any()


@pytest.mark.parametrize("wanted", list(itertools.combinations(range(5), 2)))
def test_only_the_gradients_asked_for(wanted):
    inputs = make_inputs((2, 5, 24))
    output_gradients = [torch.randn(2, 5, 24), torch.randn(2, 5, 24)]
    everything = run(inputs, F32, output_gradients)[2]
    some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    torch.autograd.backward(ops.gated_residual_layer_norm_modulate(*some), output_gradients)
    for i, t in enumerate(some):
        assert (t.grad is None) == (i not in wanted)
        assert t.grad is None or torch.equal(t.grad, everything[i])


@needs_extension
def test_what_is_not_wanted_is_not_computed():
    x, branch, gate, _, scale = (t.detach() for t in make_inputs((2, 5, 24)))
    bwd = torch.ops.sra2_fast.gated_residual_layer_norm_modulate_bwd
    statistics = torch.zeros(2, 5), torch.ones(2, 5)
    sizes = (240, 240, 48, 48, 48)
    for needs in itertools.product([False, True], repeat=4):
        got = bwd(x.new_empty(0), x, x, branch, gate, scale, *statistics, *needs)
        assert [t.numel() for t in got] == [s * n for s, n in zip(sizes, (*needs, needs[3]), strict=True)]


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_same_bits_every_run_and_for_any_number_of_threads(dtype):
    inputs = make_inputs((3, 130, 200), dtype, dtype, dtype)
    output_gradients = list(torch.randn(2, 3, 130, 200).to(dtype))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 1, 2, 3, 7):
            torch.set_num_threads(count)
            outputs, _, gradients = run(inputs, dtype, output_gradients)
            results.append((*outputs, *gradients))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_strided_inputs_and_gradients():
    wide = torch.randn(2, 12, 3, 40)
    _, _, gate, shift, scale = make_inputs((2, 6, 40))
    inputs = [wide[:, ::2, 1].requires_grad_(), wide[:, 1::2, 2].requires_grad_(), gate, shift, scale]
    dense = [t.detach().clone().requires_grad_() for t in inputs]
    d = [torch.randn(2, 40, 6).transpose(1, 2), torch.randn(6, 40).expand(2, 6, 40)]
    outputs, _, gradients = run(inputs, F32, d)
    outputs_dense, _, gradients_dense = run(dense, F32, [t.contiguous() for t in d])
    pairs = zip((*outputs, *gradients), (*outputs_dense, *gradients_dense), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_empty_batch():
    outputs, _, gradients = run(make_inputs((0, 5, 16)), F32)
    assert [t.shape[0] for t in (*outputs, *gradients)] == [0] * 7


def test_a_chain_of_them_is_a_chain_of_eager_ones():
    """As the model runs it: each x' feeds the next."""

    def chain(op, x, branches, gates):
        total = 0
        for branch, gate in zip(branches, gates, strict=True):
            x, y = op(x, branch, gate, gate + 0.5, gate - 0.5)
            total = total + (y * branch).sum()
        return total + (x * x).sum()

    leaves = [torch.randn(2, 5, 40), torch.randn(4, 2, 5, 40), torch.randn(4, 2, 40)]
    fused = [t.clone().requires_grad_() for t in leaves]
    exact = [t.double().requires_grad_() for t in leaves]
    chain(ops.gated_residual_layer_norm_modulate, *fused).backward()
    chain(eager, *exact).backward()
    for got, want in zip(fused, exact, strict=True):
        assert_close(got.grad, want.grad, F32, 36, 200)


@needs_extension
def test_second_derivatives_are_refused():
    inputs = make_inputs((2, 5, 24))
    x_new, y = ops.gated_residual_layer_norm_modulate(*inputs)
    (dx,) = torch.autograd.grad(y.square().sum() + x_new.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_compiled(dtype):
    torch._dynamo.reset()
    inputs = make_inputs((2, 9, 48), dtype, dtype, dtype)
    output_gradients = list(torch.randn(2, 2, 9, 48).to(dtype))
    outputs, _, gradients = run(inputs, dtype, output_gradients)
    compiled = torch.compile(ops.gated_residual_layer_norm_modulate, fullgraph=True)(*inputs)
    of_compiled = torch.autograd.grad(compiled, inputs, output_gradients)
    pairs = zip((*outputs, *gradients), (*compiled, *of_compiled), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@needs_extension
def test_opcheck():
    x, branch, gate, shift, scale = (t.detach() for t in make_inputs((2, 5, 24), F32, BF16, BF16))
    o = torch.ops.sra2_fast
    torch.library.opcheck(o.gated_residual_layer_norm_modulate_fwd.default, (x, branch, gate, shift, scale, EPS, True))
    statistics = torch.randn(2, 5), torch.rand(2, 5)
    for dx_new, needs in [(x, (True,) * 4), (x.new_empty(0), (False, True, False, True))]:
        arguments = (dx_new, x.to(BF16), x, branch, gate, scale, *statistics, *needs)
        torch.library.opcheck(o.gated_residual_layer_norm_modulate_bwd.default, arguments)


def bad(**changes) -> dict[str, object]:
    names = ("x", "branch", "gate", "shift", "scale")
    return {**dict(zip(names, (t.detach() for t in make_inputs((2, 5, 24))), strict=True)), **changes}


BAD_INPUT = [
    (bad(x=torch.ones(2, 5)), InputError, r"x must be \(B, N, D\), got \(2, 5\)"),
    (bad(branch=torch.ones(2, 4, 24)), InputError, r"branch must be \(B, N, D\) = \(2, 5, 24\), got \(2, 4, 24\)"),
    (bad(branch=torch.ones(2, 5, 24).half()), InputTypeError, r"branch must be float32 or bfloat16 \(implementation"),
    (bad(branch=torch.ones(2, 24, 5).mT), InputError, r"branch must be of stride 1 in its last dimension"),
    (bad(gate=torch.ones(24)), InputError, r"gate must be \(B, D\) = \(2, 24\), got \(24,\)"),
    (bad(gate=torch.ones(2, 24).long()), InputTypeError, r"gate must be float32 or bfloat16 .* got torch.int64"),
    (bad(shift=torch.ones(2, 24, device="meta")), InputError, r"shift must be on cpu like x, got meta"),
    (bad(scale=torch.ones(2, 23)), InputError, r"scale must be \(B, D\) = \(2, 24\), got \(2, 23\)"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_INPUT)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match="gated_residual_layer_norm_modulate: " + message):
        ops.gated_residual_layer_norm_modulate(**arguments)


@needs_extension
def test_bad_input_from_cxx():
    x, branch, gate, shift, scale = bad().values()
    o = torch.ops.sra2_fast
    with pytest.raises(RuntimeError, match=r"branch must be \(2, 5, 24\), got \(2, 4, 24\)"):
        o.gated_residual_layer_norm_modulate_fwd(x, branch[:, 1:], gate, shift, scale, EPS, False)
    with pytest.raises(RuntimeError, match=r"branch must be contiguous, got a strided tensor"):
        o.gated_residual_layer_norm_modulate_fwd(
            x, branch.transpose(0, 1).contiguous().transpose(0, 1), gate, shift, scale, EPS, False
        )
    statistics = torch.zeros(2, 5), torch.ones(2, 5)
    with pytest.raises(RuntimeError, match=r"dx_new must be torch.float32 like x_new, got torch.bfloat16"):
        o.gated_residual_layer_norm_modulate_bwd(
            x.bfloat16(), x, x, branch, gate, scale, *statistics, True, True, True, True
        )
