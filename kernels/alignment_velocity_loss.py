"""Both losses of a training step and their gradients, from the projector's last hidden tokens, in one CUDA launch.

The last projection is a product with P columns (16 for a /2 model of 4 channels), so its cost is reading `hidden` once;
everything else rides along: normalisation, alignment, the flow-matching target, both mean losses and the gradients dp
and dvelocity. Projection, target and differences never reach memory. The mathematics is in
`sra2_fast/reference/alignment_velocity_loss.py`.

The first programs of the grid own tiles of tokens for the alignment, the others tiles for the velocity loss; these
run in the gaps of those, since neither waits for the other. Every program writes one partial sum, and a second small
launch adds them in a fixed order: no atomics, equal runs are bitwise equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import row_tiles
from .alignment_velocity_tiles import align_tile, velocity_tile

MAX_PATCH_ELEMENTS = 256
VELOCITY_TILE = 2048
SUM_BLOCK = 1024


@dataclass(frozen=True)
class LossLaunch:
    """The tiles of the product (tokens x patch elements, k at a time) and of the velocity loss (tokens)."""

    block_t: int
    block_p: int
    block_k: int
    velocity_block_t: int
    num_warps: int
    num_stages: int


def launch_config(rows: int, K: int, P: int, dtype: torch.dtype) -> LossLaunch:
    """How to launch on `rows` tokens with K hidden and P patch elements of `hidden`'s dtype. Pure: no device is asked.

    64 tokens are one warpgroup's matrix instruction on sm_90. Fewer tokens than 64 a multiprocessor: smaller tiles, so
    that the read of `hidden` still spreads over the device.
    """
    block_t = 64
    while block_t > 16 and triton.cdiv(rows, block_t) * 2 <= row_tiles.ASSUMED_MULTIPROCESSORS:
        block_t //= 2
    block_p = max(16, triton.next_power_of_2(P))
    wide = block_p >= 128
    block_k = min((64 if wide else 128) * 2 // dtype.itemsize, max(32, triton.next_power_of_2(K)))
    return LossLaunch(
        block_t=block_t,
        block_p=block_p,
        block_k=block_k,
        velocity_block_t=max(1, VELOCITY_TILE // block_p),
        num_warps=8 if wide else 4,
        num_stages=3 if block_p >= 64 else 4,  # 96 kB at P = 64, so that two programs share a multiprocessor
    )


@triton.jit
def _alignment_velocity_loss_kernel(
    hidden_ptr, weight_ptr, bias_ptr,  # (B, N, K), (P, K), (P,): what is projected
    velocity_ptr,  # (B, N, P)
    latents_ptr, noise_ptr, t_ptr,  # (B, C, H, W) twice, (B,): float32
    dvelocity_ptr, dp_ptr,  # (B, N, P): written, gradients of the means
    align_partial_ptr, velocity_partial_ptr,  # (programs of each,) float32: written, their parts of the means
    align_programs,
    tokens, N, tokens_wide, height, width,  # B N, the tokens of a sample and of a row of it, H, W
    inverse_tokens, inverse_elements,  # 1 / (B N), 1 / (B N P)
    beta, eps,
    K: tl.constexpr, P: tl.constexpr, CHANNELS: tl.constexpr, PATCH: tl.constexpr,
    COSINE_PATH: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, VELOCITY_BLOCK_T: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    image = (N, tokens_wide, height, width)
    if program < align_programs:
        align_tile(
            program, hidden_ptr, weight_ptr, bias_ptr, latents_ptr, dp_ptr, align_partial_ptr,
            tokens, image, inverse_tokens, inverse_elements, beta, eps,
            K, P, CHANNELS, PATCH, ALIGN, BLOCK_T, BLOCK_P, BLOCK_K, PRECISION,
        )  # fmt: skip
    else:
        velocity_tile(
            program - align_programs, velocity_ptr, latents_ptr, noise_ptr, t_ptr, dvelocity_ptr, velocity_partial_ptr,
            tokens, image, inverse_elements, P, CHANNELS, PATCH, COSINE_PATH, VELOCITY_BLOCK_T, BLOCK_P,
        )  # fmt: skip


@triton.jit
def _store_sum(partial_ptr, sum_ptr, partials, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, partials, BLOCK):
        total += tl.load(partial_ptr + start + lane, mask=start + lane < partials, other=0.0)
    tl.store(sum_ptr, tl.sum(total, axis=0))


@triton.jit
def _sum_partials_kernel(
    align_partial_ptr, velocity_partial_ptr,  # (align_programs,), (velocity_programs,) float32
    align_loss_ptr, velocity_loss_ptr,  # () float32: written
    align_programs, velocity_programs,
    BLOCK: tl.constexpr,
):  # fmt: skip
    _store_sum(align_partial_ptr, align_loss_ptr, align_programs, BLOCK)
    _store_sum(velocity_partial_ptr, velocity_loss_ptr, velocity_programs, BLOCK)


def alignment_velocity_loss_fwd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    velocity_tokens: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    patch_size: int,
    path: str,
    align: str,
    beta: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(velocity loss, alignment loss, dvelocity, dp): both means and the gradients of each, not yet scaled.

    hidden: (B, N, K) float32 or bf16; weight: (P, K) of hidden's type; bias: (P,); velocity_tokens: (B, N, P) float32
    or bf16; latents, noise: (B, C, H, W) float32; t: (B,) float32 in [0, 1]. All contiguous.
    path: "linear" or "cosine". align: "cosine", "smooth_l1", "mse" or "l1".
    Returns two 0-d float32 losses (NaN for an empty batch, as a mean is), dvelocity like velocity_tokens and dp
    (B, N, P) of hidden's type. Sums in float32 (float32 products as three tf32 ones, 2^-22 from exact), one rounding to
    each gradient's type, fixed order.
    """
    B, N, K = hidden.shape
    P = weight.shape[0]
    channels, height, width = latents.shape[1:]
    dvelocity = torch.empty_like(velocity_tokens)
    dp = torch.empty((B, N, P), device=hidden.device, dtype=hidden.dtype)
    velocity_loss = torch.empty((), device=hidden.device, dtype=torch.float32)
    align_loss = torch.empty_like(velocity_loss)
    tokens = B * N
    if tokens == 0:
        return velocity_loss.fill_(float("nan")), align_loss.fill_(float("nan")), dvelocity, dp
    config = launch_config(tokens, K, P, hidden.dtype)
    align_programs = triton.cdiv(tokens, config.block_t)
    velocity_programs = triton.cdiv(tokens, config.velocity_block_t)
    partials = torch.empty(align_programs + velocity_programs, device=hidden.device, dtype=torch.float32)
    velocity_partials = partials[align_programs:]
    _alignment_velocity_loss_kernel[(align_programs + velocity_programs,)](
        hidden, weight, bias,
        velocity_tokens,
        latents, noise, t,
        dvelocity, dp,
        partials, velocity_partials,
        align_programs,
        tokens, N, width // patch_size, height, width,
        1.0 / tokens, 1.0 / (tokens * P),
        beta, eps,
        K=K, P=P, CHANNELS=channels, PATCH=patch_size, COSINE_PATH=path == "cosine", ALIGN=align,
        PRECISION="tf32x3" if hidden.dtype == torch.float32 else "tf32",
        BLOCK_T=config.block_t, BLOCK_P=config.block_p, BLOCK_K=config.block_k,
        VELOCITY_BLOCK_T=config.velocity_block_t, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    _sum_partials_kernel[(1,)](
        partials, velocity_partials,
        align_loss, velocity_loss,
        align_programs, velocity_programs,
        BLOCK=SUM_BLOCK, num_warps=4,
    )  # fmt: skip
    return velocity_loss, align_loss, dvelocity, dp
