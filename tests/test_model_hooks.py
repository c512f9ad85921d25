"""A block with hooks, or inside a wrapper, keeps the public contract: closed tokens in, closed tokens out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import batch_for, outputs_and_gradients, small_model
from tolerance import allowed, relative_error
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules import module as all_modules

from sra2_fast import SiT
from sra2_fast.layers.block import PendingResidual, SiTBlock

IMPLEMENTATIONS = ("eager", "fused")
Seen = dict[str, Any]


def first(value: Any) -> Any:
    """What callbacks in the wild do with what they get."""
    return value[0] if isinstance(value, tuple) else value


def hook_forward(block: nn.Module, seen: Seen) -> Any:
    return block.register_forward_hook(lambda _, args, out: seen.update(stream=args[0], out=out))


def hook_forward_with_keywords(block: nn.Module, seen: Seen) -> Any:
    def hook(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        seen.update(stream=args[0], out=out)

    return block.register_forward_hook(hook, with_kwargs=True)


def hook_before(block: nn.Module, seen: Seen) -> Any:
    return block.register_forward_pre_hook(lambda _, args: seen.update(stream=args[0]))


def hook_backward(block: nn.Module, seen: Seen) -> Any:
    return block.register_full_backward_hook(lambda _, into, out: seen.update(gradients=into, out_gradients=out))


def hook_before_backward(block: nn.Module, seen: Seen) -> Any:
    return block.register_full_backward_pre_hook(lambda _, out: seen.update(out_gradients=out))


def hook_every_module(block: nn.Module, seen: Seen) -> Any:
    def hook(module: nn.Module, args: Any, out: Any) -> None:
        if module is block:
            seen.update(stream=args[0], out=out)

    return all_modules.register_module_forward_hook(hook)


HOOKS = (
    hook_forward,
    hook_forward_with_keywords,
    hook_before,
    hook_backward,
    hook_before_backward,
    hook_every_module,
)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_on_a_block_sees_closed_tokens_not_an_open_residual(hook: Callable, implementation: str) -> None:
    """An open residual taken for the tokens is the stream before the MLP branch was added."""
    model = small_model(align_depth=1, implementation=implementation).eval()
    inputs = batch_for(model)
    before, after = (model(*inputs, return_hidden=number).detach() for number in (2, 3))
    want = outputs_and_gradients(model, inputs)
    seen: Seen = {}
    with hook(model.blocks[2], seen):
        got = outputs_and_gradients(model, inputs)
    assert seen
    for name, tokens in (("stream", before), ("out", after)):
        if name in seen:
            # A hook on every module also has the patches go through the convolution: 16 terms, summed in its order.
            assert relative_error(first(seen[name]), tokens)[0] <= allowed(torch.float32, 6, summed=16), name
    assert [g.shape for g in seen.get("out_gradients", [after])] == [after.shape]
    assert [g.shape for g in seen.get("gradients", [after, after[:, 0]])] == [after.shape, after[:, 0].shape]
    for name, value in want.items():
        if not name.endswith("qkv.bias"):  # a third of it, the keys', has no gradient but rounding
            assert relative_error(got[name], value)[0] <= allowed(torch.float32, 16, summed=48), name


class Wrapper(nn.Module):
    """What peft and its kind are to a block: another module that calls it, and may have parameters of its own."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.inner = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Derived(SiTBlock):
    """As FSDP makes one, and as a user may."""


def derive(block: SiTBlock) -> SiTBlock:
    block.__class__ = Derived
    return block


def replace_forward(block: SiTBlock) -> SiTBlock:
    """As accelerate's hooks do."""
    block.forward = lambda *args: SiTBlock.forward(block, *args)  # type: ignore[method-assign]
    return block


def compile_apart(block: SiTBlock) -> nn.Module:
    return torch.compile(block, backend="eager")  # type: ignore[return-value]


