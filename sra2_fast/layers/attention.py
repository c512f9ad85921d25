"""Multi-head self-attention with the projections and keys of the public models; what computes the inner product is
an attribute of each module, set from outside."""

from __future__ import annotations

from torch import Tensor, nn

from .. import backends
from ..ops.attention import SDPA, attention, attention_unpacked, find
from .linear import Linear


class Attention(nn.Module):
    """softmax(q k^T / sqrt(head_dim)) v over N tokens, H heads (arXiv 1706.03762, Eq. 1).

    qk_norm: layer-normalise q and k per head, with weights, eps 1e-5 (arXiv 2302.05442).
    backend: flash-attn where it is installed, else SDPA, until `set_attention` or `TrainStep` says otherwise.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = hidden_size // num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.proj = Linear(hidden_size, hidden_size)
        self.backend = find("flash-attn") if backends.has_flash_attn() else SDPA

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D) -> (B, N, D)."""
        b, n, d = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.num_heads, d // self.num_heads)
        if isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
            out = attention(qkv, self.backend)
        else:
            q, k, v = qkv.unbind(2)  # each (B, N, H, head_dim)
            # The norms leave q and k in float32 under autocast; v has the type the product should run in.
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
            out = attention_unpacked(q, k, v, self.backend)
        return self.proj(out.reshape(b, n, d))
