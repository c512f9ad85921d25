"""REPA's model (arXiv 2410.06940, `models/sit.py` of its repository) on our layers: same constructor, same keys
(`projectors.K.{0,2,4}`), same `(velocity, [projection, ...])`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..layers.checks import constructor_arguments
from ..layers.projector import build_projector
from ..models.loss_inputs import SiTOutput
from ..models.registry import registry
from .family import PATCH_SIZES, FamilySiT, check_head_sizes

PROJECTOR_LAYERS = 3


class SiT(FamilySiT):
    """A SiT whose tokens after block `encoder_depth` go through one projector for each frozen encoder.

    path_type, use_cfg: kept as attributes, without effect on the model, as in REPA.
    decoder_hidden_size: hidden_size, or the default, which stands for it.
    encoder_depth: 1 to depth. z_dims: width of each encoder's features. projector_dim: width of the projectors.
    block_kwargs and the rest: see `FamilySiT`.
    """

    projectors: nn.ModuleList

    def __init__(
        self,
        path_type: str = "edm",
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        decoder_hidden_size: int = 768,
        encoder_depth: int = 8,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        use_cfg: bool = False,
        z_dims: Sequence[int] = (768,),
        projector_dim: int = 2048,
        **block_kwargs: Any,
    ) -> None:
        arguments = constructor_arguments(locals()) | {"z_dims": list(z_dims)}
        super().__init__("repa", arguments, block_kwargs)
        self._check_block("encoder_depth", encoder_depth)
        check_head_sizes(self._op, projector_dim=projector_dim, **{f"z_dims[{k}]": d for k, d in enumerate(z_dims)})
        self.z_dims = arguments["z_dims"]
        self.encoder_depth = encoder_depth
        self.align_depth = encoder_depth if z_dims else None
        self._add_head(
            "projectors",
            nn.ModuleList(build_projector(hidden_size, projector_dim, z_dim, PROJECTOR_LAYERS) for z_dim in z_dims),
        )

    @property
    def alignment_head(self) -> nn.Module | None:
        """The projector of the first encoder: of its features, or, where z_dims[0] is P, of the VAE latent."""
        return self.projectors[0] if len(self.projectors) else None

    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, y: Tensor, return_logvar: bool = False, **for_loss: Any
    ) -> tuple[Tensor, list[Tensor]] | SiTOutput:
        """x (B, C, H, W), t (B,), y (B,) -> velocity (B, C, H, W) and one (B, N, z_dim) for each of z_dims.

        return_logvar has no effect, as in REPA. Labels are dropped by chance while training.
        for_loss: see `FamilySiT`.
        """
        if for_loss:
            return super().forward(x, t, y, **for_loss)
        velocity, hidden = self._velocity_and_tokens(x, t, y, "encoder_depth", self.encoder_depth)
        return velocity, [projector(hidden) for projector in self.projectors]


SiT_models = registry(SiT, PATCH_SIZES)
