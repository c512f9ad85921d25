"""softmax(q k^T / sqrt(head_dim)) v, by whichever of several backends was chosen from outside.

An entry to others' kernels, not an op of ours: no reference or kernel of its own, and nothing is chosen here. Names and
what each needs are in `backends.ATTENTION`; what is fastest is measured by `models/attention.py`. A kernel of ours for
(N, head_dim) = (256, 72) would be one more `Backend`.

The flash-attn functions take and give the packed projection: its gradient comes as one tensor, where PyTorch's kernels
give dq, dk and dv, which are then copied together (3.2 GB a step of SiT-XL/2 at batch 32).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import backends
from .attention_matmul import attention_matmul

MOST_SAMPLES = 65_535  # kernels count samples in a grid's y or z, which ends there
Packed = Callable[[Tensor], Tensor]  # (B, N, 3, H, head_dim) -> (B, N, H, head_dim)
Separate = Callable[[Tensor, Tensor, Tensor], Tensor]  # each (B, N, H, head_dim)


@dataclass(frozen=True)
class Backend:
    """One way to compute attention. device_type, dtypes: of the tensors it takes, None: all; SDPA runs the others."""

    name: str
    separate: Separate
    packed: Packed | None = None  # where the packed projection is taken as it is
    device_type: str | None = "cuda"
    dtypes: tuple[torch.dtype, ...] | None = (torch.bfloat16, torch.float16)

    def takes(self, tensor: Tensor) -> bool:
        has_device = self.device_type is None or tensor.device.type == self.device_type
        return has_device and (self.dtypes is None or tensor.dtype in self.dtypes)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's `scaled_dot_product_attention`, and of its kernels the one that it picks."""
    q, k, v = (m.transpose(1, 2) for m in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's composition: its kernels have no forward-mode derivatives."""
    with sdpa_kernel(SDPBackend.MATH):
        return sdpa(q, k, v)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa(q, k, v)


def _efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return sdpa(q, k, v)


def _matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention_matmul(torch.stack((q, k, v), 2))


def _flash_attn(name: str) -> Backend:
    """flash-attn's own functions, looked up once. Raises ImportError where they are not installed."""
    packed, separate = backends.flash_attn_functions(name)
    return Backend(name, functools.partial(_without_lse, separate), functools.partial(_without_lse, packed))


def _without_lse(function: Callable[..., Any], *tensors: Tensor) -> Tensor:
    """flash-attn is deterministic where torch was told to be. FlashAttention 3 of before August 2025 returned the
    logsumexp as well."""
    out = function(*tensors, deterministic=torch.are_deterministic_algorithms_enabled())
    return out[0] if isinstance(out, tuple) else out


SDPA = Backend("sdpa", sdpa, device_type=None, dtypes=None)
BACKENDS: dict[str, Callable[[], Backend]] = {  # the names of `backends.ATTENTION`
    "sdpa": lambda: SDPA,
    "matmul": lambda: Backend("matmul", _matmul, attention_matmul, "cpu", (torch.bfloat16,)),
    "flash-attn-3": lambda: _flash_attn("flash-attn-3"),
    "flash-attn": lambda: _flash_attn("flash-attn"),
    "cudnn": lambda: Backend("cudnn", _cudnn),
    "flash": lambda: Backend("flash", _flash),
    "efficient": lambda: Backend("efficient", _efficient, dtypes=(torch.float32, torch.bfloat16, torch.float16)),
}


def find(name: str) -> Backend:
    """The backend of this name. Raises ImportError for a flash-attn that is not installed."""
    return BACKENDS[name]()


def attention(qkv: Tensor, backend: Backend = SDPA) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v of a packed projection (arXiv 1706.03762, Eq. 1).

    qkv: (B, N, 3, H, head_dim), any strides with the last one 1 - queries, keys, values.
    backend: SDPA runs instead for tensors it does not take, and PyTorch's composition in forward-mode differentiation.
    Returns (B, N, H, head_dim) in qkv's type.
    """
    if len(qkv) > MOST_SAMPLES:
        return torch.cat([attention(part, backend) for part in qkv.split(MOST_SAMPLES)])
    if backend.packed is not None and backend.takes(qkv) and forward_ad._current_level < 0:
        return backend.packed(qkv)
    q, k, v = qkv.unbind(2)
    return attention_unpacked(q, k, v, backend)


def attention_unpacked(q: Tensor, k: Tensor, v: Tensor, backend: Backend = SDPA) -> Tensor:
    """The same for q, k, v of (B, N, H, head_dim) each, as they are where q and k were normalised."""
    if len(q) > MOST_SAMPLES:
        parts = zip(q.split(MOST_SAMPLES), k.split(MOST_SAMPLES), v.split(MOST_SAMPLES), strict=True)
        return torch.cat([attention_unpacked(*part, backend) for part in parts])
    if forward_ad._current_level >= 0:  # the one level of torch.func.jvp or of forward_ad that may be open
        return _math(q, k, v)
    return (backend if backend.takes(v) else SDPA).separate(q, k, v)
