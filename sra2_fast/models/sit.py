"""SiT (arXiv 2401.08740) as the public repositories have it, with an optional SRA 2 projector and our layers.

Same constructor, keys, initialisation and outputs as the reference class; `align_depth=None` is exactly it. The whole
objective can be computed inside `forward` (`loss_inputs`), because DDP and FSDP2 only see weights used there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import InputError, must_be
from ..layers import checks
from ..layers.block import FinalLayer, PendingResidual, SiTBlock, closed, normed_ahead
from ..layers.conditioning import Conditioning, LabelEmbedder, TimestepEmbedder
from ..layers.modulation import adaln_biases, modulate_all
from ..layers.patch_embedding import PatchEmbed, sincos_positions
from ..layers.plain import is_plain, watched
from ..layers.projector import build_projector, readable_last
from ..ops.patchify import unpatchify
from .hub import HubModel
from .loss_inputs import LossInputs, SiTOutput


class Config(dict[str, Any]):
    """Constructor arguments: a mapping, as peft asks for, and what a call returns, as code before it did."""

    def __call__(self) -> dict[str, Any]:
        return dict(self)


class SiT(HubModel, nn.Module):
    """Velocity field of a latent: (x (B, C, H, W), t (B,), y (B,)) -> (B, C, H, W).

    Here t = 0 is data, as in REPA and SRA. A checkpoint of the SiT repository loads (strict=True, align_depth=None),
    but its t = 0 is noise: `-model(x, 1 - t, y)` is then the velocity that samplers of this package want. Samplers
    that write `model(...)[0]` want a model of `sra2_fast.compat`.

    input_size: side of the latent, or (height, width); patch_size must divide both.
    hidden_size, depth, num_heads, mlp_ratio: D, number of blocks, H, MLP width over D.
    class_dropout_prob: chance of a label being replaced by the null label (row num_classes) while training.
    learn_sigma: the output layer has 2C channels and the second half is ignored, as in the SiT repository.
    qk_norm: LayerNorm on queries and keys.
    align_depth: the projector reads the tokens after this many blocks; None means no projector.
    projector_layers, projector_dim: its Linears and their width (default 2D).
    projection_dim: what it projects to (default P = patch_size^2 C, the VAE latent; F or D for other targets).
    implementation: "fused" (our kernels where they exist, the default) or "eager" (PyTorch's own ops).
    checkpoint_blocks: recompute each block in the backward instead of keeping its activations.
    compat_kwargs: REPA's and SRA's `use_cfg`, `fused_attn`, `path_type`, `decoder_hidden_size`, `encoder_depth`.
    Raises InputError for sizes that do not fit and keywords that have no meaning here.
    """

    def __init__(
        self,
        input_size: int | Sequence[int] = 32,
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
        **compat_kwargs: Any,
    ) -> None:
        config = checks.constructor_arguments(locals())
        super().__init__()
        config["align_depth"] = align_depth = checks.check_compat_kwargs(compat_kwargs, hidden_size, align_depth)
        config["implementation"] = implementation = implementation or "fused"
        checks.check_arguments(**config)
        self.latent_size = height, width = checks.latent_size(input_size)
        config["input_size"] = self.input_size = height if height == width else (height, width)
        self._config = config
        self.grid = (height // patch_size, width // patch_size)  # rows, columns of tokens
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

        self.x_embedder = PatchEmbed(self.grid, patch_size, in_channels, hidden_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.x_embedder.num_patches, hidden_size), requires_grad=False)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.blocks = nn.ModuleList(
            watched(SiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm=qk_norm, implementation=implementation))
            for _ in range(depth)
        )
        self.projector: nn.Sequential | None = None
        if align_depth is not None:
            target_dim = projection_dim or patch_size**2 * in_channels
            self.projector = build_projector(
                hidden_size, projector_dim or 2 * hidden_size, target_dim, projector_layers
            )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels, implementation=implementation)
        watched(self.final_layer)
        watched(self)
        self.initialize_weights()

    @property
    def config(self) -> Config:
        """The constructor's arguments; `type(model)(**model.config())` has the same shape."""
        return Config(self._config)

    def initialize_weights(self) -> None:
        """Reference initialisation: xavier-uniform Linears, N(0, 0.02) embeddings, zero adaLN and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _init_linear(module, nn.init.xavier_uniform_)
        with torch.no_grad():
            self.pos_embed.copy_(sincos_positions(self.hidden_size, self.grid))
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

    @property
    def alignment_head(self) -> nn.Module | None:
        """What the tokens of block `align_depth` go through before they are compared; None in a plain SiT."""
        return self.projector

    def float32_gradients(self) -> Iterator[Tensor]:
        """Parameters whose gradient is a float32 sum also under autocast, where others' is a bf16 product or sum.

        Found while they are read: every step offers them to the optimizer, and only the first one looks.
        """
        last = self.readable_last_projection()
        layers: list[Any] = [*self.blocks, self.final_layer]
        heads = [layer.adaLN_modulation for layer in layers if hasattr(layer, "adaLN_modulation")]
        yield from (*adaln_biases(heads), *(last.parameters() if last is not None else ()))

    def readable_last_projection(self) -> nn.Linear | None:
        """The head's last Linear where its weights may be read instead of calling the head, None where not."""
        return readable_last(self.alignment_head)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        force_drop_ids: Tensor | None = None,
        return_projection: bool = False,
        return_hidden: int | None = None,
        loss_inputs: LossInputs | None = None,
    ) -> SiTOutput:
        """The velocity at (x, t, y).

        x: (B, C, H, W) float32 or bf16 - the noisy latent. t: (B,) float - time. y: (B,) int - labels in
        [0, num_classes], num_classes being "no label".
        force_drop_ids: (B,) bool or int - which labels to drop; None drops by chance while training.
        return_projection: also return the projector's output, (B, N, projection_dim).
        return_hidden: stop after this block and return its tokens, (B, N, D).
        loss_inputs: what `SRA2Loss` passes; then its LossOutput is returned instead.
        Raises InputError (TypeError for a dtype) naming the argument.
        """
        t = t if loss_inputs is None else loss_inputs.t
        tap, head = 0, self.alignment_head
        if return_projection or (loss_inputs is not None and loss_inputs.needs_hidden):
            if self.align_depth is None or head is None:
                raise InputError("SiT: there is no projector; build the model with align_depth=")
            tap = self.align_depth
        if return_hidden is not None:
            if not 1 <= return_hidden <= self.depth:
                raise must_be("SiT", "return_hidden", f"a block from 1 to {self.depth}", return_hidden)
            tokens, c = self._embed(x, t, y, force_drop_ids)
            return closed(self._run_blocks(tokens, c, self._modulations(c, return_hidden), 0, return_hidden))
        velocity_tokens, hidden = self.velocity_and_hidden(x, t, y, force_drop_ids, tap)
        if loss_inputs is not None:
            return loss_inputs.evaluate(self, velocity_tokens, hidden)
        velocity = self.unpatchify(velocity_tokens)
        if return_projection:
            assert head is not None
            return velocity, head(hidden)
        return velocity

    def velocity_and_hidden(
        self, x: Tensor, t: Tensor, y: Tensor, force_drop_ids: Tensor | None = None, tap: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Velocity tokens (B, N, P), and the tokens (B, N, D) after block `tap` (0: what enters the first block)."""
        tokens, c = self._embed(x, t, y, force_drop_ids)
        return self._velocity_and_hidden(tokens, Conditioning(c, self._modulations(c, self.depth + 1)), tap)

    def condition(self, t: Tensor, y: Tensor) -> Conditioning:
        """What the layers are told of every (t, y), for `velocity`: a sampler's images share few of them.

        t: (U,) float. y: (U,) int. In eval mode: labels are dropped by chance while training.
        """
        checks.check_labels(self, y)
        c = self.t_embedder(t) + self.y_embedder(y)
        return Conditioning(c, self._modulations(c, self.depth + 1))

    def velocity(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        """`forward(x, t, y)` with what `condition(t, y)` made of them, one row an image (`Conditioning.of`)."""
        checks.check_latents(self, x)
        tokens = self.x_embedder(x) + self.pos_embed
        return self.unpatchify(self._velocity_and_hidden(tokens, conditioning, 0)[0])

    def _velocity_and_hidden(self, tokens: Tensor, conditioning: Conditioning, tap: int) -> tuple[Tensor, Tensor]:
        c, modulations = conditioning
        stream = self._run_blocks(tokens, c, modulations, 0, tap)
        after: Any = self.blocks[tap] if tap < self.depth else self.final_layer
        modulation = modulations[tap]
        if tap and modulation is not None and not self.checkpoint_blocks:
            stream = normed_ahead(stream, after, modulation)
            hidden = stream.x
        else:
            hidden = stream = closed(stream)
        stream = self._run_blocks(stream, c, modulations, tap, self.depth)
        if not is_plain(self.final_layer, FinalLayer):
            return self._velocity_half(self.final_layer(closed(stream), c)), hidden
        return self._velocity_half(self.final_layer(stream, c, modulations[-1])), hidden

    def _modulations(self, c: Tensor, count: int) -> list[Tensor | None]:
        """What the adaLN heads of the first `count` of the blocks and the final layer make of c, all at once.

        None where a block or a head has to compute its own: `block(x, c)` is all that hooks and wrappers know.
        """
        if self.implementation != "fused":
            return [None] * count
        layers: list[tuple[Any, type[nn.Module]]] = [(block, SiTBlock) for block in self.blocks]
        layers.append((self.final_layer, FinalLayer))
        heads = [layer.adaLN_modulation if is_plain(layer, kind) else None for layer, kind in layers[:count]]
        return modulate_all(heads, c)

    def _embed(self, x: Tensor, t: Tensor, y: Tensor, force_drop_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, D) and conditioning (B, D)."""
        checks.check_inputs(self, x, t, y, force_drop_ids)
        c = self.t_embedder(t) + self.y_embedder(y, force_drop_ids=force_drop_ids)
        return self.x_embedder(x) + self.pos_embed, c

    def _run_blocks(
        self, stream: Tensor | PendingResidual, c: Tensor, modulations: list[Tensor | None], start: int, stop: int
    ) -> Tensor | PendingResidual:
        """The stream after block `stop`, given the one after block `start`.

        A block that is not plain gets and gives closed tokens. So does every block where blocks are checkpointed: a
        checkpoint keeps its block's inputs, and an open residual would be two of (B, N, D), not one.
        """
        for block, modulation in zip(islice(self.blocks, start, stop), modulations[start:stop], strict=True):
            if self.checkpoint_blocks or not is_plain(block, SiTBlock):
                stream = closed(stream)
            elif isinstance(stream, Tensor):
                stream = PendingResidual(stream)
            given = (stream, c) if modulation is None else (stream, c, modulation)
            if self.checkpoint_blocks and self.training:
                stream = checkpoint(block, *given, use_reentrant=False)
            else:
                stream = block(*given)
        return stream

    def _velocity_half(self, tokens: Tensor) -> Tensor:
        """(B, N, p p 2C) -> (B, N, p p C): leave out the sigma channels of a learn_sigma model."""
        if not self.learn_sigma:
            return tokens
        b, n, _ = tokens.shape
        pixels = tokens.view(b, n, self.patch_size**2, self.out_channels)
        return pixels[..., : self.in_channels].flatten(2)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Tokens (B, N, p p C) -> (B, C, H, W), for any C."""
        return unpatchify(x, self.patch_size, *self.latent_size)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, channels: int | None = 3) -> Tensor:
        """Classifier-free guidance: v = v_null + cfg_scale (v_label - v_null) (arXiv 2207.12598, Eq. 6).

        x, t, y: batches of 2B - y holds the labels, then the null labels; x's second half is ignored.
        channels: guide the first so many only (3: the SiT repository, fewer where the latent has fewer), or all with
            None (REPA and SRA).
        Returns (2B, C, H, W), the guided channels equal in both halves.
        """
        checks.check_guidance(self, x, channels)
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        out = out[0] if isinstance(out, tuple) else out  # the models of compat return more
        channels = out.shape[1] if channels is None else channels
        guided, rest = out[:, :channels], out[:, channels:]
        with_label, without = guided.chunk(2)
        guided = without + cfg_scale * (with_label - without)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


def _init_linear(linear: nn.Module, init_weight: Callable[[Tensor], Any]) -> None:
    assert isinstance(linear, nn.Linear)
    init_weight(linear.weight)
    nn.init.zeros_(linear.bias)
