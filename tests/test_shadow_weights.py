"""The bf16 weights that the optimizer keeps for the products: autocast's numbers bit for bit, and never out of date."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_train_step import CPU, make_batch, make_step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sra2_fast import SRA2Loss
from sra2_fast.errors import InputError
from sra2_fast.models import compile_blocks
from sra2_fast.ops import adamw_ema as op
from sra2_fast.optim import AdamWEMA
from sra2_fast.train.step import TrainStep

needs_kernels = pytest.mark.skipif(not op.is_fused(CPU), reason="the extension is not built (sra2-fast info)")
pytestmark = [pytest.mark.training, needs_kernels]
BF16 = torch.bfloat16


def without_shadows(step: TrainStep) -> TrainStep:
    """The same step on autocast alone."""
    step.weights = lambda microbatches=1: contextlib.nullcontext()  # type: ignore[method-assign]
    return step


def state_of(step: TrainStep) -> dict[str, Tensor]:
    found = {f"weight {n}": p.detach() for n, p in step.network.named_parameters()}
    found.update({f"average {n}": t for n, t in step.optimizer.ema_state_dict().items()})
    for name, param in step.network.named_parameters():
        found.update({f"{key} {name}": value for key, value in step.optimizer.state[param].items()})
    return found


def assert_same(one: TrainStep, other: TrainStep) -> None:
    want = state_of(other)
    assert {n for n, value in state_of(one).items() if not torch.equal(value, want[n])} == set()


def shadows_are_fresh(step: TrainStep) -> bool:
    return all(torch.equal(leaf, master.to(BF16)) for master, leaf in step.optimizer.shadows.items())


@pytest.mark.parametrize("changes", [{}, {"loss": "smooth_l1"}, {"loss": None}, {"checkpoint": True}], ids=str)
def test_steps_are_bitwise_those_of_autocast(changes: dict[str, Any]) -> None:
    steps = [make_step(autocast_dtype=BF16), without_shadows(make_step(autocast_dtype=BF16))]
    for step in steps:
        if "loss" in changes:
            step.loss_fn = SRA2Loss(align=changes["loss"])
        step.network.checkpoint_blocks = changes.get("checkpoint", False)
    for seed in range(4):
        results = [step([make_batch(seed=seed)]) for step in steps]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert steps[0].optimizer.shadows is not None and steps[1].optimizer.shadows is None
    assert_same(*steps)
    assert shadows_are_fresh(steps[0])


def test_a_compiled_step_is_bitwise_the_compiled_step_of_autocast() -> None:
    steps = [make_step(autocast_dtype=BF16), without_shadows(make_step(autocast_dtype=BF16))]
    for step in steps:
        compile_blocks(step.network)  # type: ignore[arg-type]
        for seed in range(2):
            step([make_batch(seed=seed)])
    assert_same(*steps)


class Casts(TorchDispatchMode):
    """Shapes of the tensors that are cast between float32 and bf16 inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].is_floating_point() and out.dtype != args[0].dtype:
            self.shapes.append(args[0].shape)
        if func is torch.ops.aten._foreach_copy_.default:
            self.shapes += [t.shape for t in args[0]]
        return out


def test_no_weight_and_no_gradient_of_one_is_cast() -> None:
    step = make_step(autocast_dtype=BF16)
    step([make_batch()])
    shapes = {
        leaf.shape for _, leaf in step.optimizer.shadows.items() if leaf.dim() == 2
    }  # a bias may look like another
    assert len(step.optimizer.shadows.items()) > 20
    with Casts() as casts:
        step([make_batch()])
    assert not shapes & set(casts.shapes)
    with Casts() as casts:
        without_shadows(step)([make_batch()])
    assert shapes <= set(casts.shapes)  # the test sees them where they are


def test_the_adaln_weights_are_one_matrix() -> None:
    step = make_step(autocast_dtype=BF16)
    step([make_batch()])
    network: Any = step.network
    weights = [step.optimizer.shadows.leaf_of(block.adaLN_modulation[1].weight) for block in network.blocks]
    weights.append(step.optimizer.shadows.leaf_of(network.final_layer.adaLN_modulation[1].weight))
    assert len({w.untyped_storage().data_ptr() for w in weights}) == 1
    ends = [w.storage_offset() + w.numel() for w in weights]
    assert [w.storage_offset() for w in weights] == [0, *ends[:-1]]


def add_to_weight(step: TrainStep) -> None:
    with torch.no_grad():
        step.network.blocks[0].mlp.fc1.weight.add_(0.25)  # type: ignore[union-attr, index]


def assign_data(step: TrainStep) -> None:
    weight = step.network.blocks[1].attn.qkv.weight  # type: ignore[union-attr, index]
    weight.data = weight.detach() + 0.25


def load(step: TrainStep) -> None:
    step.network.load_state_dict({n: t + 0.125 for n, t in step.network.state_dict().items()})


def swap(step: TrainStep) -> None:
    """Masters and averages change places for good: an exception in the block would put them back."""
    with step.optimizer.swap_ema(step.network):
        kept = {n: p.detach().clone() for n, p in step.network.named_parameters()}
    with torch.no_grad():
        for name, p in step.network.named_parameters():
            p.copy_(kept[name])


def evaluate(step: TrainStep) -> None:
    with step.optimizer.swap_ema(step.network):
        pass


def move(step: TrainStep) -> None:
    step.network.to(torch.float64).to(torch.float32)


