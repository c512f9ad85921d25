"""The last projection, the alignment of its tokens with the clean latent, and the flow-matching MSE.

The mathematics is in reference/alignment_velocity_loss.py; kernels: kernels/alignment_velocity_loss.py (Triton) and
csrc/alignment_velocity_loss* (C++). `alignment_loss` and `velocity_loss` are its two halves from PyTorch's own
operators, for targets other than the latent.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..errors import InputError, must_be, must_have_type
from .checks import once_differentiable, output_dtype, records_gradient
from .interpolant import PATHS, interpolant
from .patchify import patchify
from .registry import launchers, operator

ALIGNMENTS = ("cosine", "smooth_l1", "mse", "l1")
MAX_PATCH_ELEMENTS = 256
_OP = "alignment_velocity_loss"
_WAY_OUT = 'implementation="eager" takes'
_FUSED_ON = backends.fused_devices(_OP)


def alignment_loss(
    projection: Tensor, target: Tensor, align: str, beta: float = 0.05, eps: float = 1e-6, reduction: str = "mean"
) -> Tensor:
    """The distance of projection and target tokens, a float32 mean (docs/method.md; arXiv 2601.17830).

    projection, target: (B, N, P) - compared in float32 (float64 stays).
    align: cosine (negative, per token), smooth_l1 (with beta), mse or l1 (means over elements).
    eps: a norm below it counts as it, so a zero token gives a finite value and gradient.
    reduction: "mean" over everything, 0-d, or "none": the mean of each sample, (B,).
    """
    if projection.dtype != torch.float64:
        projection, target = projection.float(), target.float()
    if align == "cosine":
        cosine = F.normalize(projection, dim=-1, eps=eps) * F.normalize(target, dim=-1, eps=eps)
        cosine = -cosine.sum(-1)
        return cosine.mean() if reduction == "mean" else _per_sample(cosine)
    if align == "smooth_l1":
        distance = F.smooth_l1_loss(projection, target, beta=beta, reduction=reduction)
    elif align == "mse":
        distance = F.mse_loss(projection, target, reduction=reduction)
    elif align == "l1":
        distance = F.l1_loss(projection, target, reduction=reduction)
    else:
        raise must_be("alignment_velocity_loss", "align", " or ".join(ALIGNMENTS), repr(align))
    return distance if reduction == "mean" else _per_sample(distance)


def velocity_loss(
    velocity_tokens: Tensor,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    patch_size: int,
    path: str = "linear",
    reduction: str = "mean",
) -> Tensor:
    """Mean over all elements of (v - (a' z + s' e))^2, in float32 (float64 stays); reduction as `alignment_loss`."""
    target = patchify(interpolant(path, t.to(latents.dtype)).velocity(latents, noise), patch_size)
    if velocity_tokens.dtype != torch.float64:
        velocity_tokens = velocity_tokens.float()
    target = target.to(velocity_tokens.dtype)
    distance = F.mse_loss(velocity_tokens, target, reduction=reduction)
    return distance if reduction == "mean" else _per_sample(distance)


def _per_sample(values: Tensor) -> Tensor:
    """(B, ...) -> (B,): the mean of each sample."""
    return values.flatten(1).mean(1)


def eager(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    velocity_tokens: Tensor,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    patch_size: int,
    path: str = "linear",
    align: str = "cosine",
    beta: float = 0.05,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The public style: `F.linear`, `F.normalize` or `F.smooth_l1_loss`, `F.mse_loss`; returns (velocity, align)."""
    velocity = velocity_loss(velocity_tokens, latents, noise, t, patch_size, path)
    projection = F.linear(hidden, weight, bias)
    return velocity, alignment_loss(projection, patchify(latents, patch_size), align, beta, eps)


