"""The frozen autoencoder: loading one of diffusers', its normalisation, and encoding to [mean, std].

AutoencoderKL is that of Stable Diffusion, SDXL, SD3 and FLUX.1, and of EQ-VAE and E2E-VAE, which have the same form and
other weights. AutoencoderDC is DC-AE; it has no posterior, so its std is zero. diffusers is imported only here, and
only when an autoencoder is asked for.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import InputError

CLASSES = ("AutoencoderKL", "AutoencoderDC")  # of diffusers
LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, ArithmeticError, IndexError, AttributeError)
LOGVAR_RANGE = (-30.0, 20.0)  # as AutoencoderKL clamps it, so that std stays finite


@dataclass(frozen=True)
class VaeNormalisation:
    """What an autoencoder's configuration says about its latents; z = (value - shift) * scale per channel.

    Stable Diffusion has only a scaling factor (0.18215); SD3 and FLUX subtract a shift factor first; some record a mean
    and a standard deviation per channel instead.
    """

    scaling_factor: float
    shift_factor: float | None
    latents_mean: list[float] | None
    latents_std: list[float] | None
    channels: int

    @property
    def shift(self) -> np.ndarray:
        """(C,) float32."""
        if self.latents_mean is not None:
            return np.asarray(self.latents_mean, dtype=np.float32)
        return np.full(self.channels, self.shift_factor or 0.0, dtype=np.float32)

    @property
    def scale(self) -> np.ndarray:
        """(C,) float32."""
        scale = np.full(self.channels, self.scaling_factor, dtype=np.float32)
        return scale if self.latents_std is None else scale / np.asarray(self.latents_std, dtype=np.float32)


def load_vae(name_or_path: str, device: str | torch.device = "cpu", *, download: bool = True) -> nn.Module:
    """The autoencoder, one of CLASSES, of a local folder or a hub name: frozen, float32, in eval mode, on `device`.

    A whole pipeline (with its autoencoder in the subfolder `vae`) is accepted too.
    download: ask the hub for what is not on this machine (minutes, where there is no network).
    Raises InputError: diffusers missing, nothing there, or the hub out of reach.
    """
    try:
        with _quiet("diffusers"):
            import diffusers
    except ImportError as error:
        raise InputError(f"vae: {name_or_path} needs diffusers; pip install diffusers") from error
    path = Path(name_or_path)
    if not path.exists() and (path.is_absolute() or name_or_path.startswith(".")):
        raise InputError(f"vae: {name_or_path} does not exist; give a folder with an autoencoder, or a hub name")
    subfolders = [None, "vae"]
    if path.exists():
        subfolders = ["vae" if (path / "vae" / "config.json").is_file() else None]
    try:
        with _quiet("diffusers"), _quiet("huggingface_hub"):
            vae, loading = _from_pretrained(diffusers, name_or_path, subfolders, download)
    except InputError:
        raise
    except LOAD_ERRORS as error:
        raise InputError(_why_not(name_or_path, error, download)) from error
    if loading["missing_keys"]:  # diffusers would go on with random ones
        missing = loading["missing_keys"]
        raise InputError(
            f"vae: {name_or_path} is no whole {type(vae).__name__}: it lacks {len(missing)} of its weights, such as "
            f"{missing[0]}; give the folder or the hub name of one"
        )
    return vae.requires_grad_(False).eval().to(device)


def normalisation(vae: Any) -> VaeNormalisation:
    """Read from the autoencoder's configuration."""
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    return VaeNormalisation(
        scaling_factor=float(config["scaling_factor"]),
        shift_factor=None if config.get("shift_factor") is None else float(config["shift_factor"]),
        latents_mean=None if mean is None else [float(value) for value in np.ravel(mean)],
        latents_std=None if std is None else [float(value) for value in np.ravel(std)],
        channels=int(config["latent_channels"]),
    )


