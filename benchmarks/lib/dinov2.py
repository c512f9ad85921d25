"""REPA's external encoder at the size it has there: DINOv2-B/14 from its configuration, random weights, run online.

REPA (arXiv 2410.06940) runs the frozen encoder on the raw images in every training step. What it costs does not depend
on its weights, so nothing is downloaded. Left out: other encoders, and anything that would make the features useful.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sra2_fast.errors import InputError

from .counting import vit_forward_flops

HIDDEN_SIZE, DEPTH, HEADS, MLP_RATIO, PATCH_SIZE = 768, 12, 12, 4, 14
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DINOv2Encoder(nn.Module):
    """uint8 images (B, 3, H, W) -> normalised patch tokens (B, grid * grid, 768), without gradients.

    grid: tokens a side; images are resized to 14 grid pixels a side, as REPA does (224 for 256-pixel images).
    Raises InputError where transformers is not installed.
    """

    def __init__(self, grid: int) -> None:
        super().__init__()
        try:
            from transformers import Dinov2Config, Dinov2Model
        except ImportError as error:
            raise InputError(
                "step_time: the repa row needs transformers (pip install transformers), or leave it out of --rows"
            ) from error
        self.grid = grid
        config = Dinov2Config(
            hidden_size=HIDDEN_SIZE,
            num_hidden_layers=DEPTH,
            num_attention_heads=HEADS,
            mlp_ratio=MLP_RATIO,
            patch_size=PATCH_SIZE,
            image_size=PATCH_SIZE * grid,
        )
        config._attn_implementation = "sdpa"
        self.encoder = Dinov2Model(config)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        side = PATCH_SIZE * self.grid
        pixels = (images.float() / 255 - self.mean) / self.std
        pixels = F.interpolate(pixels, (side, side), mode="bicubic", align_corners=False)
        return self.encoder(pixels).last_hidden_state[:, 1:]

    def forward_flops(self) -> int:
        """FLOPs for one image."""
        patch_elements = 3 * PATCH_SIZE * PATCH_SIZE
        return vit_forward_flops(DEPTH, HIDDEN_SIZE, self.grid**2, patch_elements, MLP_RATIO * HIDDEN_SIZE)
