"""The projector's last Linear and the patch convolution are called, not read, where they are more than their weights.

What stands in their place (LoRA, a compiled, quantised or hooked module) would otherwise be passed by in silence.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import batch_for, small_model
from tolerance import allowed, relative_error
from torch import Tensor, nn

from sra2_fast import SiT, SRA2Loss

IMPLEMENTATIONS = ("eager", "fused")
SIZES: dict[str, Any] = {"align_depth": 1, "projector_layers": 2, "learn_sigma": False}


class LoRA(nn.Module):
    """peft's layer in short: the frozen one, and a product of two narrow ones beside it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        generator = torch.Generator().manual_seed(3)
        weight = base.weight.flatten(1)
        self.down = nn.Parameter(torch.randn(2, weight.shape[1], generator=generator))
        self.up = nn.Parameter(torch.randn(weight.shape[0], 2, generator=generator))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        merged = self.weight + (self.up @ self.down).view_as(self.weight)
        return torch.func.functional_call(self.base_layer, {"weight": merged}, x)


class RoundedLinear(nn.Linear):
    """A quantising layer in short: a Linear by type, whose weight is not what it multiplies with."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.round(decimals=1), self.bias)


def last_of_the_projector(model: SiT) -> tuple[nn.Module, str]:
    assert model.projector is not None
    return model.projector, "2"


def patch_convolution(model: SiT) -> tuple[nn.Module, str]:
    return model.x_embedder, "proj"


PLACES = (last_of_the_projector, patch_convolution)


def losses(model: Any, compare: SRA2Loss | None = None) -> tuple[Tensor, Tensor]:
    x, t, y = batch_for(getattr(model, "_orig_mod", model))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    out = (compare or SRA2Loss())(model, x, y, t=t, noise=noise)
    out.total.backward()
    return out.velocity, out.align


def assert_agree(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        assert relative_error(one, other)[0] <= allowed(torch.float32, 16, summed=48)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("place", PLACES)
def test_low_rank_weights_beside_it_count_and_train(place: Callable, implementation: str) -> None:
    """They were left out of the product: the loss was that of the frozen weights, the adapter had no gradient."""
    model = small_model(**SIZES, implementation=implementation).eval()
    merged = copy.deepcopy(model)
    parent, name = place(model)
    adapter = LoRA(getattr(parent, name))
    setattr(parent, name, adapter)
    parent, name = place(merged)
    with torch.no_grad():
        weight = getattr(parent, name).weight
        weight += (adapter.up @ adapter.down).view_as(weight)
    assert_agree(losses(model), losses(merged))
    for parameter in (adapter.up, adapter.down):
        assert parameter.grad is not None and parameter.grad.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("align", ("cosine", "smooth_l1"))
def test_a_layer_that_quantises_its_weight_is_called(align: str, implementation: str) -> None:
    model = small_model(**SIZES, implementation=implementation).eval()
    rounded = copy.deepcopy(model)
    assert model.projector is not None and rounded.projector is not None
    model.projector[-1].__class__ = RoundedLinear
    with torch.no_grad():
        rounded.projector[-1].weight.copy_(rounded.projector[-1].weight.round(decimals=1))
    assert_agree(losses(model, SRA2Loss(align=align)), losses(rounded, SRA2Loss(align=align)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("place", PLACES)
def test_a_hook_on_it_fires_and_may_change_its_output(place: Callable, implementation: str) -> None:
    model = small_model(**SIZES, implementation=implementation).eval()
    want = losses(model)
    parent, name = place(model)
    seen: list[torch.Size] = []
    with getattr(parent, name).register_forward_hook(lambda _, args, out: seen.append(out.shape)):
        assert_agree(losses(model), want)
    assert len(seen) == 1
    with getattr(parent, name).register_forward_hook(lambda _, args, out: torch.ones_like(out)):
        changed = losses(model)
    assert all(relative_error(one, other)[0] > 1e-2 for one, other in zip(changed[1:], want[1:], strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_hook_on_the_projector_fires(implementation: str) -> None:
    model = small_model(**SIZES, implementation=implementation).eval()
    want = losses(model)
    assert model.projector is not None
    seen: list[torch.Size] = []
    model.projector.register_full_backward_hook(lambda _, into, out: seen.append(out[0].shape))
    assert_agree(losses(model), want)
    assert seen == [torch.Size([3, 16, 16])]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("place", (*PLACES, lambda model: (model, "projector")))
def test_compiled_by_itself_it_runs_compiled(place: Callable, implementation: str) -> None:
    """Regional compilation: `module.compile()` of the parts of a model."""
    torch.compiler.reset()
    model = small_model(**SIZES, implementation=implementation).eval()
    want = losses(model)
    parent, name = place(model)
    part, calls = getattr(parent, name), []
    part.compile(backend="eager")
    compiled = part._compiled_call_impl
    part._compiled_call_impl = lambda x: calls.append(1) or compiled(x)
    assert_agree(losses(model), want)
    assert calls == [1]


def test_a_last_linear_without_a_bias_is_called() -> None:
    model = small_model(**SIZES).eval()
    assert model.projector is not None
    with torch.no_grad():
        model.projector[-1].bias.zero_()
    want = losses(model)
    model.projector[-1].bias = None
    assert_agree(losses(model), want)


def test_a_hook_added_to_it_after_compilation_is_not_ignored() -> None:
    torch.compiler.reset()
    model = small_model(**SIZES, depth=1, implementation="eager").eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    want = losses(compiled)
    assert model.projector is not None
    seen: list[int] = []
    model.projector[-1].register_forward_hook(lambda _, args, out: seen.append(1))
    model.x_embedder.proj.register_forward_hook(lambda _, args, out: seen.append(2))
    assert_agree(losses(compiled), want)
    assert seen == [2, 1]


def test_left_alone_it_is_read_and_the_fused_op_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortcut that all of this is about: without it the last product is not part of the fused loss."""
    from sra2_fast.objective import terms

    calls = []
    op = terms._fused
    monkeypatch.setattr(terms, "_fused", lambda *args, **kwargs: calls.append(1) or op(*args, **kwargs))
    losses(small_model(**SIZES).eval())
    assert calls == [1]
