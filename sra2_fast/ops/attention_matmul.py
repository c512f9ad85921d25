"""Attention from batched matrix products on a CPU in bf16, as accurate as PyTorch's flash attention there and faster.

Scores, weights and the weights' gradient come from float32 products: rounded to bf16 they double the error
(benchmarks/RECORDS.md). dq, dk and dv end in bf16 anyway and come from bf16 ones. It pays by keeping P = softmax(q k^T)
for the backward, H N^2 bf16 numbers a sample, which is why nobody chooses it for long sequences (models/attention.py).

Two operators, so that torch.compile and fake tensors see one call each and not a loop. A few samples run at a time:
their scores stay in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import once_differentiable
from .registry import library


def attention_matmul(qkv: Tensor) -> Tensor:
    """qkv: (B, N, 3, H, head_dim) bf16 on a CPU -> (B, N, H, head_dim); see `ops/attention.py`.

    Saved for the backward: qkv, the result, and P (B, H, N, N) in bf16.
    """
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _AttentionMatmul.apply(qkv)
    return _fwd(qkv, False)[0]


class _AttentionMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> Tensor:
        out, weights = _fwd(qkv, True)
        ctx.save_for_backward(qkv, out, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor]:
        return (_bwd(dout, *ctx.saved_tensors),)


def _forward_on_cpu(qkv: Tensor, keep_weights: bool) -> tuple[Tensor, Tensor]:
    b, n, _, h, head_dim = qkv.shape
    out = qkv.new_empty(b, n, h, head_dim)
    weights = qkv.new_empty(b, h, n, n) if keep_weights else qkv.new_empty(0)
    for some in _pieces(b):
        q, k, v = _by_head(qkv[some].float())
        p = torch.softmax(torch.bmm(q.mul_(head_dim**-0.5), k.transpose(1, 2)), -1)
        if keep_weights:
            weights[some] = p.view(-1, h, n, n)
        out[some] = torch.bmm(p, v).view(-1, h, n, head_dim).transpose(1, 2)
    return out, weights


def _backward_on_cpu(dout: Tensor, qkv: Tensor, out: Tensor, weights: Tensor) -> Tensor:
    """dS = P (dP - rowsum(dout out)), dP = dout v^T; dq = dS k, dk = dS^T q, dv = P^T dout."""
    b, n, _, h, head_dim = qkv.shape
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    for some in _pieces(b):
        q, k, v = _by_head(qkv[some])
        (g,) = _by_head(dout[some].unsqueeze(2))
        p = weights[some].view(-1, n, n)
        delta = (dout[some].float() * out[some].float()).sum(-1).transpose(1, 2).reshape(-1, n, 1)
        dp = torch.bmm(g.float(), v.float().transpose(1, 2))
        ds = dp.sub_(delta).mul_(head_dim**-0.5).mul_(p)
        gradients = torch.bmm(ds, k.float()), torch.bmm(ds.to(qkv.dtype).mT, q), torch.bmm(p.mT, g)
        for index, gradient in enumerate(gradients):
            dqkv[some, :, index] = gradient.view(-1, h, n, head_dim).transpose(1, 2)
    return dqkv


def _pieces(batch_size: int) -> list[slice]:
    """As many samples at a time as there are threads."""
    size = torch.get_num_threads()
    return [slice(start, start + size) for start in range(0, batch_size, size)]


def _by_head(some: Tensor) -> tuple[Tensor, ...]:
    """(b, N, K, H, head_dim) -> K of (b H, N, head_dim), copied where the strides ask for it."""
    return tuple(one.reshape(-1, *one.shape[2:]) for one in some.permute(2, 0, 3, 1, 4))


def _fake_forward(qkv: Tensor, keep_weights: bool) -> tuple[Tensor, Tensor]:
    b, n, _, h, head_dim = qkv.shape
    return qkv.new_empty(b, n, h, head_dim), qkv.new_empty((b, h, n, n) if keep_weights else 0)


def _fake_backward(dout: Tensor, qkv: Tensor, out: Tensor, weights: Tensor) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _operator(name: str, schema: str, on_cpu: Any, fake: Any) -> Any:
    library.define(name + schema)
    library.impl(name, on_cpu, "CPU")
    torch.library.register_fake(f"sra2_fast::{name}", fake, lib=library)
    return getattr(torch.ops.sra2_fast, name).default


_fwd = _operator(
    "attention_matmul_fwd", "(Tensor qkv, bool keep_weights) -> (Tensor, Tensor)", _forward_on_cpu, _fake_forward
)
_bwd = _operator(
    "attention_matmul_bwd",
    "(Tensor dout, Tensor qkv, Tensor out, Tensor weights) -> Tensor",
    _backward_on_cpu,
    _fake_backward,
)
