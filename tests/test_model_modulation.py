"""The modulations of all blocks in one product: the numbers of one product a block, and whoever listens is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import batch_for, outputs_and_gradients, small_model
from tolerance import allowed, assert_close, relative_error
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sra2_fast.layers.modulation import adaln_head, modulate_all

B, D = 5, 24
ROUNDINGS = 3 * 10  # of a model of three blocks, on either side


def make_heads(count: int = 4) -> tuple[nn.ModuleList, Tensor]:
    heads = nn.ModuleList(adaln_head(D, 6 if i < count - 1 else 2) for i in range(count))
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.3)
    return heads, torch.randn(B, D, requires_grad=True)


def run(heads: nn.ModuleList, c: Tensor, together: bool, autocast: bool) -> tuple[list[Tensor], list[Tensor]]:
    """(products, gradients of c and all parameters) for fixed output gradients."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        products = modulate_all(list(heads), c) if together else [head(c) for head in heads]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(one.shape, generator=generator).to(one.dtype) for one in products]
    return [p.detach() for p in products], list(torch.autograd.grad(products, [c, *heads.parameters()], cotangents))


@pytest.mark.parametrize("autocast", [False, True])
def test_products_and_gradients_are_those_of_one_product_a_head(autocast: bool) -> None:
    """Against float64 on the same weights; one rounding to bf16 each, dc one for all heads and not one for each."""
    heads, c = make_heads()
    products, gradients = run(heads, c, together=True, autocast=autocast)
    separate, separate_gradients = run(heads, c, together=False, autocast=autocast)
    assert [p.dtype for p in products] == [p.dtype for p in separate]
    assert [g.dtype for g in gradients] == [g.dtype for g in separate_gradients]
    twin, _ = make_heads()
    twin.load_state_dict(heads.state_dict())
    true, true_gradients = run(twin.double(), c.detach().double().requires_grad_(), together=False, autocast=False)
    dtype = torch.bfloat16 if autocast else torch.float32
    for got, want in zip(products, true, strict=True):
        assert_close(got, want, dtype, 4, D)
    for got, want, peer in zip(gradients, true_gradients, separate_gradients, strict=True):
        error, of_peer = (relative_error(one, want)[0] for one in (got, peer))
        assert error <= 1.5 * of_peer + allowed(dtype, 1, B), f"{error:.2e} against {of_peer:.2e}"


def test_under_autocast_there_is_one_product_each_way() -> None:
    heads, c = make_heads()
    products: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                products.append(str(func))
            return func(*args, **(kwargs or {}))

    with Count():
        run(heads, c, together=True, autocast=True)
    assert len(products) == 3, products
    with Count():
        run(heads, c, together=False, autocast=True)
    assert len(products) == 3 + 3 * len(heads)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_head_that_is_not_plain_is_left_to_be_called(autocast: bool) -> None:
    heads, c = make_heads()
    heads[1].register_forward_hook(lambda module, inputs, output: output)
    heads[2][1] = torch.nn.utils.parametrizations.weight_norm(heads[2][1])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        products = modulate_all([*heads, None], c)
    assert [one is None for one in products] == [False, True, True, False, True]
    assert modulate_all([None, heads[1]], c) == [None, None]


@pytest.mark.parametrize("frozen", ["c", "weights", "biases"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    heads, c = make_heads()
    for name, parameter in heads.named_parameters():
        parameter.requires_grad_(frozen != ("weights" if name.endswith("weight") else "biases"))
    c = c.detach().requires_grad_(frozen != "c")
    with torch.autocast("cpu", torch.bfloat16):
        products = modulate_all(list(heads), c)
    torch.cat([p.float() for p in products if p is not None], dim=1).square().sum().backward()
    for one in (c, *heads.parameters()):
        assert (one.grad is not None) == one.requires_grad


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_a_model_calls_the_heads_that_somebody_listens_to(checkpoint_blocks: bool) -> None:
    """And gives the same as with all heads in one product."""
    model = small_model(align_depth=1, checkpoint_blocks=checkpoint_blocks)
    model.train()
    model.y_embedder.dropout_prob = 0.0
    inputs = batch_for(model)
    want = outputs_and_gradients(model, inputs, autocast=True)
    called: list[int] = []
    listener = model.blocks[1].adaLN_modulation[1].register_forward_hook(lambda *_: called.append(1))
    model.final_layer.register_forward_pre_hook(lambda *_: called.append(2))
    got = outputs_and_gradients(model, inputs, autocast=True)
    assert 1 in called and 2 in called
    for name, value in want.items():
        error, _ = relative_error(got[name], value.double())
        assert error <= allowed(torch.bfloat16, 2 * ROUNDINGS, 48), f"{name}: {error:.2e}"
    called.clear()
    listener.remove()
    outputs_and_gradients(model, inputs, autocast=True)
    assert 1 not in called


@pytest.mark.parametrize("implementation", ["fused", "eager"])
@pytest.mark.parametrize("autocast", [False, True])
def test_images_that_share_time_and_label_share_the_product(implementation: str, autocast: bool) -> None:
    """A guided batch has one time and half its labels are null: B + 1 rows say it all, in the same velocities."""
    model = small_model(implementation=implementation).eval()
    x, _, _ = batch_for(model, 5)
    pairs, rows = torch.tensor([1, 2, 10]), torch.tensor([1, 0, 1, 2, 2])
    t = torch.full((5,), 0.3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want = model(x, t, pairs[rows])
        conditioning = model.condition(t[:3], pairs)
        got = model.velocity(x, conditioning.of(rows))
        first = model.velocity(x[:2], conditioning.of(rows).first(2))
    dtype = torch.bfloat16 if autocast else torch.float32
    for ours, theirs in ((got, want), (first, want[:2])):
        error, _ = relative_error(ours, theirs)
        assert error <= allowed(dtype, ROUNDINGS, model.hidden_size)
