"""The checks themselves can fail: each wrong result a kernel is likely to give is caught by `assert_close`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerance import allowed, assert_close, relative_error

TYPES = [torch.float32, torch.bfloat16]


def modulated(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """LN + modulate in float64 on inputs rounded to dtype, the honest result rounded once, and its parts."""
    x = torch.randn(4, 33, 200).to(dtype).double()
    shift, scale = torch.randn(2, 4, 200).to(dtype).double()
    want = F.layer_norm(x, (200,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    return {"x": x, "shift": shift, "scale": scale, "want": want, "honest": want.to(dtype)}


@pytest.mark.parametrize("dtype", TYPES)
def test_the_honest_result_passes(dtype):
    m = modulated(dtype)
    assert_close(m["honest"], m["want"], dtype, 1)


BELOW_A_BF16_ROUNDING = "eps a thousand times too large"  # 0.05 %: only float32 can catch it

WRONG = {
    "zeros": lambda m: torch.zeros_like(m["honest"]),
    "shift dropped": lambda m: m["honest"] - m["shift"][:, None].to(m["honest"].dtype),
    "one wrong row": lambda m: torch.cat([m["honest"][:, :1] * 1.02, m["honest"][:, 1:]], 1),
    "one row of another sample": lambda m: m["honest"].index_copy(1, torch.tensor([7]), m["honest"].roll(1, 0)[:, 7:8]),
    "a sign": lambda m: -m["honest"],
    "the last column unwritten": lambda m: torch.cat([m["honest"][..., :-1], 0 * m["honest"][..., -1:]], -1),
    "a NaN": lambda m: m["honest"].index_fill(0, torch.tensor([0]), float("nan")),
    "truncated, not rounded, to bf16": lambda m: (
        (m["want"].float().view(torch.int32) & -65536).view(torch.float32).to(m["honest"].dtype)
    ),
    BELOW_A_BF16_ROUNDING: lambda m: (
        F.layer_norm(m["x"], (200,), eps=1e-3) * (1 + m["scale"][:, None]) + m["shift"][:, None]
    ).to(m["honest"].dtype),
}


@pytest.mark.parametrize(
    ("dtype", "mistake"),
    [(d, m) for d in TYPES for m in WRONG if d == torch.float32 or m != BELOW_A_BF16_ROUNDING],
)
def test_a_mistake_is_caught(dtype, mistake):
    m = modulated(dtype)
    wrong = WRONG[mistake](m)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(wrong, m["want"], dtype, 1)


def test_cancellation_neither_hides_nor_fails():
    terms = torch.randn(1000, 64)
    terms = torch.cat([terms, -terms + 1e-6 * torch.randn(1000, 64)])  # the sum is a millionth of its terms
    want, absolute = terms.double().sum(0), terms.double().abs().sum(0)
    assert_close(terms.sum(0), want, torch.float32, 1, 2000, absolute_terms=absolute)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(terms.sum(0) + terms[:50].sum(0), want, torch.float32, 1, 2000, absolute_terms=absolute)


def test_an_exact_zero_must_be_exact():
    want = torch.zeros(3, 8)
    assert relative_error(want.clone(), want) == (0.0, 0.0)
    assert relative_error(want + 1e-30, want)[0] == float("inf")


def test_a_wrong_shape_is_an_error():
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.zeros(3, 1), torch.zeros(3, 4), torch.float32, 1)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_rule_is_what_rounding_costs(dtype):
    """One rounding of random values costs 0.42 u within 10 %: the allowance of twice that is neither wide nor tight."""
    values = torch.randn(1 << 16, dtype=torch.float64)
    measured = relative_error(values.to(dtype), values)[0]
    assert 0.45 < measured / allowed(dtype, 1) < 0.55


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("roundings", [2, 4])
def test_roundings_add_in_quadrature(dtype, roundings):
    values = torch.randn(1 << 16, dtype=torch.float64)
    rounded = values
    for _ in range(roundings):
        factor = 1 + torch.rand(values.shape, dtype=torch.float64)
        rounded = (rounded * factor).to(dtype).double() / factor
    assert relative_error(rounded, values)[0] <= allowed(dtype, roundings)
