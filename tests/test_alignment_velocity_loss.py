"""alignment_velocity_loss: finite differences -> the reference's gradients -> the kernels against the reference.

Truth is the reference in float64 on the same rounded inputs. p - z and the sums of cosines cancel, so errors are
measured against the sums of absolute terms.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from repository import ROOT
from tolerance import assert_close, relative_error
from torch import Tensor

from sra2_fast import backends
from sra2_fast.ops.alignment_velocity_loss import ALIGNMENTS, alignment_velocity_loss, eager
from sra2_fast.ops.interpolant import PATHS
from sra2_fast.reference import alignment_velocity_loss as reference

needs_cpu_kernels = pytest.mark.skipif(
    not backends.has_extension("cpu"), reason="the extension is not built (sra2-fast info)"
)
NAMES = ("hidden", "weight", "bias", "velocity_tokens", "latents", "noise", "t")
# B, C, H, W, patch, K: every P in use (1, 4, 12, 16, 32, 64, 256), one token, odd counts, K around whole vectors
SHAPES = [
    (2, 4, 8, 8, 2, 64),
    (3, 4, 6, 10, 2, 77),
    (1, 1, 3, 5, 1, 31),
    (2, 4, 3, 3, 1, 130),
    (2, 3, 2, 2, 2, 33),
    (1, 32, 7, 3, 1, 5),
    (5, 4, 4, 4, 4, 96),
    (1, 4, 16, 24, 8, 200),
]


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    velocity_tokens: Tensor
    latents: Tensor
    noise: Tensor
    t: Tensor

    def trained(self) -> list[Tensor]:
        return [x.detach().clone().requires_grad_() for x in self[:4]]

    def double(self) -> Inputs:
        return Inputs(*[x.detach().double() for x in self])


def make(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, velocity_dtype: torch.dtype | None = None
) -> Inputs:
    b, c, h, w, patch, k = shape
    n, p = (h // patch) * (w // patch), patch * patch * c
    rounded = [torch.randn(b, n, k), torch.randn(p, k) / k**0.5, torch.randn(p) / 3]
    images = [torch.randn(b, c, h, w), torch.randn(b, c, h, w), torch.rand(b)]
    velocity = torch.randn(b, n, p).to(velocity_dtype or dtype)
    return Inputs(*[x.to(dtype) for x in rounded], velocity, *images)


def true_gradients(x: Inputs, scales: tuple[float, float], **settings: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Losses and gradients of scales . (velocity, align), and the sums of their absolute terms, in float64."""
    d = x.double()
    velocity, align, dvelocity, dp = reference.forward(*d, **settings)
    gradients = reference.backward(*[d.t.new_tensor(s) for s in scales], dvelocity, dp, d.hidden, d.weight)
    patch = settings["patch_size"]
    z = reference.patch_tokens(d.latents, patch)
    v = reference.patch_tokens(reference.velocity_target(d.latents, d.noise, d.t, settings["path"]), patch)
    p = d.hidden @ d.weight.T + d.bias
    terms = d.hidden.abs() @ d.weight.abs().T + d.bias.abs()  # of p: what its own sum can lose
    sizes = terms + z.abs()
    tokens, elements = p.shape[0] * p.shape[1], p.numel()
    align_name = settings["align"]
    if align_name == "cosine":
        m = p.norm(dim=-1, keepdim=True).clamp(min=settings["eps"])
        y = z / z.norm(dim=-1, keepdim=True).clamp(min=settings["eps"])
        spread = (terms.norm(dim=-1, keepdim=True) / m).clamp(min=1)
        dp_terms = (y.abs() + y.norm(dim=-1, keepdim=True) * terms / m) * spread / (m * tokens)
        align_terms = (spread * y.norm(dim=-1, keepdim=True)).mean()
    else:
        slope = {"smooth_l1": 1 / settings["beta"], "mse": 2.0, "l1": 0.0}[align_name]
        dp_terms = torch.maximum(dp.abs(), slope * sizes / elements)
        align_terms = (sizes.square() if align_name == "mse" else sizes).mean()
    dp_terms = scales[1] * dp_terms
    velocity_terms = d.velocity_tokens.abs() + v.abs()
    absolute = [
        velocity_terms.square().mean(),
        align_terms,
        dp_terms @ d.weight.abs(),
        torch.einsum("bnp,bnk->pk", dp_terms, d.hidden.abs()),
        dp_terms.sum((0, 1)),
        scales[0] * 2 * velocity_terms / elements,
    ]
    return [velocity, align, *gradients], absolute


