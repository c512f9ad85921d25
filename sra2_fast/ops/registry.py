"""How an op's parts become torch operators `sra2_fast::<op>_<part>`: one decorator, on what torch sees of each.

The CPU kernels register themselves when the extension is loaded (csrc/*_torch.cpp). On CUDA the operator runs the
adapter of the backend that `backends.choose` names; where it names none the op calls its eager composition instead.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import backends

Adapter = Callable[..., Any]

library = torch.library.Library("sra2_fast", "FRAGMENT")
ADAPTERS: dict[str, dict[str, Adapter]] = {}  # operator: backend: what runs it on CUDA; tests hold each to its schema


def operator(
    op: str,
    part: str,
    schema: str,
    *,
    triton: Adapter | None = None,
    cublaslt: Adapter | None = None,
    composition: Adapter | None = None,
    has_cuda_cpp: bool = False,
) -> Callable[[Callable[..., Any]], Any]:
    """Registers `sra2_fast::<op>_<part>`; decorates its fake (same arguments, empty results) and returns the overload.

    schema: arguments and results as torch writes them.
    triton, cublaslt: the adapter that calls that launcher, with the schema's arguments in its order.
    composition: what runs on devices and backends without one, made of PyTorch's operators; None: the op itself asks
        whether there is a kernel before it calls the operator.
    has_cuda_cpp: the extension brings a CUDA C++ kernel, registered under its own name `<op>_<part>_cuda`.
    """
    backends.has_extension("cpu")
    name = f"{op}_{part}"
    given = {"triton": triton, "cublaslt": cublaslt}
    adapters = ADAPTERS[name] = {backend: adapter for backend, adapter in given.items() if adapter is not None}
    library.define(name + schema)
    if has_cuda_cpp:
        library.define(f"{name}_cuda{schema}")
        adapters["cuda c++"] = getattr(torch.ops.sra2_fast, f"{name}_cuda")

    def register(fake: Callable[..., Any]) -> Any:
        torch.library.register_fake(f"sra2_fast::{name}", fake, lib=library)
        if composition is not None:
            library.impl(name, composition, "CompositeExplicitAutograd")
        chosen = backends.choose(op, "cuda").backend
        if chosen in adapters:
            library.impl(name, on_its_device(adapters[chosen]), "CUDA")
        # The overload itself: a call through the packet costs 11 us more.
        return getattr(torch.ops.sra2_fast, name).default

    return register


def on_its_device(adapter: Adapter) -> Adapter:
    """The adapter with the device of its first tensor current: a kernel is launched on the current one, whichever that
    is, with addresses of another."""

    def call(first: Tensor | Sequence[Tensor], *others: Any) -> Any:
        with torch.cuda.device_of(first if isinstance(first, Tensor) else first[0]):
            return adapter(first, *others)

    return call


def launchers(op: str) -> ModuleType:
    """The Triton launchers of an op; imported at the first call, since Triton may be missing."""
    return importlib.import_module(f"sra2_fast.kernels.{op}")


def filled(results: Iterable[Tensor | None], likes: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results, with an empty tensor (of the type and device of its like) for None: operators return tensors."""
    return tuple(like.new_empty(0) if one is None else one for one, like in zip(results, likes, strict=True))
