"""The products of a Linear layer that take an epilogue with them: what `sra2_fast/ops/linear.py` runs on CUDA.

Each reads its factors and writes its results once. GELU is the tanh approximation.
"""

from __future__ import annotations

import torch

from .cublaslt import BGRADB, DGELU_BGRAD, GELU_AUX_BIAS, Operand, product


def linear_gelu_fwd(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(GELU(h), h) with h = x W^T + b. x: (M, K), weight: (N, K), bias: (N,); bfloat16, contiguous, N a multiple of 8.

    h is rounded for its copy alone: GELU reads the float32 sum.
    """
    y = x.new_empty(x.shape[0], weight.shape[0])
    h = torch.empty_like(y)
    product(Operand(x), Operand(weight, is_transposed=True), y, GELU_AUX_BIAS, bias, h)
    return y, h


def linear_gelu_bwd(dy: torch.Tensor, weight: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(dh, its sum over rows) with dh = (dy W) GELU'(h). dy: (M, K), weight: (K, N) of the next layer, h: (M, N)."""
    dh, dbias = torch.empty_like(h), h.new_empty(h.shape[1])
    product(Operand(dy), Operand(weight), dh, DGELU_BGRAD, dbias, h)
    return dh, dbias


def linear_weight_bwd(dy: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(dy^T x, the sum of dy over rows): the gradients of weight and bias. dy: (M, N), x: (M, K)."""
    dweight, dbias = x.new_empty(dy.shape[1], x.shape[1]), dy.new_empty(dy.shape[1])
    product(Operand(dy, is_transposed=True), Operand(x), dweight, BGRADB, dbias, None)
    return dweight, dbias