def alignment_velocity_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    velocity_tokens: Tensor,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    patch_size: int,
    path: str = "linear",
    align: str = "cosine",
    beta: float = 0.05,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """(mean (v - v*)^2, alignment of hidden W^T + b with the clean latent), both losses and their gradients in one go.

    hidden: (B, N, K) float32 or bfloat16 - input of the last projection; taken to the autocast dtype where that is on.
    weight: (P, K), bias: (P,) - the last projection, rounded to hidden's dtype. P = patch_size^2 C <= 256.
    velocity_tokens: (B, N, P) float32 or bfloat16 - the model's output before unpatchify, in patchify's order.
    latents, noise: (B, C, H, W) float32. t: (B,) float - time in [0, 1]. These three get no gradient.
    path, align, beta, eps: as `eager`.
    Returns two 0-d float32 losses.
    Raises InputError for other shapes, dtypes, devices or words, or where latents, noise or t require a gradient.
    Precision: products, norms and sums in float32; dp and dvelocity are rounded once to the dtypes of hidden and
    velocity_tokens. Deterministic, and independent of the number of threads.
    Saved for backward: dp and dvelocity, and hidden and weight for the two products.
    """
    _check(hidden, weight, bias, velocity_tokens, latents, noise, t, patch_size, path, align, beta, eps)
    dtype = output_dtype(_OP, hidden)
    if hidden.device.type not in _FUSED_ON:
        projection = (hidden.to(dtype), weight.to(dtype), bias.to(dtype))
        named: dict[str, Any] = {"patch_size": patch_size, "path": path, "align": align, "beta": beta, "eps": eps}
        return eager(*projection, velocity_tokens, latents, noise, t, **named)
    images = (latents.contiguous(), noise.contiguous(), t.float().contiguous())
    settings = (patch_size, PATHS.index(path), ALIGNMENTS.index(align), beta, eps)
    hidden, velocity_tokens = hidden.to(dtype).contiguous(), velocity_tokens.contiguous()
    trained = (hidden, weight, bias, velocity_tokens)
    if records_gradient(_OP, *trained):
        return _AlignmentVelocityLoss.apply(*trained, (*images, *settings))
    weight, bias = weight.to(dtype).contiguous(), bias.to(dtype).contiguous()
    return _fwd(hidden, weight, bias, velocity_tokens, *images, *settings)[:2]


class _AlignmentVelocityLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, velocity_tokens, others):
        w = weight.to(hidden.dtype).contiguous()
        b = bias.to(hidden.dtype).contiguous()
        velocity, alignment, dvelocity, dp = _fwd(hidden, w, b, velocity_tokens, *others)
        need_dhidden, need_dweight, need_dbias, need_dvelocity = ctx.needs_input_grad[:4]
        ctx.save_for_backward(
            dp if need_dhidden or need_dweight or need_dbias else None,
            hidden if need_dweight else None,
            w if need_dhidden else None,
            dvelocity if need_dvelocity else None,
        )
        ctx.dtypes = weight.dtype, bias.dtype
        return velocity, alignment

    @staticmethod
    @once_differentiable
    def backward(ctx, dvelocity_loss, dalign_loss):
        dp, hidden, weight, dvelocity = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        dhidden = dweight = dbias = None
        if dp is not None:
            empty = dp.new_empty(0)
            dhidden, dweight, dbias = _bwd(
                dalign_loss, dp, empty if hidden is None else hidden, empty if weight is None else weight, *needs
            )
        return (
            dhidden if needs[0] else None,
            None if dweight is None or not needs[1] else dweight.to(ctx.dtypes[0]),
            None if dbias is None or not needs[2] else dbias.to(ctx.dtypes[1]),
            None if dvelocity is None else dvelocity * dvelocity_loss,
            None,
        )


_LETTERS = {
    "hidden": "(B, N, K)",
    "weight": "(P, K)",
    "bias": "(P,)",
    "velocity_tokens": "(B, N, P)",
    "latents": "(B, C, H, W)",
    "noise": "(B, C, H, W)",
    "t": "(B,)",
}


