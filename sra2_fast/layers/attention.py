"""Multi-head self-attention with the projections and keys of the public models.

The inner product is flash-attn's where that is installed and fits (CUDA, bf16), else `scaled_dot_product_attention`,
which picks its own flash, cuDNN or efficient kernel (its composition in forward-mode differentiation).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import backends


class Attention(nn.Module):
    """softmax(q k^T / sqrt(head_dim)) v over N tokens, H heads (arXiv 1706.03762, Eq. 1).

    qk_norm: layer-normalise q and k per head, with weights, eps 1e-5 (arXiv 2302.05442).
    """

    def __init__(self, hidden_size: int, num_heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.flash_attn = backends.flash_attn_func()

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D) -> (B, N, D)."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, d // self.num_heads).unbind(2)  # each (B, N, H, head_dim)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.flash_attn is not None and v.is_cuda and v.dtype == torch.bfloat16:
            out = self.flash_attn(q.to(v.dtype), k.to(v.dtype), v)
        else:
            # qk_norm leaves q and k in float32 under autocast; v has the type the product should run in.
            q, k, v = (m.to(v.dtype).transpose(1, 2) for m in (q, k, v))
            # The one level of torch.func.jvp or of forward_ad that may be open.
            attend = F.scaled_dot_product_attention if forward_ad._current_level < 0 else _differentiable_attention
            out = attend(q, k, v).transpose(1, 2)
        return self.proj(out.reshape(b, n, d))


def _differentiable_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The composition: torch's kernels have no forward-mode derivatives."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)
