"""Counts that belong to a model and not to how it is run: parameters and floating-point operations.

The counts are analytic, so that a fused op (opaque to any counter) and its eager composition are charged the same. Two
operations a multiply-add; matrix products and attention only, as everybody counts (arXiv 2212.09748, Table 1, counts
the same products, one operation a multiply-add). A test holds them to `torch.utils.flop_counter.FlopCounterMode`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

TIME_FEATURES = 256


def count_parameters(module: nn.Module | None) -> int:
    """Elements of all parameters; 0 for None."""
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def linear_flops(rows: int, width_in: int, width_out: int) -> int:
    """FLOPs of (rows, width_in) times (width_in, width_out)."""
    return 2 * rows * width_in * width_out


def block_flops(tokens: int, hidden_size: int, mlp_hidden_size: int) -> int:
    """FLOPs of one transformer block on one sequence: qkv, q k^T, p v, output, two MLP products."""
    projections = linear_flops(tokens, hidden_size, 4 * hidden_size)
    attention = 2 * linear_flops(tokens, hidden_size, tokens)
    return projections + attention + 2 * linear_flops(tokens, hidden_size, mlp_hidden_size)


def sit_forward_flops(config: Mapping[str, Any], stop_at_block: int | None = None) -> int:
    """FLOPs of SiT's forward for one image, without the projector.

    config: `SiT.config()`. stop_at_block: count the first so many blocks and no output layer (a teacher's forward).
    """
    width, patch, channels = config["hidden_size"], config["patch_size"], config["in_channels"]
    tokens = (config["input_size"] // patch) ** 2
    blocks = config["depth"] if stop_at_block is None else stop_at_block
    embed = linear_flops(tokens, patch * patch * channels, width)
    condition = linear_flops(1, TIME_FEATURES, width) + linear_flops(1, width, width)
    block = block_flops(tokens, width, int(width * config["mlp_ratio"])) + linear_flops(1, width, 6 * width)
    total = embed + condition + blocks * block
    if stop_at_block is None:
        out_channels = channels * (2 if config["learn_sigma"] else 1)
        total += linear_flops(1, width, 2 * width) + linear_flops(tokens, width, patch * patch * out_channels)
    return total


def projector_forward_flops(projector: Sequence[nn.Module] | nn.Module | None, tokens: int) -> int:
    """FLOPs of the projector's Linears on one image's tokens; 0 for None."""
    if projector is None:
        return 0
    linears = [layer for layer in projector if isinstance(layer, nn.Linear)]  # type: ignore[union-attr]
    return sum(linear_flops(tokens, layer.in_features, layer.out_features) for layer in linears)


def vit_forward_flops(depth: int, hidden_size: int, patches: int, patch_elements: int, mlp_hidden_size: int) -> int:
    """FLOPs of a plain vision transformer on one image, class token included."""
    blocks = depth * block_flops(patches + 1, hidden_size, mlp_hidden_size)
    return linear_flops(patches, patch_elements, hidden_size) + blocks


def training_flops(trained_forward: int, frozen_forward: int = 0) -> int:
    """FLOPs of a training step: forward, then twice as much backward; a frozen network only runs forward."""
    return 3 * trained_forward + frozen_forward


def counted_flops(call: Callable[[], object]) -> int:
    """FLOPs that torch's own counter sees while `call` runs; attention as plain products, so that they are seen."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()
