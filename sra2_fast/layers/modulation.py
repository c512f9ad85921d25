"""The modulations of all blocks at once: one product instead of one for each block, forward and backward.

Every adaLN head reads the same c. Under autocast their weights are copied to its type anyway: here into one matrix, so
that SiLU(c), the product, its two gradients and the sums for the biases are one operator each, not depth + 1. Weights
that lie one after another in that type already, as a training step's shadows do (optim/shadow_weights.py), are that
matrix. Without autocast nothing is copied: SiLU(c) is shared and each head multiplies by itself. State-dict keys stay
per block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import autocast_dtype, once_differentiable, records_gradient
from .plain import is_plain, is_readable, watched


def adaln_head(hidden_size: int, modulations: int) -> nn.Sequential:
    """SiLU, then a Linear D -> modulations * D."""
    return watched(nn.Sequential(watched(nn.SiLU()), watched(nn.Linear(hidden_size, modulations * hidden_size))))


def adaln_biases(heads: Sequence[nn.Module]) -> list[Tensor]:
    """The biases of the heads that are computed together: their gradients are float32 sums."""
    return [head[1].bias for head in heads if _is_readable_head(head)]  # type: ignore[index]


def modulate_all(heads: Sequence[nn.Module | None], c: Tensor) -> list[Tensor | None]:
    """SiLU(c) W_i^T + b_i of every head; None for one that has to be called itself (layers/plain.py).

    heads: of `adaln_head`, or None. c: (B, D). Returns (B, M_i) each, in the autocast type where that is on, else in
    c's; rows of one matrix where the product was one. Precision: as F.linear; dc is summed over all heads inside the
    product, in float32.
    """
    found: list[Tensor | None] = [None] * len(heads)
    places = [i for i, head in enumerate(heads) if _is_readable_head(head)]
    if not places:
        return found
    linears: list[Any] = [heads[i][1] for i in places]  # type: ignore[index]
    weights, biases = [one.weight for one in linears], [one.bias for one in linears]
    c, dtype = F.silu(c), autocast_dtype(c.device.type)
    is_one = dtype is not None and (dtype != weights[0].dtype or _is_one_matrix(weights))
    if not is_one or len(places) == 1:
        products = tuple(F.linear(c, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    elif records_gradient("SiT", c, *weights, *biases):
        products = _OneProduct.apply(c, dtype, *weights, *biases)
    else:
        products = _one_product(c.to(dtype), weights, biases)[0]
    for place, product in zip(places, products, strict=True):
        found[place] = product
    return found


def _is_readable_head(head: nn.Module | None) -> bool:
    if head is None or not is_plain(head, nn.Sequential) or len(head) != 2:  # type: ignore[arg-type]
        return False
    return is_plain(head[0], nn.SiLU) and is_readable(head[1], nn.Linear)  # type: ignore[index]


def _is_one_matrix(weights: Sequence[Tensor]) -> bool:
    """Whether the rows of all weights lie one after another in one memory. Compiled code does not look."""
    if torch.compiler.is_compiling():
        return False
    first = weights[0]
    storage, offset = first.untyped_storage()._cdata, first.storage_offset()
    for weight in weights:
        place = weight.untyped_storage()._cdata, weight.storage_offset()
        if place != (storage, offset) or not weight.is_contiguous():
            return False
        offset += weight.numel()
    return True


def _matrix(weights: Sequence[Tensor], rows: list[int], dtype: torch.dtype) -> Tensor:
    """All weights as one matrix (sum of M_i, D) of this type, without a copy where they are one."""
    columns = weights[0].shape[1]
    if weights[0].dtype == dtype and _is_one_matrix(weights):
        return weights[0].detach().as_strided((sum(rows), columns), (columns, 1))
    matrix = weights[0].new_empty((sum(rows), columns), dtype=dtype)
    torch._foreach_copy_(list(matrix.split(rows)), list(weights))  # one launch, each weight read once
    return matrix


def _one_product(c: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
    """(the heads' products, all weights as one matrix (sum of M_i, D)), in c's type."""
    rows = [len(weight) for weight in weights]
    with torch.autocast(c.device.type, enabled=False):
        matrix = _matrix(weights, rows, c.dtype)
        product = torch.addmm(torch.cat(list(biases)).to(c.dtype), c, matrix.t())
    return product.split(rows, dim=1), matrix


class _OneProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, c, dtype, *weights_and_biases):
        count = len(weights_and_biases) // 2
        weights, biases = weights_and_biases[:count], weights_and_biases[count:]
        low = c.to(dtype)
        products, matrix = _one_product(low, weights, biases)
        ctx.save_for_backward(low, matrix)
        ctx.rows, ctx.dtypes = [len(weight) for weight in weights], (c.dtype, weights[0].dtype, biases[0].dtype)
        return products

    @staticmethod
    @once_differentiable
    def backward(ctx, *dproducts):
        low, matrix = ctx.saved_tensors
        c_dtype, weight_dtype, bias_dtype = ctx.dtypes
        needs = ctx.needs_input_grad
        with torch.autocast(low.device.type, enabled=False):
            d = torch.cat([one.to(low.dtype) for one in dproducts], dim=1)  # (B, sum of M_i): small beside the weights
            dc = (d @ matrix).to(c_dtype) if needs[0] else None
            dweights = (d.t() @ low).to(weight_dtype).split(ctx.rows)
            dbiases = d.sum(0, dtype=torch.float32).to(bias_dtype).split(ctx.rows)
        gradients = [one if needed else None for one, needed in zip((*dweights, *dbiases), needs[2:], strict=True)]
        return dc, None, *gradients
