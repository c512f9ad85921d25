"""Frozen vision transformers whose patch tokens `prepare --features` writes: DINOv2 by transformers, others by timm.

Images become tokens as in REPA (arXiv 2410.06940): normalised as the encoder wants it, resized (bicubic) so that its
patches form the wanted grid, position embeddings resampled (bicubic, with antialiasing) to that grid once; then the
patch tokens after the last norm, without class and register tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2_SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}
DINOV2_KINDS = ("dinov2", "dinov2_with_registers")
KNOWN = "dinov2-vits14, -vitb14, -vitl14, -vitg14 (each also with -reg), timm:NAME, or a folder"


class FeatureEncoder:
    """uint8 images (n, 3, H, W) -> patch tokens (n, grid * grid, width) float16, on the CPU.

    name: as the user wrote it. fingerprint: SHA-256 of the weights as they were loaded, and of the preprocessing.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        tokens: Callable[[torch.Tensor], torch.Tensor],
        *,
        side: int,
        grid: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        """tokens: normalised pixels (n, 3, side, side) -> (n, grid * grid, width). side: what the encoder sees."""
        self.name, self.side, self.grid = name, side, grid
        self._network, self._tokens = network, tokens
        device = next(network.parameters()).device
        self._mean = torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(std, device=device).view(1, 3, 1, 1)
        self.fingerprint = self._fingerprint()
        self.width = self(torch.zeros(1, 3, side, side, dtype=torch.uint8)).shape[-1]

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Raises InputError where the encoder has other tokens than one a patch."""
        pixels = (images.to(self._mean.device).float() / 255 - self._mean) / self._std
        pixels = F.interpolate(pixels, (self.side, self.side), mode="bicubic", align_corners=False)
        tokens = self._tokens(pixels)
        if tokens.dim() != 3 or tokens.shape[1] != self.grid**2:
            raise InputError(
                f"prepare: --features {self.name} gives {tuple(tokens.shape[1:])} instead of {self.grid**2} tokens; "
                "choose a vision transformer"
            )
        return tokens.to(torch.float16).cpu()

    def _fingerprint(self) -> str:
        total = hashlib.sha256(f"{self.side} {self.grid} {self._mean.tolist()} {self._std.tolist()}".encode())
        for name, tensor in sorted(self._network.state_dict().items()):
            total.update(f"{name} {tuple(tensor.shape)} ".encode())
            total.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return total.hexdigest()


def load_encoder(spec: str, grid: int, device: str = "cpu") -> FeatureEncoder:
    """The frozen encoder that `spec` names, for grid x grid tokens an image.

    spec: dinov2-vitb14 and its like (from the hub), timm:NAME (with timm's weights), or the folder of a DINOv2 saved by
        transformers or of a model saved by timm.
    Raises InputError: nothing of that name, the library missing, the hub out of reach.
    """
    found = re.fullmatch(r"dinov2-vit([sblg])14(-reg)?", spec)
    if found:
        middle = "dinov2-with-registers" if found[2] else "dinov2"
        return _dinov2(spec, f"facebook/{middle}-{DINOV2_SIZES[found[1]]}", grid, device)
    if spec.startswith("timm:"):
        return _timm(spec, spec.removeprefix("timm:"), grid, device)
    path = Path(spec)
    if not path.is_dir():
        raise InputError(f"prepare: --features {spec} is no encoder that is known; give {KNOWN}")
    try:
        config = dict(json.loads((path / "config.json").read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"prepare: --features {spec} has no config.json of an encoder; give {KNOWN}") from error
    if "architecture" in config:
        return _timm(spec, f"local-dir:{path}", grid, device)
    if config.get("model_type") not in DINOV2_KINDS:
        kind = config.get("model_type")
        raise InputError(f"prepare: --features {spec} holds {kind}, neither DINOv2 nor a model of timm; give {KNOWN}")
    return _dinov2(spec, str(path), grid, device)


def _dinov2(spec: str, name_or_path: str, grid: int, device: str) -> FeatureEncoder:
    try:
        from transformers import Dinov2Model, Dinov2WithRegistersModel
    except ImportError as error:
        raise InputError(f"prepare: --features {spec} needs transformers; pip install transformers") from error
    has_registers = spec.endswith("-reg") or _has_registers(Path(name_or_path))
    kind: Any = Dinov2WithRegistersModel if has_registers else Dinov2Model
    try:
        network, loading = kind.from_pretrained(name_or_path, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(
            f"prepare: --features {spec} cannot be loaded ({_first_line(error)}); {_remedy(spec)}"
        ) from error
    if loading["missing_keys"]:  # transformers would go on with random ones
        missing = sorted(loading["missing_keys"])
        raise InputError(
            f"prepare: --features {spec} lacks {len(missing)} of its weights, such as {missing[0]}; copy it"
        )
    network = network.to(device).eval().requires_grad_(False)
    config = network.config
    _resample_positions(network.embeddings, grid)
    config.image_size = grid * config.patch_size
    prefix = 1 + (config.num_register_tokens if has_registers else 0)
    return FeatureEncoder(
        spec,
        network,
        lambda pixels: network(pixels).last_hidden_state[:, prefix:],
        side=grid * config.patch_size,
        grid=grid,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def _resample_positions(embeddings: Any, grid: int) -> None:
    """Position embeddings of DINOv2 (1, 1 + M M, D) for another grid, in place, as REPA resamples them."""
    positions = embeddings.position_embeddings.data
    first, rest = positions[:, :1], positions[:, 1:]
    side = round(rest.shape[1] ** 0.5)
    if side == grid:
        return
    image = rest.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    image = F.interpolate(image, (grid, grid), mode="bicubic", antialias=True)
    rest = image.permute(0, 2, 3, 1).reshape(1, grid * grid, -1).to(positions.dtype)
    embeddings.position_embeddings = nn.Parameter(torch.cat([first, rest], dim=1), requires_grad=False)


def _has_registers(path: Path) -> bool:
    config = path / "config.json"
    return config.is_file() and json.loads(config.read_bytes()).get("model_type") == DINOV2_KINDS[1]


def _timm(spec: str, name: str, grid: int, device: str) -> FeatureEncoder:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision that was built for another torch
        raise InputError(
            f"prepare: --features {spec} needs timm ({_first_line(error)}); pip install timm, with the torchvision of "
            "this torch"
        ) from error
    try:
        network: Any = timm.create_model(name, pretrained=True, num_classes=0, dynamic_img_size=True)
    except (RuntimeError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"prepare: --features {spec} cannot be loaded ({_first_line(error)}); {_remedy(spec)}"
        ) from error
    network = network.to(device).eval().requires_grad_(False)
    patch = network.patch_embed.patch_size[0]
    return FeatureEncoder(
        spec,
        network,
        lambda pixels: network.forward_features(pixels)[:, network.num_prefix_tokens :],
        side=grid * patch,
        grid=grid,
        mean=tuple(network.pretrained_cfg["mean"]),
        std=tuple(network.pretrained_cfg["std"]),
    )


def _remedy(spec: str) -> str:
    if Path(spec).exists():
        return "save the model there again"
    return "check the name and the network, or give the folder of a downloaded copy"


def _first_line(error: Exception, longest: int = 160) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= longest else line[: longest - 3] + "..."
