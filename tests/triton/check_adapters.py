"""The eight adapters between torch's operators and the Triton launchers, interpreted: what they pass and return.

On CUDA an operator is its adapter; on a CPU it is a C++ kernel, an implementation of its own. So every adapter is held
to the operator of its name, with and without each result that may be unneeded, and to the shapes and types of its fake.
The launchers' own numbers are held to float64 in the files beside this one. Run by test_triton.py.
"""

from __future__ import annotations

from typing import Any

import bf16_interpreter
import pytest
import torch
from tolerance import assert_close
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sra2_fast import backends, ops
from sra2_fast.ops import adamw_ema  # noqa: F401  (registers its operators)
from sra2_fast.ops.registry import ADAPTERS

bf16_interpreter.install()
pytestmark = pytest.mark.skipif(
    not backends.has_extension("cpu"), reason="the C++ kernels to compare with are not built"
)
assert ops

F32, BF16 = torch.float32, torch.bfloat16
B, N, D, K, C, PATCH = 2, 3, 24, 40, 4, 2
ROUNDINGS = 16  # either side: at most eight roundings, and sums of at most a few hundred terms
EPS = 1e-6


def normal(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape).to(dtype)


def modulation(dtype: torch.dtype, count: int) -> tuple[Tensor, ...]:
    return normal(B, 6 * D, dtype=dtype).chunk(6, 1)[:count]


def statistics() -> tuple[Tensor, Tensor]:
    return normal(B, N), torch.rand(B, N) + 0.5


def both(name: str, *arguments: Any) -> None:
    """The adapter against the operator on the CPU, and against its fake."""
    operator = getattr(torch.ops.sra2_fast, name).default
    want, got = operator(*arguments), ADAPTERS[name]["triton"](*arguments)
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
    as_tuple = [one if isinstance(one, tuple) else (one,) for one in (want, got, fake)]
    for place, (w, g, f) in enumerate(zip(*as_tuple, strict=True)):
        assert g.shape == w.shape == f.shape and g.dtype == w.dtype == f.dtype, f"{name}[{place}]"
        if w.numel():
            assert_close(g, w.double(), w.dtype, ROUNDINGS, 2 * N * D, name=f"{name}[{place}]")


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_layer_norm_modulate(dtype: torch.dtype) -> None:
    x, (shift, scale) = normal(B, N, D), modulation(dtype, 2)
    both("layer_norm_modulate_fwd", x, shift, scale, EPS, dtype == BF16)
    dy = normal(B, N, D, dtype=dtype)
    for needs in ((True, True), (True, False), (False, True)):
        both("layer_norm_modulate_bwd", dy, x, scale, *statistics(), *needs)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gated_residual_layer_norm_modulate(dtype: torch.dtype) -> None:
    x, branch, (gate, shift, scale) = normal(B, N, D), normal(B, N, D, dtype=dtype), modulation(dtype, 3)
    both("gated_residual_layer_norm_modulate_fwd", x, branch, gate, shift, scale, EPS, dtype == BF16)
    dx_new, dy = normal(B, N, D), normal(B, N, D, dtype=dtype)
    for without in (None, 0, 1, 2, 3):
        needs = [place != without for place in range(4)]
        given = (dy, x, branch, gate, scale, *statistics(), *needs)
        both("gated_residual_layer_norm_modulate_bwd", dx_new if without is None else x.new_empty(0), *given)


@pytest.mark.parametrize("path", [0, 1])
@pytest.mark.parametrize("align", [0, 1, 2])
def test_alignment_velocity_loss(path: int, align: int) -> None:
    P, side = C * PATCH**2, 2 * PATCH
    hidden, weight, bias = normal(B, 4, K), normal(P, K) / K**0.5, normal(P)
    images = (normal(B, C, side, side), normal(B, C, side, side), torch.rand(B))
    both("alignment_velocity_loss_fwd", hidden, weight, bias, normal(B, 4, P), *images, PATCH, path, align, 0.5, EPS)
    if path == align == 0:
        for without in (None, 0, 1, 2):
            needs = [place != without for place in range(3)]
            both("alignment_velocity_loss_bwd", torch.tensor(0.7), normal(B, 4, P), hidden, weight, *needs)


@pytest.mark.parametrize("has_ema", [True, False])
@pytest.mark.parametrize(("max_grad_norm", "has_shadows"), [(1.0, False), (float("inf"), False), (1.0, True)])
def test_adamw_ema(max_grad_norm: float, has_shadows: bool, has_ema: bool) -> None:
    sizes = (7, 40, 4097)
    grads = [normal(n) for n in sizes]
    norm = ADAPTERS["adamw_ema_norm"]["triton"](grads)
    assert_close(norm, torch.ops.sra2_fast.adamw_ema_norm(grads).double(), F32, ROUNDINGS, sum(sizes))
    start = [[normal(n) for n in sizes] for _ in range(4)]
    start[2] = [s.square() for s in start[2]]
    results = []
    for step in (torch.ops.sra2_fast.adamw_ema_step.default, ADAPTERS["adamw_ema_step"]["triton"]):
        params, exp_avgs, exp_avg_sqs, emas = ([t.clone() for t in tensors] for tensors in start)
        settings = (1e-2, 0.9, 0.999, 1e-8, 0.1, 0.9, max_grad_norm)
        shadows = [p.bfloat16() for p in params] if has_shadows else []
        given_grads = [g.bfloat16() for g in grads] if has_shadows else grads
        rates = torch.tensor(settings[:6:5] if has_shadows else [], dtype=torch.float64)
        lists = (params, given_grads, exp_avgs, exp_avg_sqs, emas if has_ema else [], shadows)
        assert step(*lists, torch.ones(3), norm, rates, *settings) is None
        results.append([*params, *exp_avgs, *exp_avg_sqs, *emas])
        assert all(torch.equal(s, p.bfloat16()) for s, p in zip(shadows, params, strict=has_shadows))
    for place, (want, got) in enumerate(zip(*results, strict=True)):
        assert_close(got, want.double(), F32, ROUNDINGS, name=f"adamw_ema_step[{place}]")
    assert has_ema == (not torch.equal(results[0][-1], start[3][-1]))