def run(function: Any, x: Inputs, scales: tuple[float, float], **settings: Any) -> list[Tensor]:
    trained = x.trained()
    losses = function(*trained, *x[4:], **settings)
    gradients = torch.autograd.grad(scales[0] * losses[0] + scales[1] * losses[1], trained)
    return [*[loss.detach() for loss in losses], *gradients]


def check_against_reference(x: Inputs, **settings: Any) -> None:
    settings = {"path": "linear", "align": "cosine", "beta": 0.5, "eps": 1e-6, **settings}
    scales = (1.25, 0.75)
    want, absolute = true_gradients(x, scales, **settings)
    got = run(alignment_velocity_loss, x, scales, **settings)
    k, p = x.weight.shape[1], x.weight.shape[0]
    tokens = x.hidden.shape[0] * x.hidden.shape[1]
    # Roundings to the storage type: dp, then the product's own; dvelocity, then its scaling. The losses stay float32.
    # All of l1's dp are one number and its negative, so that rounding does not average out: it counts for three.
    kept = 4 if settings["align"] == "l1" else 2
    for name, roundings, dtype, summed in (
        ("velocity", 3, torch.float32, tokens * p),
        ("align", 3, torch.float32, tokens * p + k),
        ("dhidden", kept, x.hidden.dtype, p + k),
        ("dweight", kept, x.hidden.dtype, tokens + k),
        ("dbias", kept, x.hidden.dtype, tokens + k),
        ("dvelocity", 2 + (x.velocity_tokens.dtype == torch.float32) * 3, x.velocity_tokens.dtype, 0),
    ):
        index = ("velocity", "align", "dhidden", "dweight", "dbias", "dvelocity").index(name)
        assert got[index].dtype == (x[index - 2].dtype if index > 1 else torch.float32), name
        assert_close(got[index], want[index], dtype, roundings, summed, absolute[index], name=name)


class ReferenceFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, velocity_tokens, latents, noise, t, settings):
        *losses, dvelocity, dp = reference.forward(hidden, weight, bias, velocity_tokens, latents, noise, t, **settings)
        ctx.save_for_backward(dvelocity, dp, hidden, weight)
        return tuple(losses)

    @staticmethod
    def backward(ctx, *scales):
        return (*reference.backward(*scales, *ctx.saved_tensors), None, None, None, None)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("align", ALIGNMENTS)
def test_reference_gradients_match_finite_differences(align: str, path: str) -> None:
    x = make((2, 3, 2, 4, 2, 5)).double()
    x.hidden[0, 0] *= 0.01  # with the bias gone and this eps, a token below eps and one far above
    x.bias.zero_()
    settings = {"patch_size": 2, "path": path, "align": align, "beta": 0.3, "eps": 0.2}
    trained = x.trained()
    assert torch.autograd.gradcheck(ReferenceFunction.apply, (*trained, *x[4:], settings))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("align", ALIGNMENTS)
