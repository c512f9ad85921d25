"""The adaLN-Zero block of SiT and its output layer, shaped so that normalisation never costs a pass of its own.

Between two branches the residual stream is in one of two forms. Closed, it is the tensor x. Open, it is a
`PendingResidual`: x with the last branch and its gate still to be added, so that the next normalisation can add,
normalise and modulate in one pass (`gated_residual_layer_norm_modulate`), across block edges too. A block returns the
form it was given: `block(x, c)` is the plain public contract, for hooks, checkpointing and wrapping.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ..ops import gated_residual_layer_norm_modulate as _gated_op
from ..ops import layer_norm_modulate as _norm_op
from ..ops.gated_residual_layer_norm_modulate import eager as _gated_eager
from ..ops.layer_norm_modulate import eager as _norm_eager
from .attention import Attention
from .linear import Mlp
from .modulation import adaln_head

EPS = 1e-6


class PendingResidual(NamedTuple):
    """An open residual stream: x + gate * branch, not yet added. branch and gate None: nothing pending.

    It spans from a branch's last product to the next norm: inside a block from attention to the norm before the MLP,
    and between blocks from the MLP to the next block's first norm, or the final layer's. Where somebody wants the
    closed tokens in between, that norm is taken ahead (`normed_ahead`), which gives them for nothing.
    """

    x: Tensor  # (B, N, D)
    branch: Tensor | None = None  # (B, N, D)
    gate: Tensor | None = None  # (B, D)
    normed: Tensor | None = None  # (B, N, D) - of x, as the next layer's first norm makes it


def closed(stream: Tensor | PendingResidual) -> Tensor:
    """The residual stream with the pending branch added."""
    if isinstance(stream, Tensor):
        return stream
    if stream.branch is None or stream.gate is None:
        return stream.x
    return stream.x + stream.gate.unsqueeze(1) * stream.branch


class AdaLayerNorm(nn.Module):
    """LN(x)(1 + scale) + shift on a stream of either form. No parameters; it only picks the implementation."""

    def __init__(self, implementation: str) -> None:
        super().__init__()
        fused = implementation == "fused"
        self._norm = _norm_op if fused else _norm_eager
        self._gated = _gated_op if fused else _gated_eager

    def forward(self, stream: Tensor | PendingResidual, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (x, y): the closed stream and its modulated norm. shift, scale: (B, D)."""
        if isinstance(stream, PendingResidual) and stream.normed is not None:
            return stream.x, stream.normed
        if isinstance(stream, PendingResidual) and stream.branch is not None and stream.gate is not None:
            return self._gated(stream.x, stream.branch, stream.gate, shift, scale, EPS)
        x = closed(stream)
        return x, self._norm(x, shift, scale, EPS)


class SiTBlock(nn.Module):
    """x + gate_msa Attention(adaLN(x)), then x + gate_mlp Mlp(adaLN(x)) (arXiv 2212.09748, Sec. 3.2, adaLN-Zero)."""

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float, *, qk_norm: bool, implementation: str
    ) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, num_heads, qk_norm=qk_norm)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = adaln_head(hidden_size, 6)
        self.norm = AdaLayerNorm(implementation)

    def forward(
        self, stream: Tensor | PendingResidual, c: Tensor | None, modulation: Tensor | None = None
    ) -> Tensor | PendingResidual:
        """One block on a stream of either form.

        stream: (B, N, D), or a PendingResidual of such tensors.
        c: (B, D) - conditioning; may be None when modulation is given.
        modulation: (B, 6D) - shift, scale, gate of the attention, then of the MLP: this block's slice of a product
            that was computed for all blocks at once. None computes it from c.
        Returns the stream in the form it came.
        """
        if modulation is None:
            modulation = self.adaLN_modulation(c)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        x, y = self.norm(stream, shift_msa, scale_msa)
        x, y = self.norm(PendingResidual(x, self.attn(y), gate_msa), shift_mlp, scale_mlp)
        out = PendingResidual(x, self.mlp(y), gate_mlp)
        return out if isinstance(stream, PendingResidual) else closed(out)


class FinalLayer(nn.Module):
    """adaLN and one linear map to the P elements of each token's patch."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, *, implementation: str) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = adaln_head(hidden_size, 2)
        self.norm = AdaLayerNorm(implementation)

    def forward(self, stream: Tensor | PendingResidual, c: Tensor | None, modulation: Tensor | None = None) -> Tensor:
        """stream, c as in `SiTBlock`; modulation: (B, 2D) - shift, scale. Returns (B, N, P)."""
        if modulation is None:
            modulation = self.adaLN_modulation(c)
        shift, scale = modulation.chunk(2, dim=-1)
        _, y = self.norm(stream, shift, scale)
        return self.linear(y)


def normed_ahead(stream: Tensor | PendingResidual, layer: SiTBlock | FinalLayer, modulation: Tensor) -> PendingResidual:
    """The stream closed and normalised as `layer` will begin with. modulation: (B, 6D) or (B, 2D), the layer's own."""
    shift, scale = modulation.split(modulation.shape[-1] // (6 if isinstance(layer, SiTBlock) else 2), dim=-1)[:2]
    x, normed = layer.norm(stream, shift, scale)
    return PendingResidual(x, normed=normed)
