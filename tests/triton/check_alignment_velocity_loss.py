"""Numbers of kernels/alignment_velocity_loss.py, interpreted. Run by test_triton.py in a process of its own."""

from __future__ import annotations

import bf16_interpreter
import pytest
import torch
from guards import between_nans, guarded_allocations
from sra2_fast.kernels import alignment_velocity_loss as kernels
from sra2_fast.kernels import row_tiles
from tolerance import assert_close

from sra2_fast.reference import alignment_velocity_loss as reference

bf16_interpreter.install()

F32, BF16 = torch.float32, torch.bfloat16
EPS, BETA = 1e-6, 0.05
# In float32: the bias, the norms and their quotients, two products, a difference, the mean's factor and the store.
F32_ROUNDINGS = 10


def operands(
    B: int = 2, grid: int = 3, channels: int = 4, patch: int = 2, K: int = 48, dtype: torch.dtype = F32
) -> dict[str, torch.Tensor]:
    P = patch * patch * channels
    draws = {
        "hidden": torch.randn(B, grid * grid, K).to(dtype),
        "weight": (torch.randn(P, K) / K**0.5).to(dtype),
        "bias": torch.randn(P).to(dtype),
        "velocity_tokens": torch.randn(B, grid * grid, P).to(dtype),
        "latents": torch.randn(B, channels, grid * patch, grid * patch),
        "noise": torch.randn(B, channels, grid * patch, grid * patch),
        "t": torch.rand(B),
    }
    return {name: between_nans(value) for name, value in draws.items()}


def check(given: dict[str, torch.Tensor], patch: int, path: str, align: str) -> tuple[torch.Tensor, ...]:
    with guarded_allocations():
        got = kernels.alignment_velocity_loss_fwd(*given.values(), patch, path, align, BETA, EPS)
    velocity_loss, align_loss, dvelocity, dp = got
    exact = {name: value.double() for name, value in given.items()}
    want = reference.forward(*exact.values(), patch_size=patch, path=path, align=align, beta=BETA, eps=EPS)
    dtype, K, size = given["hidden"].dtype, given["hidden"].shape[2], dvelocity.numel()
    roundings = F32_ROUNDINGS if dtype == F32 else 1
    assert (velocity_loss.dtype, align_loss.dtype, dvelocity.dtype, dp.dtype) == (F32, F32, dtype, dtype)
    assert_close(velocity_loss, want[0], F32, F32_ROUNDINGS, size, name="velocity loss")
    # A cosine's mean may cancel: its error is relative to the mean of |cosine|, at most 1.
    terms = torch.ones(()).double() if align == "cosine" else None
    assert_close(align_loss, want[1], F32, F32_ROUNDINGS, K + size, terms, name="alignment loss")
    assert_close(dvelocity, want[2], dtype, roundings, name="dvelocity")
    if align == "l1" or align == "smooth_l1":  # a sign, or a slope, that flips within the error of p is no error
        d = exact["hidden"] @ exact["weight"].T + exact["bias"] - reference.patch_tokens(exact["latents"], patch)
        sure = ((d.abs() - (BETA if align == "smooth_l1" else 0)).abs() > 1e-5).double()
        assert sure.mean() > 0.99
        dp, want_dp = dp.double() * sure, want[3] * sure
        # smooth_l1's slope divides the error of p by beta.
        assert_close(dp, want_dp, dtype, roundings * (2 / BETA) ** 2 if dtype == F32 else 4, K, name="dp")
    else:
        assert_close(dp, want[3], dtype, roundings, K, name="dp")
    return got


@pytest.mark.parametrize("align", ["cosine", "smooth_l1", "mse", "l1"])
@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_objectives(dtype: torch.dtype, path: str, align: str) -> None:
    check(operands(dtype=dtype), 2, path, align)


@pytest.mark.parametrize("align", ["cosine", "smooth_l1"])
@pytest.mark.parametrize(
    ("channels", "patch", "K"),
    [(4, 1, 32), (3, 2, 64), (1, 4, 200), (16, 2, 130), (4, 8, 96), (4, 2, 4608)],
    ids=lambda value: str(value),
)
def test_patches_and_widths(channels: int, patch: int, K: int, align: str) -> None:
    """P = 4, 12, 16, 64, 256; K a multiple of the block or not."""
    check(operands(B=1, channels=channels, patch=patch, K=K, dtype=BF16), patch, "linear", align)


@pytest.mark.parametrize(("B", "grid", "multiprocessors", "block_t"), [(1, 1, 132, 16), (1, 6, 2, 32), (5, 5, 1, 64)])
def test_token_counts(monkeypatch: pytest.MonkeyPatch, B: int, grid: int, multiprocessors: int, block_t: int) -> None:
    """One token, and tiles that end inside a sample and inside the batch."""
    monkeypatch.setattr(row_tiles, "ASSUMED_MULTIPROCESSORS", multiprocessors)
    assert kernels.launch_config(B * grid**2, 48, 16, F32).block_t == block_t
    check(operands(B=B, grid=grid), 2, "cosine", "cosine")


def test_a_wide_image() -> None:
    """Height and width differ: a token's row and column are not mixed up."""
    given = operands(B=2, grid=3)
    for name in ("latents", "noise"):
        given[name] = torch.randn(2, 4, 2, 18)
    check(given, 2, "linear", "cosine")


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_tokens_of_zero_norm_have_a_finite_gradient(dtype: torch.dtype) -> None:
    """A projection of zeros, a target of zeros, and both."""
    given = operands(dtype=dtype)
    given["bias"].zero_()
    given["hidden"][0, :4] = 0.0
    given["latents"][0, :, :2, :4] = 0.0  # tokens 0 and 1
    *_, dp = check(given, 2, "linear", "cosine")
    assert torch.isfinite(dp).all() and dp[0, :2].eq(0).all() and dp[0, 2:4].ne(0).any()


def test_an_empty_batch_has_the_mean_of_nothing() -> None:
    velocity, align, dvelocity, dp = kernels.alignment_velocity_loss_fwd(
        *operands(B=0).values(), 2, "linear", "cosine", BETA, EPS
    )
    assert velocity.isnan() and align.isnan() and dvelocity.shape == dp.shape == (0, 9, 16)


def test_equal_runs_are_bitwise_equal() -> None:
    given = operands(B=3, dtype=BF16)
    first, second = (
        kernels.alignment_velocity_loss_fwd(*given.values(), 2, "cosine", "cosine", BETA, EPS) for _ in "ab"
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_path_at_its_ends() -> None:
    """t = 0, 1/4, 1/2, 3/4 and 1, where the sine changes into a cosine."""
    given = operands(B=5)
    given["t"] = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    check(given, 2, "cosine", "mse")
