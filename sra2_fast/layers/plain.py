"""Which modules may be treated as what they are, and which have to be called as whatever they have become.

Two shortcuts go around a module's public contract: a block is handed an open residual, and a last Linear's weights are
read instead of calling it. Neither may be taken where somebody listens in (hooks) or has put something else in the
module's place (peft, FSDP, activation checkpointing, a parametrization, quantisation).
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn
from torch.nn.modules import module as _torch

Module = TypeVar("Module", bound=nn.Module)
_OF_ALL_MODULES = (
    _torch._global_forward_hooks,
    _torch._global_forward_pre_hooks,
    _torch._global_backward_hooks,
    _torch._global_backward_pre_hooks,
)


def watched(module: Module) -> Module:
    """The module, whose hooks `is_plain` sees from here on also in compiled code.

    torch.compile leaves out its guards on a module's own empty dictionaries of hooks, so that a hook added later is
    ignored in silence. The same dictionaries under another name are guarded like any other data.
    """
    vars(module)["hooks_at_any_time"] = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return module


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether module is exactly a `kind` that was `watched`, with its own forward, and nobody hooked into it.

    `module.compile()` leaves it plain: that changes how it runs, not what it takes and returns.
    """
    if type(module) is not kind or "forward" in vars(module):
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    hooks = getattr(module, "hooks_at_any_time", None)
    # Their lengths, not their truth: of a dictionary asked whether it is empty, torch.compile guards nothing.
    return hooks is not None and not any(map(len, hooks)) and not any(map(len, _OF_ALL_MODULES))


def is_readable(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the weight and bias of a plain Linear or convolution may be read instead of calling it.

    Not where it is compiled by itself, nor where they are no dense tensors: sharded ones, quantised ones, or no bias.
    """
    if not is_plain(module, kind) or module._compiled_call_impl is not None:
        return False
    return all(type(one) in (Tensor, nn.Parameter) for one in (module.weight, module.bias))
