"""flash-attn's packed attention, played on any device: what a budget traces on fake tensors, and tests compute with.

flash-attn 2.8 registers `flash_attn::_flash_attn_forward` and `_flash_attn_backward`, which torch sees as one operator
each, and around them an autograd function: it saves views of the packed projection, the result and the logsumexp, and
its backward has dq, dk and dv written into slices of one tensor. FlashAttention 3 does the same with `flash_attn_3::`.
Here the same two operators stand under a name of their own, with what they read, write and return, and computed in
float32. Left out: dropout, masks, and head_dim padded to a multiple of 8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAMESPACE = "flash_attn_stand_in"
_BLOCK = 128  # the backward's row sums are padded to so many queries

_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(
    "_flash_attn_forward(Tensor q, Tensor k, Tensor v, float softmax_scale) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "_flash_attn_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, float softmax_scale, bool deterministic, Tensor rng_state) -> Tensor"
)


def _results(q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, logsumexp (B, H, N), no probabilities, and the state of a generator."""
    b, n, h, _ = q.shape
    lse = q.new_empty(b, h, n, dtype=torch.float32)
    return q.new_empty(q.shape), lse, q.new_empty(0), q.new_empty(2, dtype=torch.int64)


def _row_sums(q: Tensor) -> Tensor:
    b, n, h, _ = q.shape
    return q.new_zeros(b, h, -(-n // _BLOCK) * _BLOCK, dtype=torch.float32)


def _forward(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, lse, probabilities, state = _results(q)
    scores = torch.einsum("bnhd,bmhd->bhnm", q.float(), k.float()) * softmax_scale
    lse.copy_(scores.logsumexp(-1))
    out.copy_(torch.einsum("bhnm,bmhd->bnhd", (scores - lse.unsqueeze(-1)).exp(), v.float()))
    return out, lse, probabilities, state


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    softmax_scale: float,
    deterministic: bool,
    rng_state: Tensor,
) -> Tensor:
    sums = _row_sums(q)
    scores = torch.einsum("bnhd,bmhd->bhnm", q.float(), k.float()) * softmax_scale
    weights = (scores - softmax_lse.unsqueeze(-1)).exp()
    delta = (dout.float() * out.float()).sum(-1).transpose(1, 2)
    sums[..., : q.shape[1]] = delta
    dscores = weights * (torch.einsum("bnhd,bmhd->bhnm", dout.float(), v.float()) - delta.unsqueeze(-1)) * softmax_scale
    dv.copy_(torch.einsum("bhnm,bnhd->bmhd", weights, dout.float()))
    dq.copy_(torch.einsum("bhnm,bmhd->bnhd", dscores, k.float()))
    dk.copy_(torch.einsum("bhnm,bnhd->bmhd", dscores, q.float()))
    return sums


_library.impl("_flash_attn_forward", _forward, "CPU")
_library.impl("_flash_attn_backward", _backward, "CPU")
torch.library.register_fake(f"{NAMESPACE}::_flash_attn_forward", lambda q, *_: _results(q), lib=_library)
torch.library.register_fake(f"{NAMESPACE}::_flash_attn_backward", lambda dout, q, *_: _row_sums(q), lib=_library)
_ops = getattr(torch.ops, NAMESPACE)


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, deterministic: bool) -> Tensor:
        q, k, v = qkv[:, :, 0].detach(), qkv[:, :, 1].detach(), qkv[:, :, 2].detach()
        ctx.scale, ctx.deterministic = qkv.shape[-1] ** -0.5, deterministic
        out, lse, _, state = _ops._flash_attn_forward(q, k, v, ctx.scale)
        ctx.save_for_backward(q, k, v, out, lse, state)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        q, k, v, out, lse, state = ctx.saved_tensors
        dqkv = q.new_empty(*q.shape[:-2], 3, *q.shape[-2:])
        slices = dqkv[:, :, 0], dqkv[:, :, 1], dqkv[:, :, 2]
        _ops._flash_attn_backward(dout, q, k, v, out, lse, *slices, ctx.scale, ctx.deterministic, state)
        return dqkv, None


class _Separate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, deterministic: bool) -> Tensor:
        ctx.scale, ctx.deterministic = q.shape[-1] ** -0.5, deterministic
        out, lse, _, state = _ops._flash_attn_forward(q, k, v, ctx.scale)
        ctx.save_for_backward(q, k, v, out, lse, state)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, state = ctx.saved_tensors
        gradients = tuple(torch.empty_like(one) for one in (q, k, v))
        _ops._flash_attn_backward(dout, q, k, v, out, lse, *gradients, ctx.scale, ctx.deterministic, state)
        return *gradients, None


def flash_attn_qkvpacked_func(qkv: Tensor, *, deterministic: bool = False) -> Tensor:
    """(B, N, 3, H, head_dim) -> (B, N, H, head_dim)."""
    return _Packed.apply(qkv, deterministic)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, deterministic: bool = False) -> Tensor:
    """(B, N, H, head_dim) each -> the same."""
    return _Separate.apply(q, k, v, deterministic)