def test_eager_is_the_reference_in_float64(align: str, path: str) -> None:
    x = make((2, 4, 4, 6, 2, 9)).double()
    x.hidden[1, 2] = 0
    x.bias.zero_()
    x.latents[0, :, :2, :2] = 0
    settings = {"patch_size": 2, "path": path, "align": align, "beta": 0.3, "eps": 1e-6}
    want, _ = true_gradients(x, (1.25, 0.75), **settings)
    for got, true in zip(run(eager, x, (1.25, 0.75), **settings), want, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference_in_every_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for align in ("cosine", "smooth_l1"):
        check_against_reference(make(shape, dtype), patch_size=shape[4], align=align)


@pytest.mark.parametrize("velocity_dtype", [torch.float32, torch.bfloat16], ids=["v32", "v16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("align", ALIGNMENTS)
def test_matches_the_reference_in_every_mode(
    align: str, path: str, dtype: torch.dtype, velocity_dtype: torch.dtype
) -> None:
    check_against_reference(make((3, 4, 6, 10, 2, 77), dtype, velocity_dtype), patch_size=2, path=path, align=align)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("align", ["cosine", "smooth_l1"])
def test_no_less_accurate_than_eager(align: str, dtype: torch.dtype) -> None:
    x = make((4, 4, 32, 32, 2, 384), dtype)
    settings = {"patch_size": 2, "path": "linear", "align": align, "beta": 0.5, "eps": 1e-6}
    want, absolute = true_gradients(x, (1.0, 1.0), **settings)
    for index, (fused, plain) in enumerate(
        zip(run(alignment_velocity_loss, x, (1.0, 1.0), **settings), run(eager, x, (1.0, 1.0), **settings), strict=True)
    ):
        error, theirs = (relative_error(got, want[index], absolute[index])[0] for got in (fused, plain))
        assert error <= 1.05 * theirs + 2.0**-23, f"output {index}: {error:.2e}, eager {theirs:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("align", ALIGNMENTS)
def test_tokens_of_norm_zero_and_below_eps_have_the_reference_gradient(align: str, dtype: torch.dtype) -> None:
    x = make((2, 4, 4, 6, 2, 32), dtype)
    x.bias.zero_()
    x.hidden[0, 1] = 0  # p = 0
    x.hidden[1, 3] *= 2.0**-30  # 0 < |p| < eps
    x.latents[0, :, :2, :4] = 0  # z = 0, for p = 0 and for another
    check_against_reference(x, patch_size=2, align=align)
    gradients = run(alignment_velocity_loss, x, (1.0, 1.0), patch_size=2, align=align)
    assert all(torch.isfinite(g).all() for g in gradients)


def test_an_empty_batch_has_the_mean_of_nothing() -> None:
    x = make((0, 4, 4, 4, 2, 8))
    velocity, align, dhidden, dweight, dbias, dvelocity = run(alignment_velocity_loss, x, (1.0, 1.0), patch_size=2)
    assert velocity.isnan() and align.isnan()
    assert dhidden.shape == x.hidden.shape and dvelocity.shape == x.velocity_tokens.shape
    assert not dweight.any() and not dbias.any()


@needs_cpu_kernels
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)], ids=str)
def test_only_what_is_asked_for_is_kept_and_computed(wanted: tuple[int, ...]) -> None:
    x = make((2, 4, 4, 4, 2, 24))
    trained = [one.requires_grad_(i in wanted) for i, one in enumerate(x.trained())]
    losses = alignment_velocity_loss(*trained, *x[4:], patch_size=2)
    dp, hidden, weight, dvelocity = losses[0].grad_fn.saved_tensors
    assert (dp is not None) == any(i < 3 for i in wanted)
    assert (hidden is not None) == (1 in wanted) and (weight is not None) == (0 in wanted)
    assert (dvelocity is not None) == (3 in wanted)
    sum(losses).backward()
    whole = run(alignment_velocity_loss, x, (1.0, 1.0), patch_size=2)[2:]
    for i, one in enumerate(trained):
        assert (one.grad is not None) == (i in wanted)
        assert one.grad is None or torch.equal(one.grad, whole[i])
    assert alignment_velocity_loss(*x, patch_size=2)[1].grad_fn is None


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_equal_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    x = make((8, 4, 32, 32, 2, 96), dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            results.append(run(alignment_velocity_loss, x, (0.5, 2.0), patch_size=2))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_strided_inputs_and_expanded_gradients() -> None:
    x = make((2, 4, 4, 6, 2, 20))
    plain = run(alignment_velocity_loss, x, (1.0, 1.0), patch_size=2)
    last = torch.channels_last
    strided = Inputs(
        x.hidden.transpose(0, 1).contiguous().transpose(0, 1),
        x.weight.T.contiguous().T,
        torch.stack([x.bias, x.bias], 1)[:, 0],
        torch.cat([x.velocity_tokens, x.velocity_tokens], -1)[..., :16],
        x.latents.contiguous(memory_format=last),
        x.noise.contiguous(memory_format=last),
        torch.stack([x.t, x.t], 1)[:, 1],
    )
    trained = [one.detach().requires_grad_() for one in strided[:4]]
    losses = alignment_velocity_loss(*trained, *strided[4:], patch_size=2)
    torch.stack(losses).expand(3, 2).sum().div(3).backward()
    for one, want in zip((*losses, *[one.grad for one in trained]), plain, strict=True):
        torch.testing.assert_close(one, want, rtol=1e-6, atol=1e-8)


def test_autocast_takes_the_projection_in_bf16_and_keeps_float32_gradients() -> None:
    x = make((2, 4, 4, 6, 2, 40))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(alignment_velocity_loss, x, (1.0, 1.0), patch_size=2)
    rounded = Inputs(*[one.bfloat16() for one in x[:3]], *x[3:])
    want, absolute = true_gradients(
        rounded, (1.0, 1.0), patch_size=2, path="linear", align="cosine", beta=0.05, eps=1e-6
    )
    assert [one.dtype for one in got] == [torch.float32] * 6
    for one, true, terms in zip(got[2:5], want[2:5], absolute[2:5], strict=True):
        assert_close(one, true, torch.bfloat16, 3, 64, terms)


def test_time_may_be_bf16() -> None:
    x = make((2, 4, 4, 4, 2, 8))
    t = x.t.bfloat16()
    a = alignment_velocity_loss(*x[:6], t, patch_size=2, path="cosine")
    b = alignment_velocity_loss(*x[:6], t.float(), patch_size=2, path="cosine")
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_compiles_whole() -> None:
    x = make((2, 4, 4, 6, 2, 40), torch.bfloat16)
    compiled = torch.compile(alignment_velocity_loss, fullgraph=True, backend="aot_eager")
    for settings in ({"align": "cosine"}, {"align": "smooth_l1", "path": "cosine"}):
        want = run(alignment_velocity_loss, x, (1.0, 0.5), patch_size=2, **settings)
        got = run(compiled, x, (1.0, 0.5), patch_size=2, **settings)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@needs_cpu_kernels
def test_ops_pass_opcheck() -> None:
    x = make((2, 4, 4, 6, 2, 12))
    ops = torch.ops.sra2_fast
    torch.library.opcheck(ops.alignment_velocity_loss_fwd, (*x, 2, 0, 1, 0.05, 1e-6))
    dp = torch.randn(2, 6, 16)
    for needs in ((True, True, True), (False, True, False), (True, False, False), (False, False, True)):
        arguments = (torch.tensor(0.5), dp, x.hidden, x.weight, *needs)
        torch.library.opcheck(ops.alignment_velocity_loss_bwd, arguments)


@needs_cpu_kernels
def test_second_derivatives_are_refused() -> None:
    x = make((1, 4, 2, 2, 2, 8))
    trained = x.trained()
    weight = torch.tensor(0.5, requires_grad=True)
    align = weight * alignment_velocity_loss(*trained, *x[4:], patch_size=2)[1]
    (gradient,) = torch.autograd.grad(align, trained[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@needs_cpu_kernels
@pytest.mark.parametrize("isa", ["avx2", "base"])
def test_matches_the_reference_with_lesser_instructions(isa: str) -> None:
    code = (
        "import torch, test_alignment_velocity_loss as t; torch.manual_seed(0); from sra2_fast import backends\n"
        f"assert backends.cpu_instruction_set() in ({isa!r}, 'base')\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "  for align in t.ALIGNMENTS:\n"
        "    for shape in t.SHAPES[1:4]:\n"
        "      t.check_against_reference(t.make(shape, dtype), patch_size=shape[4], align=align)"
    )
    env = {**os.environ, "SRA2_CPU_ISA": isa, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
