"""Derived tolerances and the two error measures every numeric test uses.

One rounding to a type with unit roundoff u costs about 0.42 u of relative norm (the rms of a uniform error over the
mantissa), k independent roundings 0.42 u sqrt(k). A check allows twice that, plus 2 * 2^-24 * sqrt(n) for a float32
sum of n terms. A short row (fewer than 64 elements) has no average to rely on: it is allowed k u.
A test states k and n, never a number.
"""

from __future__ import annotations

import torch

UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
SHORT_ROW = 64


def allowed(dtype: torch.dtype, roundings: float, summed: int = 0, row_size: int | None = None) -> float:
    """The relative error allowed to `roundings` roundings to `dtype` and a float32 sum of `summed` terms."""
    u = UNIT_ROUNDOFF[dtype]
    per_norm = 2 * 0.42 * u * roundings**0.5
    if row_size is not None and row_size < SHORT_ROW:
        per_norm = max(per_norm, roundings * u)
    return per_norm + 2 * 2.0**-24 * summed**0.5


def relative_error(
    got: torch.Tensor, want: torch.Tensor, absolute_terms: torch.Tensor | None = None
) -> tuple[float, float]:
    """|got - want| / |want| over the tensor, and over its worst last-dimension row.

    want: float64, the reference on the same rounded inputs.
    absolute_terms: like want - the sum of the absolute terms of a reduced gradient; its norm is the denominator, so
    that cancellation neither hides nor causes a failure.
    Rows whose denominator is zero must be exactly right. NaN never passes (it returns inf).
    """
    assert got.shape == want.shape, f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    got, want = got.detach(), want.detach().double()
    scale = (want if absolute_terms is None else absolute_terms).double()
    difference = got.double() - want
    if not torch.isfinite(difference).all():
        return float("inf"), float("inf")
    if difference.numel() == 0:
        return 0.0, 0.0
    if difference.dim() == 0:
        difference, scale = difference[None], scale[None]
    whole = _ratio(difference.norm(), scale.norm())
    row = difference.shape[-1]
    rows = _ratio(difference.reshape(-1, row).norm(dim=-1), scale.reshape(-1, row).norm(dim=-1))
    return float(whole), float(rows.max())


def _ratio(error: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    exact = torch.where(error == 0, 0.0, torch.inf)
    return torch.where(scale > 0, error / scale.clamp_min(torch.finfo(torch.float64).tiny), exact)


def assert_close(
    got: torch.Tensor,
    want: torch.Tensor,
    dtype: torch.dtype,
    roundings: float,
    summed: int = 0,
    absolute_terms: torch.Tensor | None = None,
    name: str = "value",
) -> None:
    """Fail unless both errors of `got` are within what `roundings` and `summed` allow (worst row: twice that)."""
    row_size = want.shape[-1] if want.dim() else 1
    whole, row = relative_error(got, want, absolute_terms)
    limit = allowed(dtype, roundings, summed, want.numel())
    row_limit = 2 * allowed(dtype, roundings, summed, row_size)
    assert whole <= limit, f"{name}: relative error {whole:.3e} over the tensor, allowed {limit:.3e}"
    assert row <= row_limit, f"{name}: relative error {row:.3e} in the worst row, allowed {row_limit:.3e}"
