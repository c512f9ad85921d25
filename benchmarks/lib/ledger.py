"""Every operator of one training step, seen beneath autograd, with its part of the step, FLOPs and bytes.

The step is the one that trains (`step_rows.StepRow`, which is a `TrainStep`). `trace` runs it on fake tensors: seconds
and no memory for SiT-XL/2, and what its ops do there is what CUDA does. Fake tensors stand on the CPU: on a torch
without CUDA a fake CUDA product aborts the process. `Ledger` works as well on a step that really runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from sra2_fast import backends
from sra2_fast.layers import plain
from sra2_fast.layers.attention import Attention
from sra2_fast.models.products import set_products
from sra2_fast.ops.attention import SDPA, Backend
from sra2_fast.optim import shadow_weights

from . import flash_attn_stand_in, step_parts
from .step_parts import CASTS, FROZEN_PRODUCTS, GELU
from .step_rows import Setting, StepRow

MARK = "step part: "  # what `Ledger(marks=True)` puts before a part's name in a profile
_COPIES = ("_to_copy", "clone", "copy_", "_foreach_copy_", "cat", "stack")


class Operator(NamedTuple):
    """One operator that a step ran. flops, executed_flops: see `step_parts.flops_of`."""

    part: str
    name: str
    flops: int
    executed_flops: int
    bytes: int
    launches: int = 1  # 0: the bytes of an epilogue, whose product is an operator of its own


class Source(NamedTuple):
    """Where a forward operator belongs, for the operators that compute its gradient."""

    part: str
    product: str | None  # the part of the products with the weight it was given
    is_bare_view: bool = False  # a view inside an autograd.Function, whose node may be a product's all the same


class Ledger(TorchDispatchMode):
    """Within the block, `operators` grows by every operator that runs and is no view.

    step: what will run; its weights are what tells one product from another.
    marks: name each operator's part to the profiler.
    """

    def __init__(self, step: StepRow, marks: bool = False) -> None:
        super().__init__()
        self.operators: list[Operator] = []
        self._marks = marks
        self._optimizer, self._shadows = step.optimizer, None
        self._products: dict[StorageWeakRef, str] = {}  # of weights and their copies; weak, as autograd counts owners
        self._sources: dict[int, Source] = {}
        for name, param in step.sit.named_parameters():
            self._products[_storage(param)] = step_parts.product_of(name)
        for network in (step.encoder, step.step.teacher):
            for param in network.parameters() if network is not None else ():
                self._products[_storage(param)] = FROZEN_PRODUCTS

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a question about a tensor, not an operator that could have a gradient
            return func(*args, **kwargs)
        if getattr(self._optimizer, "shadows", None) is not self._shadows:  # made by the first step
            self._shadows = self._optimizer.shadows
            for param, shadow in self._shadows.items():
                self._products[_storage(shadow)] = self._products[_storage(param)]
        tensors = [t for value in (*args, *kwargs.values()) for t in step_parts.tensors_in(value)]
        part = self._part(func, args, kwargs, tensors)
        if step_parts.costs_nothing(func):
            return func(*args, **kwargs)
        with torch.profiler.record_function(MARK + part) if self._marks else contextlib.nullcontext():
            out = func(*args, **kwargs)
        flops = step_parts.flops_of(func, args, kwargs, out)
        name, moved = func._schema.name, step_parts.bytes_of(func, args, kwargs, out)
        beside = step_parts.epilogue_bytes(name, args, out)
        self.operators.append(Operator(part, name, *flops, moved - beside))
        if beside:
            self.operators.append(Operator(GELU, name, 0, 0, beside, launches=0))
        self._follow(func, tensors, out)
        return out

    def _part(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> str:
        """The operator's part; in the forward it is noted under the number of the autograd node made for it."""
        node = torch._C._current_autograd_node()
        source = None if node is None else self._sources.get(node._sequence_nr())
        product = next(filter(None, (self._products.get(_storage(t)) for t in tensors)), None)
        if product is None and source is not None:
            product = source.product
        product = step_parts.product_of_epilogue(func._schema.name, product)
        part = step_parts.part_by_name(func._schema.name)
        if part is None and step_parts.is_product(func):
            part = product or step_parts.product_by_caller()
        is_named = part is not None
        if part is None:
            part = step_parts.part_by_caller(tensors) if source is None else source.part
        if node is None:
            # Made just before this call; operators after it that make no node must not take its place.
            number = torch.autograd._get_sequence_nr() - 1
            is_bare_view = func.is_view and not torch.is_grad_enabled()
            if number not in self._sources or self._sources[number].is_bare_view:
                self._sources[number] = Source(part, product if part == product else None, is_bare_view)
        if is_named:
            return part
        return CASTS if step_parts.is_cast(func, args, kwargs) else step_parts.part_beside(part, func._schema.name)

    def _follow(self, func: Any, tensors: list[Tensor], out: Any) -> None:
        """A copy of a weight stands for the weight; so does a matrix that weights were copied into."""
        name = func._schema.name.split("::")[-1]
        if name not in _COPIES:
            return
        product = next(filter(None, (self._products.get(_storage(t)) for t in tensors)), None)
        if product is not None:
            self._products.setdefault(_storage(tensors[0] if name == "_foreach_copy_" else out), product)


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


class _FakeTensorMode(FakeTensorMode):
    """Tensors copied with a module stay of this mode: two modes do not mix."""

    def __deepcopy__(self, memo: object) -> _FakeTensorMode:
        return self


def trace(row: str, setting: Setting) -> tuple[StepRow, list[Operator]]:
    """The step of this row and the operators of its second step, on fake tensors: the first one makes the state."""
    with warnings.catch_warnings(), _FakeTensorMode(), as_on_cuda():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # deepcopy does
        step = StepRow(row, dataclasses.replace(setting, attention=SDPA.name))  # nothing to be measured here
        set_attention(step, setting.attention)
        if setting.implementation == "fused" and setting.precision == "bf16":
            set_products(step.sit, "epilogues")
        ledger = Ledger(step)
        with ledger:
            step()
            ledger.operators.clear()
            step()
    return step, ledger.operators


def set_attention(step: StepRow, name: str) -> None:
    """The step's attention reads and writes what the backend `name` does on a GPU. flash-attn need not be installed;
    all of PyTorch's own kernels read and write what its flash kernel on a CPU does."""
    packed, separate = flash_attn_stand_in.flash_attn_qkvpacked_func, flash_attn_stand_in.flash_attn_func
    backend = Backend(name, separate, packed, None, None) if name.startswith("flash-attn") else SDPA
    for network in (step.sit, step.step.teacher):
        for module in network.modules() if network is not None else ():
            if isinstance(module, Attention):
                module.backend = backend
    step.step.choices["attention"] = name


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """Fake CPU tensors take the way of CUDA ones: each op is its kernel's operator, whether or not it is built here."""
    with contextlib.ExitStack() as patches:
        for op in backends.CANDIDATES:
            module = sys.modules.get(f"sra2_fast.ops.{op}")
            if module is not None and hasattr(module, "_FUSED_ON"):
                patches.enter_context(mock.patch.object(module, "_FUSED_ON", frozenset(("cpu",))))
        # These ask for plain tensors; a fake one stands for such a one.
        patches.enter_context(mock.patch.object(plain, "Tensor", FakeTensor))
        patches.enter_context(mock.patch.object(shadow_weights, "_PLAIN", (FakeTensor,)))
        # The one initialisation that looks at what it drew; REPA's encoder has it.
        patches.enter_context(mock.patch.object(nn.init, "_no_grad_trunc_normal_", lambda tensor, *_, **__: tensor))
        yield