def _check(hidden, weight, bias, velocity_tokens, latents, noise, t, patch_size, path, align, beta, eps):
    tensors = (hidden, weight, bias, velocity_tokens, latents, noise, t)
    for name, one in zip(_LETTERS, tensors, strict=True):
        if not isinstance(one, Tensor):
            raise must_have_type(_OP, name, "a tensor", type(one).__name__)
        is_image = one is latents or one is noise
        if one.dtype != torch.float32 and (is_image or one.dtype != torch.bfloat16):
            expected = "float32" if is_image else "float32 or bfloat16"
            raise must_have_type(_OP, name, f"{expected} ({_WAY_OUT} other floats)", one.dtype)
        if one.device != hidden.device:
            raise must_be(_OP, name, f"on {hidden.device} like hidden", one.device)
    if path not in PATHS:
        raise must_be(_OP, "path", " or ".join(PATHS), repr(path))
    if align not in ALIGNMENTS:
        raise must_be(_OP, "align", " or ".join(ALIGNMENTS), repr(align))
    if not (beta > 0 and eps > 0):
        name, number = ("eps", eps) if beta > 0 else ("beta", beta)
        raise must_be(_OP, name, "positive", number)
    if hidden.dim() != 3 or 0 in hidden.shape[1:]:
        raise must_be(_OP, "hidden", "(B, N, K), N and K at least 1", tuple(hidden.shape))
    if latents.dim() != 4:
        raise must_be(_OP, "latents", "(B, C, H, W)", tuple(latents.shape))
    B, N, K = hidden.shape
    _, C, H, W = latents.shape
    P = patch_size * patch_size * C
    if not 1 <= P <= MAX_PATCH_ELEMENTS:
        expected = f"such that P = patch_size^2 C is from 1 to {MAX_PATCH_ELEMENTS} ({_WAY_OUT} more)"
        raise must_be(_OP, "patch_size", expected, f"{patch_size} with C = {C}")
    if H % patch_size or W % patch_size or (H // patch_size) * (W // patch_size) != N:
        raise must_be(_OP, "latents", f"(B, C, H, W) of N = {N} patches of {patch_size}", tuple(latents.shape))
    image = (B, C, H, W)
    shapes = (hidden.shape, (P, K), (P,), (B, N, P), image, image, (B,))
    for (name, letters), one, shape in zip(_LETTERS.items(), tensors, shapes, strict=True):
        if one.shape != shape:
            raise must_be(_OP, name, f"{letters} = {shape}", tuple(one.shape))
    if torch.is_grad_enabled() and (latents.requires_grad or noise.requires_grad or t.requires_grad):
        name = "latents" if latents.requires_grad else "noise" if noise.requires_grad else "t"
        raise InputError(f"{_OP}: {name} must not require a gradient ({_WAY_OUT} one that does)")


def _fwd_triton(hidden, weight, bias, velocity_tokens, latents, noise, t, patch_size, path, align, beta, eps):
    tensors = (hidden, weight, bias, velocity_tokens, latents, noise, t)
    settings = (patch_size, PATHS[path], ALIGNMENTS[align], beta, eps)
    return launchers(_OP).alignment_velocity_loss_fwd(*tensors, *settings)


@operator(
    _OP,
    "fwd",
    "(Tensor hidden, Tensor weight, Tensor bias, Tensor velocity_tokens, Tensor latents, Tensor noise, Tensor t,"
    " int patch_size, int path, int align, float beta, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    triton=_fwd_triton,
)
def _fwd(hidden, weight, bias, velocity_tokens, latents, noise, t, patch_size, path, align, beta, eps):
    loss = hidden.new_empty((), dtype=torch.float32)
    dp = hidden.new_empty(velocity_tokens.shape)
    return loss, torch.empty_like(loss), torch.empty_like(velocity_tokens), dp


def _bwd_cublas(dalign, dp, hidden, weight, need_dhidden, need_dweight, need_dbias):
    """Two products of cuBLAS; a kernel of ours would only save the scaling of dp, which is small."""
    with torch.autocast(dp.device.type, enabled=False):
        scaled = (dp * dalign).flatten(0, 1)
        dhidden = (scaled @ weight).view(*dp.shape[:2], -1) if need_dhidden else dp.new_empty(0)
        dweight = scaled.T @ hidden.flatten(0, 1) if need_dweight else dp.new_empty(0)
        dbias = scaled.sum(0, dtype=torch.float32) if need_dbias else dp.new_empty(0, dtype=torch.float32)
        return dhidden, dweight.float(), dbias


@operator(
    _OP,
    "bwd",
    "(Tensor dalign, Tensor dp, Tensor hidden, Tensor weight, bool need_dhidden, bool need_dweight, bool need_dbias)"
    " -> (Tensor, Tensor, Tensor)",
    triton=_bwd_cublas,
)
def _bwd(dalign, dp, hidden, weight, need_dhidden, need_dweight, need_dbias):
    B, N, P = dp.shape
    K = weight.shape[-1] if need_dhidden else hidden.shape[-1]
    return (
        dp.new_empty((B, N, K) if need_dhidden else 0),
        dp.new_empty((P, K) if need_dweight else 0, dtype=torch.float32),
        dp.new_empty(P if need_dbias else 0, dtype=torch.float32),
    )