def watch_forms(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """The forms in which streams reach SiTBlock.forward from now on."""
    forms: list[type] = []
    forward = SiTBlock.forward

    def watching(self: SiTBlock, stream: Any, *args: Any) -> Any:
        forms.append(type(stream))
        return forward(self, stream, *args)

    monkeypatch.setattr(SiTBlock, "forward", watching)
    return forms


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("wrap", (Wrapper, checkpoint_wrapper, derive, replace_forward, compile_apart))
def test_a_block_that_is_no_plain_block_gets_closed_tokens(
    wrap: Callable, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    model = small_model(align_depth=1, implementation=implementation).eval()
    inputs = batch_for(model)
    want = outputs_and_gradients(model, inputs)
    model.blocks[1] = wrap(model.blocks[1])
    forms = watch_forms(monkeypatch)
    got = outputs_and_gradients(model, inputs)
    assert forms[:3] == [PendingResidual, Tensor, PendingResidual]
    assert relative_error(got["velocity"], want["velocity"])[0] <= allowed(torch.float32, 3, summed=48)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_hook_on_the_final_layer_sees_closed_tokens(implementation: str) -> None:
    model = small_model(implementation=implementation).eval()
    inputs = batch_for(model)
    tokens, want = model(*inputs, return_hidden=3), model(*inputs)
    seen: Seen = {}
    hook_before(model.final_layer, seen)
    assert relative_error(model(*inputs).detach(), want.detach())[0] <= allowed(torch.float32, 3, summed=48)
    assert relative_error(first(seen["stream"]).detach(), tokens.detach())[0] <= allowed(torch.float32, 6)


def test_a_block_compiled_in_place_keeps_the_fusion_across_blocks() -> None:
    """`block.compile()` wraps nothing: open residuals still go in and out."""
    torch.compiler.reset()
    model = small_model().eval()
    inputs = batch_for(model)
    want = model(*inputs)
    forms = []
    for block in model.blocks:
        block.compile(backend="eager")
        compiled = block._compiled_call_impl

        def call(stream: Any, *args: Any, compiled: Any = compiled) -> Any:
            forms.append(type(stream))
            return compiled(stream, *args)

        block._compiled_call_impl = call
    assert torch.equal(model(*inputs), want)
    assert forms == [PendingResidual] * 3


def test_dictionaries_of_hooks_that_were_swapped_out_are_still_seen() -> None:
    """`module._forward_hooks = OrderedDict()` is a common way to remove all; the next hook lands in the new one."""
    model = small_model().eval()
    inputs = batch_for(model)
    want = model(*inputs, return_hidden=2)
    model.blocks[1]._forward_hooks = type(model.blocks[1]._forward_hooks)()
    seen: Seen = {}
    hook_forward(model.blocks[1], seen)
    model(*inputs)
    assert relative_error(first(seen["out"]).detach(), want.detach())[0] <= allowed(torch.float32, 4)


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@pytest.mark.parametrize(
    ("hook", "implementation"),
    ((hook_forward, "eager"), (hook_forward, "fused"), (hook_before, "fused"), (hook_every_module, "eager")),
)
def test_a_hook_added_after_compilation_is_neither_ignored_nor_given_an_open_residual(
    hook: Callable, implementation: str
) -> None:
    """torch.compile sets no guard on empty dictionaries of hooks, so its code went on without the new hook."""
    torch.compiler.reset()
    model = small_model(depth=2, implementation=implementation).eval()
    inputs = batch_for(model)
    before, after = (model(*inputs, return_hidden=number).detach() for number in (1, 2))
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    want = compiled(*inputs)
    seen: Seen = {}
    with hook(model.blocks[1], seen):
        got = compiled(*inputs)
    assert counter.frame_count == 2
    assert relative_error(got.detach(), want.detach())[0] <= allowed(torch.float32, 3, summed=48)
    for name, value in seen.items():
        assert isinstance(value, Tensor), name
        tokens = before if name == "stream" else after
        assert relative_error(value.detach(), tokens)[0] <= allowed(torch.float32, 4, summed=16), name
    assert seen
    seen.clear()
    assert torch.equal(compiled(*inputs), want) and not seen


def test_a_backward_hook_added_after_compilation_is_refused_by_torch_not_ignored() -> None:
    torch.compiler.reset()
    model = small_model(depth=2, implementation="eager").eval()
    inputs = batch_for(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(*inputs)
    hook_backward(model.blocks[1], {})
    with pytest.raises(torch._dynamo.exc.Unsupported, match="backwards hooks require compiled autograd"):
        compiled(*inputs)


def test_a_forward_put_on_a_block_after_compilation_is_called() -> None:
    torch.compiler.reset()
    model = small_model(depth=2, implementation="eager").eval()
    inputs = batch_for(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(*inputs)
    model.blocks[1].forward = lambda stream, c: torch.zeros_like(stream)
    want = model(*inputs)
    assert torch.equal(compiled(*inputs), want)


def test_a_copy_s_hooks_are_its_own() -> None:
    """The hooks are watched under a second name, which a copy has to follow."""
    model: SiT = small_model(depth=2, implementation="eager").eval()
    twin = copy.deepcopy(model)
    seen: Seen = {}
    hook_forward(twin.blocks[1], seen)
    torch.compiler.reset()
    inputs = batch_for(model)
    torch.compile(twin, backend="eager", fullgraph=True)(*inputs)
    assert isinstance(seen["out"], Tensor)
    seen.clear()
    model(*inputs)
    assert not seen