def fingerprint(vae: Any) -> str:
    """SHA-256, in hexadecimal, of the weights as they were loaded and of the normalisation; 1 s for a gigabyte."""
    total = hashlib.sha256(repr(normalisation(vae)).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        total.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def downsample_factor(vae: Any) -> int:
    """Image pixels along a side of one latent pixel: 2 for every level of the encoder but the last."""
    levels = vae.config.get("block_out_channels") or vae.config["encoder_block_out_channels"]
    return 2 ** (len(levels) - 1)


def encode(vae: Any, images: torch.Tensor, precision: str = "fp32") -> np.ndarray:
    """images: (n, 3, H, W) uint8 -> moments (n, 2C, h, w) float32 = [mean, std], not normalised.

    The std of an AutoencoderDC is 0.
    precision: "fp32", or "bf16": the convolutions in bf16 under autocast; the moments are always split in float32.
    """
    return start_encoding(vae, images, precision)()


@torch.no_grad()
def start_encoding(vae: Any, images: torch.Tensor, precision: str = "fp32") -> Callable[[], np.ndarray]:
    """The same in two steps: queued on a GPU now, what is returned waits for the moments. On a CPU they are there."""
    device = next(vae.parameters()).device
    is_cuda = device.type == "cuda"
    if is_cuda:  # from pageable memory the copy would wait for the batch before it
        images = images.pin_memory()
    pixels = images.to(device, non_blocking=is_cuda).contiguous().float() / 127.5 - 1
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        encoded = vae.encode(pixels)
    if hasattr(encoded, "latent"):
        mean = encoded.latent.float()
        std = torch.zeros_like(mean)
    else:
        mean, logvar = encoded.latent_dist.parameters.float().chunk(2, dim=1)
        std = torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE))
    moments = torch.cat([mean, std], dim=1)
    if not is_cuda:
        return moments.cpu().numpy
    fetched = torch.empty(moments.shape, dtype=moments.dtype, pin_memory=True)
    fetched.copy_(moments, non_blocking=True)  # queued before the next batch, so it does not wait for that one
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(device))

    def wait() -> np.ndarray:
        arrived.synchronize()
        return fetched.numpy().copy()  # pinned memory is scarce

    return wait


@torch.no_grad()
def decode(vae: Any, values: torch.Tensor) -> torch.Tensor:
    """values: (n, C, h, w) float32, not normalised -> images (n, 3, H, W) uint8, on the CPU."""
    device = next(vae.parameters()).device
    pixels = vae.decode(values.to(device)).sample
    return ((pixels.float() + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8).cpu()


def _from_pretrained(diffusers: Any, name_or_path: str, subfolders: list[str | None], download: bool) -> Any:
    """(autoencoder, loading report) from the first of `subfolders` that holds one; an unreachable hub is asked once."""
    config, subfolder = _configuration(diffusers, name_or_path, subfolders, download)
    kind = config.get("_class_name", CLASSES[0])  # early ones do not say
    if kind not in CLASSES:
        raise InputError(f"vae: {name_or_path} is an {kind}; give one of {', '.join(CLASSES)}")
    load = getattr(diffusers, kind).from_pretrained
    return load(name_or_path, subfolder=subfolder, output_loading_info=True, local_files_only=not download)


def _configuration(
    diffusers: Any, name_or_path: str, subfolders: list[str | None], download: bool
) -> tuple[dict[str, Any], str | None]:
    load = functools.partial(diffusers.AutoencoderKL.load_config, name_or_path, local_files_only=not download)
    for subfolder in subfolders[:-1]:
        try:
            return load(subfolder=subfolder), subfolder
        except LOAD_ERRORS as error:
            if "config.json" not in str(error) or (download and _is_out_of_reach(error)):
                raise
    return load(subfolder=subfolders[-1]), subfolders[-1]


def _is_out_of_reach(error: BaseException | None) -> bool:
    """huggingface_hub says "not in the cache either" (LocalEntryNotFoundError) for every failure of the network."""
    while error is not None:
        if type(error).__name__ == "LocalEntryNotFoundError":
            return True
        error = error.__cause__ or error.__context__
    return False


def _why_not(name_or_path: str, error: Exception, download: bool) -> str:
    if Path(name_or_path).exists():
        return f"vae: {name_or_path} holds no autoencoder that can be loaded ({_first_line(error)})"
    if _is_out_of_reach(error) and not download:
        return f"vae: {name_or_path} is not on this machine; --vae {name_or_path} downloads it"
    if _is_out_of_reach(error):
        return (
            f"vae: {name_or_path} is no local folder, and the Hugging Face hub cannot be reached; "
            "check the network, or give the path of a downloaded copy"
        )
    return f"vae: {name_or_path} cannot be loaded from the Hugging Face hub ({_first_line(error)}); check the name"


def _first_line(error: Exception, longest: int = 160) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= longest else line[: longest - 3] + "..."


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Loading warns of matters that are not the user's (absent accelerate, unused configuration entries)."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