def step_on_float32(step: TrainStep) -> None:
    """Two microbatches are summed in float32: the kernel writes no shadow."""
    step([make_batch(seed=7).map(lambda t: t[:4]), make_batch(seed=7).map(lambda t: t[4:])])


def load_optimizer(step: TrainStep) -> None:
    step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))


EVENTS = (add_to_weight, assign_data, load, swap, evaluate, move, step_on_float32, load_optimizer)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_shadows_follow_whatever_writes_the_weights(event: Callable[[TrainStep], None]) -> None:
    steps = [make_step(autocast_dtype=BF16), without_shadows(make_step(autocast_dtype=BF16))]
    for step in steps:
        step([make_batch(seed=1)])
        event(step)
        step([make_batch(seed=2)])
    assert_same(*steps)
    assert shadows_are_fresh(steps[0])


def test_a_write_past_autograd_needs_refresh() -> None:
    step = make_step(autocast_dtype=BF16)
    step([make_batch()])
    step.network.blocks[0].mlp.fc1.weight.data.add_(0.25)  # type: ignore[union-attr, index]
    assert not shadows_are_fresh(step)
    step.optimizer.shadows.refresh()
    assert shadows_are_fresh(step)


def test_the_network_has_its_own_weights_again_whatever_happened() -> None:
    step = make_step(autocast_dtype=BF16)
    before = dict(step.network.named_parameters())
    with pytest.raises(KeyError), step.weights():
        assert {p.dtype for n, p in step.network.named_parameters() if n.endswith("mlp.fc1.weight")} == {BF16}
        raise KeyError
    assert all(before[name] is p for name, p in step.network.named_parameters())


def test_a_gradient_hook_or_a_shared_weight_keeps_a_parameter_out() -> None:
    step = make_step(autocast_dtype=BF16)
    fc1, fc2 = step.network.blocks[0].mlp.fc1, step.network.blocks[0].mlp.fc2  # type: ignore[union-attr, index]
    seen: list[Tensor] = []
    fc1.weight.register_hook(seen.append)
    fc2.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    step([make_batch()])
    assert [grad.dtype for grad in seen] == [torch.float32] * 2
    tied = make_step(autocast_dtype=BF16)
    network: Any = tied.network
    network.blocks[1].mlp.fc1.weight = network.blocks[0].mlp.fc1.weight
    tied([make_batch()])
    assert tied.optimizer.shadows.leaf_of(network.blocks[0].mlp.fc1.weight) is None


def test_a_frozen_weight_has_a_shadow_and_no_gradient() -> None:
    step = make_step(autocast_dtype=BF16)
    frozen = step.network.blocks[0].mlp.fc1.weight  # type: ignore[union-attr, index]
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    step([make_batch()])
    step([make_batch()])
    assert torch.equal(frozen, before) and not step.optimizer.shadows.leaf_of(frozen).requires_grad
    frozen.requires_grad_(True)
    step([make_batch()])
    assert not torch.equal(frozen, before)


def test_own_loop_with_bf16_weights() -> None:
    """docs/guide.md's loop: one backward a step; a second would be summed in bf16 and is refused."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4))
    other = copy.deepcopy(net)
    x = torch.randn(5, 8)
    opts = [AdamWEMA(net.named_parameters(), lr=1e-2), AdamWEMA(other.named_parameters(), lr=1e-2)]
    for _ in range(3):
        with opts[0].bf16_weights(net), torch.autocast("cpu", BF16):
            net(x).float().square().mean().backward()
        with torch.autocast("cpu", BF16):
            other(x).float().square().mean().backward()
        grad = opts[0].grad_of(net[0].weight)
        assert grad is not None and grad.dtype is BF16 and torch.equal(grad.float(), other[0].weight.grad)
        one_backward = pytest.raises(InputError, match="AdamWEMA: bf16_weights is for one backward a step")
        with one_backward, opts[0].bf16_weights(net):
            pass
        for opt in opts:
            opt.step()
            opt.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_both_kinds_of_gradient_add_up_in_float32() -> None:
    torch.manual_seed(0)
    net = nn.Linear(8, 4)
    opt = AdamWEMA(net.named_parameters(), lr=1e-2)
    x = torch.randn(5, 8)
    with torch.autocast("cpu", BF16):
        net(x).float().sum().backward()
    want = 2 * net.weight.grad.clone()
    with opt.bf16_weights(net), torch.autocast("cpu", BF16):
        net(x).float().sum().backward()
    opt.step()
    assert torch.equal(net.weight.grad, want) and opt.shadows.leaf_of(net.weight).grad is None


def test_it_is_the_fused_kernels_that_write_them() -> None:
    net = nn.Linear(8, 4)
    opt = AdamWEMA(net.named_parameters(), implementation="eager")
    with pytest.raises(InputError, match="AdamWEMA: bf16_weights needs the fused kernels"), opt.bf16_weights(net):
        pass
    step = make_step(autocast_dtype=BF16)
    step.optimizer = AdamWEMA(step.network.named_parameters(), implementation="eager")
    step([make_batch()])
    assert step.optimizer.shadows is None


def test_float32_and_several_microbatches_go_without() -> None:
    step = make_step()
    step([make_batch()])
    assert step.optimizer.shadows is None
    step = make_step(autocast_dtype=BF16)
    step_on_float32(step)
    assert step.optimizer.shadows is None
