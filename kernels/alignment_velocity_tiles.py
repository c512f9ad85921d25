"""What one program of the alignment and velocity losses does: a tile of tokens each, as device functions.

`alignment_velocity_loss.py` beside this file holds the kernel that calls them, with what each argument is, the launch
choices and the launcher. `image` is (N, tokens_wide, height, width), what a token's place in an image is computed from.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _token_offset(token, image, CHANNELS: tl.constexpr, PATCH: tl.constexpr):
    """Where a token's first pixel lies in a (B, C, H, W) image; token counts over the whole batch, int64."""
    N, tokens_wide, height, width = image
    inside = token % N
    row = inside // tokens_wide
    column = inside % tokens_wide
    return (token // N) * (CHANNELS * height * width) + (row * width + column) * PATCH


@triton.jit
def _element_offset(element, image, CHANNELS: tl.constexpr, PATCH: tl.constexpr):
    """Where element (i, j, c), counted c fastest, lies from there."""
    _, _, height, width = image
    channel = element % CHANNELS
    pixel = element // CHANNELS
    return channel * (height * width) + (pixel // PATCH) * width + pixel % PATCH


@triton.jit
def _sin_half_pi(u):
    """sin(pi u / 2), 0 <= u <= 1/2; the series ends below 2e-9, where the hardware's sine has an error of 5e-7."""
    x = u * 1.5707963267948966
    s = x * x
    return x * (1.0 + s * (-1.0 / 6 + s * (1.0 / 120 + s * (-1.0 / 5040 + s * (1.0 / 362880)))))


@triton.jit
def _cos_half_pi(u):
    """cos(pi u / 2), 0 <= u <= 1/2."""
    x = u * 1.5707963267948966
    s = x * x
    return 1.0 + s * (-0.5 + s * (1.0 / 24 + s * (-1.0 / 720 + s * (1.0 / 40320 + s * (-1.0 / 3628800)))))


@triton.jit
def _velocity_target(latents, noise, t, COSINE_PATH: tl.constexpr):
    """v* = a'(t) z + s'(t) e; t in [0, 1]."""
    if COSINE_PATH:
        u = tl.minimum(t, 1.0 - t)  # exact: the angle beyond pi/4 is the other function of the angle from pi/2
        low = t <= 0.5
        sine = tl.where(low, _sin_half_pi(u), _cos_half_pi(u))
        cosine = tl.where(low, _cos_half_pi(u), _sin_half_pi(u))
        return 1.5707963267948966 * (cosine * noise - sine * latents)
    else:
        return noise - latents


@triton.jit
def _alignment(p, z, mask, inverse_tokens, inverse_elements, beta, eps, ALIGN: tl.constexpr):
    """(loss terms that sum to the mean, dp) of tokens p against z, both (tokens, elements), zero where masked."""
    if ALIGN == "cosine":
        norm = tl.sqrt(tl.sum(p * p, axis=1))
        z_norm = tl.sqrt(tl.sum(z * z, axis=1))
        inverse = 1.0 / tl.maximum(norm, eps)
        q = p * inverse[:, None]
        y = z * (1.0 / tl.maximum(z_norm, eps))[:, None]
        cosine = tl.sum(q * y, axis=1)
        pull = tl.where(norm >= eps, cosine, 0.0)
        dp = (pull[:, None] * q - y) * (inverse * inverse_tokens)[:, None]
        return -cosine * inverse_tokens, dp
    else:
        d = tl.where(mask, p - z, 0.0)
        if ALIGN == "smooth_l1":
            size = tl.abs(d)
            losses = tl.where(size <= beta, d * d / (2.0 * beta), size - 0.5 * beta)
            losses = tl.where(mask, losses, 0.0)
            dp = tl.minimum(tl.maximum(d / beta, -1.0), 1.0)
        elif ALIGN == "mse":
            losses = d * d
            dp = 2.0 * d
        else:
            losses = tl.abs(d)
            dp = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
        return tl.sum(losses, axis=1) * inverse_elements, dp * inverse_elements


@triton.jit
def align_tile(
    tile,  # which tile of its kind: token counts over the batch in int64, a batch may have more than 2^31 elements
    hidden_ptr, weight_ptr, bias_ptr, latents_ptr, dp_ptr, partial_ptr,
    tokens, image, inverse_tokens, inverse_elements, beta, eps,
    K: tl.constexpr, P: tl.constexpr, CHANNELS: tl.constexpr, PATCH: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Project BLOCK_T tokens, compare them with their latents, store dp and the tile's part of the alignment loss."""
    token = tile.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    element = tl.arange(0, BLOCK_P)
    in_tokens = token < tokens
    in_patch = element < P
    k = tl.arange(0, BLOCK_K)
    hidden_rows = hidden_ptr + token[:, None] * K + k[None, :]
    weight_rows = weight_ptr + element[:, None] * K + k[None, :]
    mask = in_tokens[:, None] & in_patch[None, :]
    first_pixel = _token_offset(token, image, CHANNELS, PATCH)
    pixel = _element_offset(element, image, CHANNELS, PATCH)
    latents_tile = latents_ptr + first_pixel[:, None] + pixel[None, :]
    if BLOCK_P <= 32:  # few enough registers to hold while the product runs, and its latency is hidden
        z = tl.load(latents_tile, mask=mask, other=0.0)

    p = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    for start in range(0, K, BLOCK_K):
        hidden_mask, weight_mask = in_tokens[:, None], in_patch[:, None]
        if K % BLOCK_K != 0:
            in_k = (start + k < K)[None, :]
            hidden_mask, weight_mask = hidden_mask & in_k, weight_mask & in_k
        hidden = tl.load(hidden_rows + start, mask=hidden_mask, other=0.0)
        weight = tl.load(weight_rows + start, mask=weight_mask, other=0.0)
        p = tl.dot(hidden, tl.trans(weight), p, input_precision=PRECISION)
    p += tl.load(bias_ptr + element, mask=in_patch, other=0.0).to(tl.float32)[None, :]

    if BLOCK_P > 32:
        z = tl.load(latents_tile, mask=mask, other=0.0)
    losses, dp = _alignment(p, z, mask, inverse_tokens, inverse_elements, beta, eps, ALIGN)
    tl.store(dp_ptr + token[:, None] * P + element[None, :], dp.to(dp_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + tile, tl.sum(tl.where(in_tokens, losses, 0.0), axis=0))


@triton.jit
def velocity_tile(
    tile,
    velocity_ptr, latents_ptr, noise_ptr, t_ptr, dvelocity_ptr, partial_ptr,
    tokens, image, inverse_elements,
    P: tl.constexpr, CHANNELS: tl.constexpr, PATCH: tl.constexpr, COSINE_PATH: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Compare BLOCK_T velocity tokens with their targets, store dvelocity and the tile's part of the velocity loss."""
    token = tile.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    element = tl.arange(0, BLOCK_P)
    in_tokens = token < tokens
    mask = in_tokens[:, None] & (element < P)[None, :]
    first_pixel = _token_offset(token, image, CHANNELS, PATCH)
    pixel = _element_offset(element, image, CHANNELS, PATCH)
    at = first_pixel[:, None] + pixel[None, :]
    z = tl.load(latents_ptr + at, mask=mask, other=0.0)
    e = tl.load(noise_ptr + at, mask=mask, other=0.0)
    t = tl.load(t_ptr + token // image[0], mask=in_tokens, other=0.0)[:, None]
    flat = token[:, None] * P + element[None, :]
    velocity = tl.load(velocity_ptr + flat, mask=mask, other=0.0).to(tl.float32)
    d = tl.where(mask, velocity - _velocity_target(z, e, t, COSINE_PATH), 0.0)
    dvelocity = (2.0 * inverse_elements) * d
    tl.store(dvelocity_ptr + flat, dvelocity.to(dvelocity_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + tile, tl.sum(tl.sum(d * d, axis=1), axis=0) * inverse_elements)
