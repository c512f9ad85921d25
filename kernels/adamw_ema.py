"""Clipped AdamW and the exponential moving average of all parameters in one pass over memory, in place, on CUDA.

`global_norm` reads the gradients once; `adamw_ema_step` then reads five float32 tensors a parameter and writes four, 36
bytes an element with the moving average, and nothing else. With bf16 gradients and a bf16 copy of the weight, which the
next forward multiplies by, it is as many: two bytes less read, two more written. Both take any number of tensors in one
launch: a table of addresses and a table of chunks lie on the device, made by `tensor_table.py`. The step decides on the
device whether the norm is finite, so the host never waits; rate and decay may lie there too, for a captured step. The
update's equations are in `sra2_fast/reference/adamw_ema.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .row_tiles import multiprocessors
from .tensor_table import CHUNK, address_table, chunk_table


@dataclass(frozen=True)
class OptimizerLaunch:
    """Elements a program touches at once, its warps, and how many programs a multiprocessor reads the norm with."""

    block: int
    num_warps: int
    norm_programs: int


def launch_config(rows: int, D: int, dtype: torch.dtype) -> OptimizerLaunch:
    """The same for every size: the tensors are one stream of chunks. rows and D (tensors, elements) change nothing.

    1024 elements on 4 warps are two 16-byte accesses a thread and tensor: ten in flight before the first use.
    """
    return OptimizerLaunch(block=1024, num_warps=4, norm_programs=8)


@triton.jit
def _tensor_at(table_ptr, index, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The tensor whose address is entry `index`; ALIGNED: all of them start at a multiple of 16 bytes."""
    pointer = tl.load(table_ptr + index).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _one_minus_power(log_beta, steps):
    """1 - beta^steps without cancellation: -expm1(x), x = steps log(beta) <= 0.

    At beta = 0.999 and the first step, 1 - exp(x) in float32 would keep 4 of 7 digits. The series is exact to float32
    for |x| <= 1/2, where it is used.
    """
    x = log_beta * steps
    series = 1.0 + x * (1.0 / 9)
    series = 1.0 + x * (1.0 / 8) * series
    series = 1.0 + x * (1.0 / 7) * series
    series = 1.0 + x * (1.0 / 6) * series
    series = 1.0 + x * (1.0 / 5) * series
    series = 1.0 + x * (1.0 / 4) * series
    series = 1.0 + x * (1.0 / 3) * series
    series = 1.0 + x * (1.0 / 2) * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _global_norm_kernel(
    grad_table_ptr,  # (tensors,) int64 addresses of tensors of type DTYPE
    numel_ptr, chunk_tensor_ptr, chunk_number_ptr, chunks,  # tensor_table.ChunkTable
    partial_ptr,  # (programs,) float32: written, each program's sum of squares
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        tensor = tl.load(chunk_tensor_ptr + chunk)
        first = tl.load(chunk_number_ptr + chunk).to(tl.int64) * CHUNK_SIZE
        left = tl.load(numel_ptr + tensor) - first
        grad_ptr = _tensor_at(grad_table_ptr, tensor, DTYPE, ALIGNED) + first
        if left >= CHUNK_SIZE:
            for start in tl.static_range(0, CHUNK_SIZE, BLOCK):
                grad = tl.load(grad_ptr + start + lane).to(tl.float32)
                total += grad * grad
        else:
            for start in range(0, left, BLOCK):
                grad = tl.load(grad_ptr + start + lane, mask=start + lane < left, other=0.0).to(tl.float32)
                total += grad * grad
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _root_of_sum_kernel(partial_ptr, norm_ptr, partials, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, partials, BLOCK):
        total += tl.load(partial_ptr + start + lane, mask=start + lane < partials, other=0.0)
    tl.store(norm_ptr, tl.sqrt(tl.sum(total, axis=0)))


@triton.jit
def _load(pointer, lane, left, FULL: tl.constexpr):
    if FULL:  # without a mask: one that ends anywhere would take the 16-byte accesses apart
        return tl.load(pointer + lane).to(tl.float32)
    else:
        return tl.load(pointer + lane, mask=lane < left, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, value, lane, left, FULL: tl.constexpr):
    if FULL:
        tl.store(pointer + lane, value)
    else:
        tl.store(pointer + lane, value, mask=lane < left)


@triton.jit
def _update_chunk(
    pointers, factors, left,
    HAS_EMA: tl.constexpr, HAS_SHADOW: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The update of `left` elements; FULL: `left` is a multiple of BLOCK."""
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, ema_ptr, shadow_ptr = pointers
    clip, step_size, inverse_root, moments, eps, decay, one_minus_ema_decay = factors
    one_minus_beta1, beta2, one_minus_beta2 = moments
    for start in range(0, left, BLOCK):
        lane = start + tl.arange(0, BLOCK)
        grad = _load(grad_ptr, lane, left, FULL) * clip
        param = _load(param_ptr, lane, left, FULL)
        exp_avg = _load(exp_avg_ptr, lane, left, FULL)
        exp_avg_sq = _load(exp_avg_sq_ptr, lane, left, FULL)
        if HAS_EMA:
            ema = _load(ema_ptr, lane, left, FULL)
        exp_avg += one_minus_beta1 * (grad - exp_avg)
        exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (grad * grad)
        denominator = tl.sqrt(exp_avg_sq) * inverse_root + eps
        param = param * decay - step_size * (exp_avg / denominator)
        _store(exp_avg_ptr, exp_avg, lane, left, FULL)
        _store(exp_avg_sq_ptr, exp_avg_sq, lane, left, FULL)
        _store(param_ptr, param, lane, left, FULL)
        if HAS_SHADOW:
            _store(shadow_ptr, param.to(tl.bfloat16), lane, left, FULL)
        if HAS_EMA:
            # Weighted, not ema + w (param - ema): a decay of 0 must give the parameter to the last bit.
            average = (1.0 - one_minus_ema_decay) * ema + one_minus_ema_decay * param
            _store(ema_ptr, average, lane, left, FULL)


@triton.jit
def _adamw_ema_kernel(
    table_ptr, tensors,  # (rows, tensors) int64 addresses: params, grads, exp_avgs, exp_avg_sqs, then emas, shadows
    steps_ptr, norm_ptr,  # (tensors,) and () float32
    rates_ptr,  # (2,) float64: lr, ema_decay; read where HAS_RATES
    numel_ptr, chunk_tensor_ptr, chunk_number_ptr,  # tensor_table.ChunkTable
    lr, weight_decay, one_minus_beta1, beta2, one_minus_beta2, log_beta1, log_beta2,
    eps, decay, one_minus_ema_decay, max_grad_norm,  # decay: of the weights, 1 - lr weight_decay
    HAS_EMA: tl.constexpr, HAS_SHADOW: tl.constexpr, HAS_RATES: tl.constexpr, HAS_CLIP: tl.constexpr,
    GRAD_DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    norm = tl.load(norm_ptr)
    if norm < float("inf"):  # false for NaN too: nothing is read or written then
        chunk = tl.program_id(0)
        tensor = tl.load(chunk_tensor_ptr + chunk)
        # int64: a tensor may have more than 2^31 elements.
        first = tl.load(chunk_number_ptr + chunk).to(tl.int64) * CHUNK_SIZE
        left = tl.load(numel_ptr + tensor) - first
        param_ptr = _tensor_at(table_ptr, tensor, tl.float32, ALIGNED) + first
        grad_ptr = _tensor_at(table_ptr + tensors, tensor, GRAD_DTYPE, ALIGNED) + first
        exp_avg_ptr = _tensor_at(table_ptr + 2 * tensors, tensor, tl.float32, ALIGNED) + first
        exp_avg_sq_ptr = _tensor_at(table_ptr + 3 * tensors, tensor, tl.float32, ALIGNED) + first
        ema_ptr, shadow_ptr = param_ptr, param_ptr  # not used unless there is one
        if HAS_EMA:
            ema_ptr = _tensor_at(table_ptr + 4 * tensors, tensor, tl.float32, ALIGNED) + first
        if HAS_SHADOW:
            shadow_row = 5 if HAS_EMA else 4
            shadow_ptr = _tensor_at(table_ptr + shadow_row * tensors, tensor, tl.bfloat16, ALIGNED) + first
        pointers = (param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, ema_ptr, shadow_ptr)
        if HAS_RATES:  # in float64: 1 - 0.9999 in float32 would keep 3 of 7 digits
            exact_lr = tl.load(rates_ptr)
            lr = exact_lr.to(tl.float32)
            decay = (1.0 - exact_lr * weight_decay).to(tl.float32)
            one_minus_ema_decay = (1.0 - tl.load(rates_ptr + 1)).to(tl.float32)
        clip = 1.0
        if HAS_CLIP:
            clip = tl.minimum(max_grad_norm / (norm + 1e-6), 1.0)
        steps = tl.load(steps_ptr + tensor)
        step_size = lr / _one_minus_power(log_beta1, steps)
        inverse_root = 1.0 / tl.sqrt(_one_minus_power(log_beta2, steps))
        moments = (one_minus_beta1, beta2, one_minus_beta2)
        factors = (clip, step_size, inverse_root, moments, eps, decay, one_minus_ema_decay)
        if left >= CHUNK_SIZE:
            _update_chunk(pointers, factors, CHUNK_SIZE, HAS_EMA, HAS_SHADOW, True, BLOCK)
        else:
            _update_chunk(pointers, factors, left, HAS_EMA, HAS_SHADOW, False, BLOCK)


_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


def global_norm(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """n = sqrt(sum over all tensors and elements of g^2), a 0-d float32 tensor on the gradients' device.

    grads: float32 or bfloat16, each dense and of any shape; at least one tensor. Sums in float32 and in a fixed order;
    a launch a dtype.
    """
    device = grads[0].device
    config = launch_config(len(grads), 0, torch.float32)
    most = config.norm_programs * multiprocessors(device)
    by_dtype = [[g for g in grads if g.dtype is dtype and g.numel()] for dtype in _TRITON_DTYPES]
    partial = torch.empty(len(by_dtype) * most, device=device, dtype=torch.float32)
    partials = 0
    for dtype, members in zip(_TRITON_DTYPES, by_dtype, strict=True):
        if not members:
            continue
        table, chunks = address_table((members,)), chunk_table(members)
        programs = min(chunks.chunks, most)
        _global_norm_kernel[(programs,)](
            table.addresses,
            chunks.numels, chunks.chunk_tensor, chunks.chunk_number, chunks.chunks,
            partial[partials:],
            DTYPE=_TRITON_DTYPES[dtype], ALIGNED=table.is_aligned, CHUNK_SIZE=CHUNK, BLOCK=config.block,
            num_warps=config.num_warps,
        )  # fmt: skip
        partials += programs
    norm = torch.empty((), device=device, dtype=torch.float32)
    if partials == 0:
        return norm.zero_()
    _root_of_sum_kernel[(1,)](partial, norm, partials, BLOCK=1024, num_warps=4)
    return norm


def adamw_ema_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    emas: Sequence[torch.Tensor] | None,
    shadows: Sequence[torch.Tensor] | None,
    steps: torch.Tensor,
    norm: torch.Tensor,
    rates: torch.Tensor | None,
    settings: Any,
) -> None:
    """One clipped AdamW step and the moving average, in place; nothing changes where `norm` is not finite.

    params, exp_avgs, exp_avg_sqs, emas: float32 tensors, dense, the same shapes and strides across the lists; grads:
    likewise, all float32 or all bfloat16; shadows: likewise, bfloat16, written with the new params. emas, shadows None
    or empty: there are none. steps: (len(params),) float32 on the device, this step counted.
    norm: 0-d float32 on the device. rates: (2,) float64 on the device, lr and ema_decay in place of the settings'
    numbers, or None. settings: `sra2_fast.reference.adamw_ema.AdamWEMASettings`, or any object with lr, beta1, beta2,
    eps, weight_decay, ema_decay (None: no average) and max_grad_norm (None: no clipping).
    """
    if not params:
        return
    chunks = chunk_table(params)
    if chunks.chunks == 0:
        return
    lists = [params, grads, exp_avgs, exp_avg_sqs, *([emas] if emas else []), *([shadows] if shadows else [])]
    table = address_table(lists)
    config = launch_config(len(params), 0, torch.float32)
    beta1, beta2, max_grad_norm = settings.beta1, settings.beta2, settings.max_grad_norm
    ema_decay = settings.ema_decay if emas and settings.ema_decay is not None else 1.0
    _adamw_ema_kernel[(chunks.chunks,)](
        table.addresses, len(params),
        steps, norm,
        norm if rates is None else rates,
        chunks.numels, chunks.chunk_tensor, chunks.chunk_number,
        settings.lr, settings.weight_decay,
        1 - beta1, beta2, 1 - beta2, *(math.log(b) if b > 0 else -math.inf for b in (beta1, beta2)),
        settings.eps, 1 - settings.lr * settings.weight_decay, 1 - ema_decay, max_grad_norm or 0.0,
        HAS_EMA=bool(emas), HAS_SHADOW=bool(shadows), HAS_RATES=rates is not None, HAS_CLIP=max_grad_norm is not None,
        GRAD_DTYPE=_TRITON_DTYPES[grads[0].dtype], ALIGNED=table.is_aligned,
        CHUNK_SIZE=CHUNK, BLOCK=config.block, num_warps=config.num_warps,
    )  # fmt: skip
