"""SiT (arXiv 2401.08740) as the public repositories have it, with an optional SRA 2 projector and our layers.

Same constructor, keys, initialisation and outputs as the reference class; `align_depth=None` is exactly it. The whole
objective can be computed inside `forward` (`loss_inputs`), because DDP and FSDP2 only see weights used there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import InputError, must_be
from ..layers.block import Edge, FinalLayer, SiTBlock
from ..layers.checks import check_arguments, check_guidance, check_inputs, check_spellings
from ..layers.conditioning import LabelEmbedder, TimestepEmbedder
from ..layers.patch_embedding import PatchEmbed, sincos_positions
from ..layers.projector import build_projector
from ..ops.patchify import unpatchify


class LossInputs(Protocol):
    """What `SRA2Loss` hands to `SiT.forward` so that the loss is computed there."""

    @property
    def needs_hidden(self) -> bool: ...

    def evaluate(
        self,
        velocity_tokens: torch.Tensor,
        hidden: torch.Tensor | None,
        projector: nn.Sequential | None,
        patch_size: int,
        implementation: str,
    ) -> Any: ...


class SiT(nn.Module):
    """Velocity field of a latent: (x (B, C, H, W), t (B,), y (B,)) -> (B, C, H, W).

    input_size: height and width of the latent; patch_size must divide it.
    hidden_size, depth, num_heads, mlp_ratio: D, number of blocks, H, MLP width over D.
    class_dropout_prob: chance of a label being replaced by the null label (row num_classes) while training.
    learn_sigma: the output layer has 2C channels and the second half is ignored, as in the SiT repository.
    qk_norm: LayerNorm on queries and keys.
    align_depth: the projector reads the tokens after this many blocks; None means no projector.
    projector_layers, projector_dim: its Linears and their width (default 2D).
    projection_dim: what it projects to (default P = patch_size^2 C, the VAE latent; F or D for other targets).
    implementation: "fused" (our kernels where they exist, the default) or "eager" (PyTorch's own ops).
    checkpoint_blocks: recompute each block in the backward instead of keeping its activations.
    spellings: `use_cfg`, `fused_attn`, `path_type`, `decoder_hidden_size`, `encoder_depth` as REPA and SRA write them.
    Raises InputError for sizes that do not fit and spellings that have no meaning here.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        *,
        qk_norm: bool = False,
        align_depth: int | None = None,
        projector_layers: int = 5,
        projector_dim: int | None = None,
        projection_dim: int | None = None,
        implementation: str | None = None,
        checkpoint_blocks: bool = False,
        **spellings: Any,
    ) -> None:
        super().__init__()
        align_depth = check_spellings(spellings, hidden_size, align_depth)
        implementation = implementation or "fused"
        self._config = {
            "input_size": input_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "class_dropout_prob": class_dropout_prob,
            "num_classes": num_classes,
            "learn_sigma": learn_sigma,
            "qk_norm": qk_norm,
            "align_depth": align_depth,
            "projector_layers": projector_layers,
            "projector_dim": projector_dim,
            "projection_dim": projection_dim,
            "implementation": implementation,
            "checkpoint_blocks": checkpoint_blocks,
        }
        check_arguments(**self._config)
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.hidden_size = hidden_size
        self.depth = depth
        self.num_heads = num_heads
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob
        self.learn_sigma = learn_sigma
        self.qk_norm = qk_norm
        self.align_depth = align_depth
        self.implementation = implementation
        self.checkpoint_blocks = checkpoint_blocks

        num_tokens = (input_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, hidden_size), requires_grad=False)
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.blocks = nn.ModuleList(
            SiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm=qk_norm, implementation=implementation)
            for _ in range(depth)
        )
        self.projector: nn.Sequential | None = None
        if align_depth is not None:
            target_dim = projection_dim or patch_size**2 * in_channels
            self.projector = build_projector(
                hidden_size, projector_dim or 2 * hidden_size, target_dim, projector_layers
            )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels, implementation=implementation)
        self.initialize_weights()

    def config(self) -> dict[str, Any]:
        """The constructor's arguments; `SiT(**model.config())` has the same shape."""
        return dict(self._config)

    def initialize_weights(self) -> None:
        """Reference initialisation: xavier-uniform Linears, N(0, 0.02) embeddings, zero adaLN and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _init_linear(module, nn.init.xavier_uniform_)
        with torch.no_grad():
            self.pos_embed.copy_(sincos_positions(self.hidden_size, self.input_size // self.patch_size))
        patches = self.x_embedder.proj
        nn.init.xavier_uniform_(patches.weight.view(self.hidden_size, -1))
        assert patches.bias is not None
        nn.init.zeros_(patches.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for name, module in self.named_modules():
            if name in ("t_embedder.mlp.0", "t_embedder.mlp.2"):
                _init_linear(module, partial(nn.init.normal_, std=0.02))
            elif name.endswith("adaLN_modulation.1") or name == "final_layer.linear":
                _init_linear(module, nn.init.zeros_)

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
        *,
        force_drop_ids: torch.Tensor | None = None,
        return_projection: bool = False,
        return_hidden: int | None = None,
        loss_inputs: LossInputs | None = None,
    ) -> Any:
        """The velocity at (x, t, y).

        x: (B, C, H, W) float32 or bf16 - the noisy latent. t: (B,) float - time. y: (B,) int - labels in
        [0, num_classes], num_classes being "no label".
        force_drop_ids: (B,) bool or int - which labels to drop; None drops by chance while training.
        return_projection: also return the projector's output, (B, N, projection_dim).
        return_hidden: stop after this block and return its tokens, (B, N, D).
        loss_inputs: what `SRA2Loss` passes; then its LossOutput is returned instead.
        Raises InputError (TypeError for a dtype) naming the argument.
        """
        wants_hidden = return_projection or (loss_inputs is not None and loss_inputs.needs_hidden)
        if wants_hidden and self.projector is None:
            raise InputError("SiT: there is no projector; build the model with align_depth=")
        if return_hidden is not None and not 1 <= return_hidden <= self.depth:
            raise must_be("SiT", "return_hidden", f"a block from 1 to {self.depth}", return_hidden)

        tap = return_hidden or (self.align_depth if wants_hidden else None)
        velocity_tokens, hidden = self.run_blocks(x, t, y, force_drop_ids, tap, stop=return_hidden is not None)
        if velocity_tokens is None:
            return hidden
        if loss_inputs is not None:
            return loss_inputs.evaluate(velocity_tokens, hidden, self.projector, self.patch_size, self.implementation)
        velocity = unpatchify(velocity_tokens, self.patch_size, *x.shape[2:])
        if return_projection:
            assert self.projector is not None and hidden is not None
            return velocity, self.projector(hidden)
        return velocity

    def run_blocks(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
        force_drop_ids: torch.Tensor | None = None,
        tap: int | None = None,
        *,
        stop: bool = False,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Everything `forward` and the models of `compat` have in common.

        tap: also return the tokens after this block; stop: run nothing after it.
        Returns (velocity tokens (B, N, P) or None after a stop, tapped tokens (B, N, D) or None).
        """
        check_inputs(self, x, t, y, force_drop_ids)
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, force_drop_ids)
        hidden = None
        stream: torch.Tensor | Edge = tokens if self.checkpoint_blocks else Edge(tokens)
        for number, block in enumerate(self.blocks, start=1):
            if self.checkpoint_blocks and self.training:
                stream = checkpoint(block, stream, c, use_reentrant=False)
            else:
                stream = block(stream, c)
            if number == tap:
                hidden = _closed(stream)
                if stop:
                    return None, hidden
                stream = hidden if self.checkpoint_blocks else Edge(hidden)
        return self._velocity_half(self.final_layer(stream, c)), hidden

    def _velocity_half(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, p p 2C) -> (B, N, p p C): leave out the sigma channels of a learn_sigma model."""
        if not self.learn_sigma:
            return tokens
        b, n, _ = tokens.shape
        pixels = tokens.view(b, n, self.patch_size**2, self.out_channels)
        return pixels[..., : self.in_channels].flatten(2)

    def forward_with_cfg(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, cfg_scale: float, channels: int | None = 3
    ) -> torch.Tensor:
        """Classifier-free guidance: v = v_null + cfg_scale (v_label - v_null) (arXiv 2207.12598, Eq. 6).

        x, t, y: batches of 2B - y holds the labels, then the null labels; x's second half is ignored.
        channels: guide the first so many only (3: the SiT repository, fewer where the latent has fewer), or all with
            None (REPA and SRA).
        Returns (2B, C, H, W), the guided channels equal in both halves.
        """
        check_guidance(self, x, channels)
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        out = out[0] if isinstance(out, tuple) else out  # the models of compat return more
        channels = out.shape[1] if channels is None else channels
        guided, rest = out[:, :channels], out[:, channels:]
        with_label, without = guided.chunk(2)
        guided = without + cfg_scale * (with_label - without)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


def _init_linear(linear: nn.Module, init_weight: Callable[[torch.Tensor], Any]) -> None:
    assert isinstance(linear, nn.Linear)
    init_weight(linear.weight)
    nn.init.zeros_(linear.bias)


def _closed(stream: torch.Tensor | Edge) -> torch.Tensor:
    return stream.close() if isinstance(stream, Edge) else stream


SIZES = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6)}  # depth, hidden, heads


def _registered(size: str, patch_size: int) -> Any:
    depth, hidden_size, num_heads = SIZES[size]

    def build(**kwargs: Any) -> SiT:
        return SiT(depth=depth, hidden_size=hidden_size, patch_size=patch_size, num_heads=num_heads, **kwargs)

    build.__name__ = f"SiT_{size}_{patch_size}"
    build.__doc__ = f"SiT-{size}/{patch_size}: {depth} blocks of width {hidden_size}, {num_heads} heads."
    return build


SiT_models = {f"SiT-{size}/{patch}": _registered(size, patch) for size in SIZES for patch in (1, 2, 4, 8)}
