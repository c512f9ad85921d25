"""Whether a model leaves GELU and the sums for biases to its products' epilogues: measured, and set in its layers.

cuBLASLt's epilogues save passes over memory, but a product with one may run slower than without, or not exist at a
shape. So both ways are measured forward and backward at the very shape, once on a machine (`choices.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import backends, choices
from ..choices import Choice
from ..layers.linear import Linear, Mlp
from .sit import SiT

OP = "products"
WAYS = ("epilogues", "modules")
DEPENDS_ON = ("torch",)


def set_products(network: nn.Module, way: str) -> None:
    """All Linears and MLPs of a network run so from here on: "epilogues", or as "modules"."""
    for module in network.modules():
        if isinstance(module, Linear | Mlp):
            module.has_epilogue = way == "epilogues"


def choose_products(
    networks: Iterable[nn.Module | None],
    batch_size: int,
    *,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
    kept: str | None = None,
) -> Choice | None:
    """Choose for networks of one shape, set it in all of them, and return it; None where there is nothing to choose.

    batch_size: samples that run at once. autocast_dtype: only bfloat16 has epilogues. kept: what a checkpoint was
        trained with; it stays where it can run here. Where the blocks are compiled, so are both ways.
    """
    there = [network for network in networks if network is not None]
    sit = next((one for network in there for one in network.modules() if isinstance(one, SiT)), None)
    if sit is None or sit.implementation != "fused" or autocast_dtype is not torch.bfloat16:
        return None
    if backends.choose("linear", device.type).backend == backends.PYTORCH:
        if kept == "epilogues":
            tqdm.write(f"{OP}: no epilogues here, which the checkpoint was trained with; results agree to rounding")
        for network in there:
            set_products(network, "modules")
        return None
    is_compiled = any(block._compiled_call_impl is not None for block in sit.blocks)
    if kept in WAYS:
        choice = Choice(kept, "as before")
    else:
        choice = _measured(sit, batch_size * sit.pos_embed.shape[1], device, is_compiled)
    for network in there:
        set_products(network, choice.name)
    return choice


def _measured(sit: SiT, rows: int, device: torch.device, is_compiled: bool) -> Choice:
    hidden, mlp_hidden = sit.hidden_size, int(sit.hidden_size * sit.config()["mlp_ratio"])
    case = {
        "device": backends.device_name(device),
        "shape": [rows, hidden, mlp_hidden],
        "compiled": is_compiled,
        "versions": {name: version for name, version in backends.versions().items() if name in DEPENDS_ON},
    }
    runs = {way: _step(way, rows, hidden, mlp_hidden, device, is_compiled) for way in WAYS}
    return choices.choose(OP, case, WAYS, lambda: runs, device)


class _Products(nn.Module):
    """The products of a block, without what stands between them."""

    def __init__(self, hidden: int, mlp_hidden: int) -> None:
        super().__init__()
        self.qkv, self.proj, self.mlp = Linear(hidden, 3 * hidden), Linear(hidden, hidden), Mlp(hidden, mlp_hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(x), self.proj(x), self.mlp(x)


def _step(
    way: str, rows: int, hidden: int, mlp_hidden: int, device: torch.device, is_compiled: bool
) -> Callable[[], object]:
    """A call that runs a block's products forward and backward on bf16 numbers of their own."""
    made: list[tuple[nn.Module, Tensor, list[Tensor]]] = []

    def call() -> object:
        if not made:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(0)
                with device:
                    products = _Products(hidden, mlp_hidden).bfloat16()
                    x = torch.randn(rows, hidden, dtype=torch.bfloat16).requires_grad_()
                    gradients = [torch.randn(rows, n, dtype=torch.bfloat16) for n in (3 * hidden, hidden, hidden)]
            set_products(products, way)
            if is_compiled:
                products.compile()
            made.append((products, x, gradients))
        module, x, gradients = made[0]
        with torch.enable_grad():
            return torch.autograd.grad(module(x), [x, *module.parameters()], gradients)

    return call
