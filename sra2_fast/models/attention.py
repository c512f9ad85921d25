"""Which attention a model runs: the one asked for, the one a checkpoint was trained with, or the fastest one here.

The fastest is measured forward and backward at the very shape, once on a machine (`choices.py`). A model of
implementation="eager" is the public style and keeps PyTorch's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import backends, choices
from ..choices import Choice
from ..errors import must_be
from ..layers.attention import Attention
from ..ops.attention import BACKENDS, SDPA, attention, find
from .sit import SiT

OP = "attention"
DEPENDS_ON = ("torch", "flash-attn", "flash-attn-3")
LONGEST_FOR_MATMUL = 4  # tokens over head_dim: what it keeps for the backward is then at most 4/3 of the projection


def set_attention(network: nn.Module, name: str) -> None:
    """All of a network's attention runs the backend `name` from here on: "sdpa", "flash-attn", "cudnn" and the others
    that `sra2-fast info` lists. Tensors that it does not take (another device or type) go to SDPA.

    network: wrapped or compiled as may be; a compiled one compiles anew. Raises InputError where it is not there.
    """
    if name not in BACKENDS:
        raise must_be("set_attention", "name", f"one of {', '.join(BACKENDS)}", name)
    for module in _attention_of([network]):
        backends.check_attention("set_attention", "name", name, next(module.parameters()).device.type, is_bf16=True)
    _set([network], name)


def choose_attention(
    networks: Iterable[nn.Module | None],
    batch_size: int,
    *,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
    wanted: str = "auto",
    kept: str | None = None,
) -> Choice | None:
    """Choose for networks of one shape, set it in all of them, and return it; None where no SiT is among them.

    batch_size: samples that run at once. autocast_dtype: what they run in, None for the weights' own type.
    wanted: a backend's name, or "auto". kept: what a checkpoint was trained with; it stays where it can run here.
    Raises InputError for a backend that is not there or does not run at this shape; on every rank alike.
    """
    there = [network for network in networks if network is not None]
    sit = next((one for network in there for one in network.modules() if isinstance(one, SiT)), None)
    if sit is None:
        return None
    dtype = sit.pos_embed.dtype if autocast_dtype is None else autocast_dtype
    shape = (batch_size, sit.pos_embed.shape[1], 3, sit.num_heads, sit.hidden_size // sit.num_heads)
    choice = _choose(sit, shape, dtype, device, wanted, kept)
    _set(there, choice.name)
    return choice


def _choose(
    sit: SiT, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, wanted: str, kept: str | None
) -> Choice:
    is_bf16 = dtype == torch.bfloat16
    if wanted != "auto":
        backends.check_attention(OP, "backend", wanted, device.type, is_bf16)
        if wanted != SDPA.name:
            choices.measure(OP, {wanted: _step(wanted, shape, dtype, device)}, device)  # or a line that says why not
        return Choice(wanted, "as asked")
    if sit.implementation == "eager":
        return Choice(SDPA.name, "PyTorch's own, for eager")
    if kept is not None and backends.attention_backends(device.type, is_bf16).get(kept) == "":
        return Choice(kept, "as before")
    if kept is not None:
        tqdm.write(f"{OP}: {kept}, which the checkpoint was trained with, cannot run here; results agree to rounding")
    runs = {name: _step(name, shape, dtype, device) for name in _candidates(shape, is_bf16, device.type)}
    if len(runs) == 1:
        return Choice(next(iter(runs)), "the only one")
    case = {
        "device": backends.device_name(device),
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {name: version for name, version in backends.versions().items() if name in DEPENDS_ON},
    }
    return choices.choose(OP, case, list(runs), lambda: runs, device)


def _candidates(shape: tuple[int, ...], is_bf16: bool, device_type: str) -> list[str]:
    found = [name for name, why_not in backends.attention_backends(device_type, is_bf16).items() if not why_not]
    _, tokens, _, _, head_dim = shape
    return [name for name in found if name != "matmul" or tokens <= LONGEST_FOR_MATMUL * head_dim]


def _step(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """A call that runs attention forward and backward on random numbers, from packed projection to packed gradient.

    The numbers are made at the first call, by a generator of their own: the run's draws stay what they are.
    """
    backend = find(name)
    made: dict[str, Tensor] = {}

    def call() -> Any:
        if not made:
            generator = torch.Generator(device).manual_seed(0)
            made["qkv"] = torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_()
            made["dout"] = torch.randn(shape[:2] + shape[3:], generator=generator, device=device, dtype=dtype)
        with torch.enable_grad():
            return torch.autograd.grad(attention(made["qkv"], backend), made["qkv"], made["dout"])

    return call


def _attention_of(networks: Iterable[nn.Module]) -> list[Attention]:
    return [module for network in networks for module in network.modules() if isinstance(module, Attention)]


def _set(networks: Iterable[nn.Module], name: str) -> None:
    backend = find(name)
    for module in _attention_of(networks):
        module.backend = backend
