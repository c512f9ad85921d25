"""Numbers of kernels/adamw_ema.py, interpreted. Run by test_triton.py in a process of its own."""

from __future__ import annotations

from types import SimpleNamespace

import bf16_interpreter
import pytest
import torch
from guards import between_nans, guarded_allocations
from sra2_fast.kernels import adamw_ema as kernels
from sra2_fast.kernels import tensor_table
from tolerance import assert_close

from sra2_fast.reference import adamw_ema as reference

bf16_interpreter.install()

F32 = torch.float32
SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "ema_decay": 0.99}
SHAPES = [(7,), (64, 64), (1,), (4096,), (3, 1367), (0,), (2, 4096, 1)]
NAMES = ("params", "grads", "exp_avgs", "exp_avg_sqs", "emas")
# The quotient of two moments, each of three roundings and a power's series, times the step size.
ROUNDINGS = 16


def state() -> dict[str, list[torch.Tensor]]:
    """Random tensors of all shapes; the second moment is a square, larger than nothing."""
    draws = {name: [between_nans(torch.randn(shape)) for shape in SHAPES] for name in NAMES}
    for tensor in draws["exp_avg_sqs"]:
        tensor.square_().add_(0.01)
    return draws


def apply(tensors: dict[str, list[torch.Tensor]], steps: torch.Tensor, norm: torch.Tensor, clip: float | None) -> None:
    lists = [tensors[name] for name in NAMES]
    kernels.adamw_ema_step(*lists, None, steps, norm, None, SimpleNamespace(max_grad_norm=clip, **SETTINGS))


@pytest.mark.parametrize("clip", [None, 1.0, 1e9])
@pytest.mark.parametrize("first_step", [1, 2, 700, 100_000])
def test_one_step(first_step: int, clip: float | None) -> None:
    tensors = state()
    before = {name: [tensor.double() for tensor in tensors[name]] for name in NAMES}
    steps = torch.arange(first_step, first_step + len(SHAPES), dtype=F32)
    with guarded_allocations():
        norm = kernels.global_norm(tensors["grads"])
    want_norm = reference.global_norm(before["grads"])
    assert_close(norm, want_norm, F32, 2, sum(g.numel() for g in tensors["grads"]), name="norm")
    apply(tensors, steps, norm, clip)
    for index in range(len(SHAPES)):
        old = [before[name][index] for name in NAMES]
        want = reference.adamw_ema(*old, int(steps[index]), norm=norm.double(), max_grad_norm=clip, **SETTINGS)
        wanted = dict(zip(("params", "exp_avgs", "exp_avg_sqs", "emas"), want, strict=True))
        for name, value in wanted.items():
            moved = (value - before[name][index]).abs()
            # What moved, and the rounding of what it was added to.
            terms = moved + before[name][index].abs()
            assert_close(tensors[name][index], value, F32, ROUNDINGS, 0, terms, name=f"{name}[{index}]")
        assert torch.equal(tensors["grads"][index].double(), before["grads"][index])


def test_the_step_itself_is_right_where_the_weights_are_zero() -> None:
    """From zero weights and moments the new weight is the step alone: no weight for an error in it to hide behind."""
    grad = torch.randn(5000)
    zeros = {name: [torch.zeros(5000)] for name in NAMES} | {"grads": [grad]}
    apply(zeros, torch.ones(1), torch.ones(()), None)
    assert_close(zeros["params"][0], -SETTINGS["lr"] * grad.double() / (grad.double().abs() + 1e-8), F32, ROUNDINGS)


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    tensors = state()
    tensors["grads"][4][1, 3] = bad
    before = {name: [tensor.clone() for tensor in tensors[name]] for name in NAMES}
    norm = kernels.global_norm(tensors["grads"])
    assert not torch.isfinite(norm)
    apply(tensors, torch.ones(len(SHAPES)), norm, 1.0)
    for name in NAMES:
        for old, new in zip(before[name], tensors[name], strict=True):
            assert torch.equal(old.nan_to_num(3.0), new.nan_to_num(3.0))


@pytest.mark.parametrize("no_emas", [None, []])
def test_no_moving_average(no_emas: list[torch.Tensor] | None) -> None:
    with_average, without = state(), None
    without = {name: [tensor.clone() for tensor in with_average[name]] for name in NAMES}
    norm, steps = kernels.global_norm(with_average["grads"]), torch.ones(len(SHAPES))
    apply(with_average, steps, norm, 1.0)
    kept = [tensor.clone() for tensor in without["emas"]]
    lists = [without[name] for name in NAMES[:4]]
    kernels.adamw_ema_step(*lists, no_emas, None, steps, norm, None, SimpleNamespace(max_grad_norm=1.0, **SETTINGS))
    for name in NAMES[:4]:
        assert all(torch.equal(a, b) for a, b in zip(with_average[name], without[name], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, without["emas"], strict=True))


def test_nothing_to_do() -> None:
    norm = kernels.global_norm([torch.empty(0)])
    assert norm == 0.0
    settings = SimpleNamespace(max_grad_norm=1.0, **SETTINGS)
    kernels.adamw_ema_step([], [], [], [], [], [], torch.empty(0), norm, None, settings)


@pytest.mark.parametrize("has_average", [True, False])
def test_bf16_gradients_and_shadows_are_the_float32_step_on_the_rounded_gradient(has_average: bool) -> None:
    full, settings = state(), SimpleNamespace(max_grad_norm=1.0, **SETTINGS)
    low_grads = [between_nans(grad.bfloat16()) for grad in full["grads"]]
    full["grads"] = [grad.float() for grad in low_grads]
    low = {name: [tensor.clone() for tensor in full[name]] for name in NAMES}
    shadows = [between_nans(torch.zeros(shape).bfloat16()) for shape in SHAPES]
    norm, steps = kernels.global_norm(low_grads), torch.ones(len(SHAPES))
    assert_close(norm, reference.global_norm([g.double() for g in low_grads]), F32, 2, 20000)
    for tensors, grads, copies in ((full, full["grads"], None), (low, low_grads, shadows)):
        lists = [tensors["params"], grads, *(tensors[name] for name in NAMES[2:])]
        lists[-1] = lists[-1] if has_average else []
        kernels.adamw_ema_step(*lists, copies, steps, norm, None, settings)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "emas"):
        assert all(torch.equal(a, b) for a, b in zip(full[name], low[name], strict=True))
    assert all(torch.equal(s, p.bfloat16()) for s, p in zip(shadows, low["params"], strict=True))
    mixed = [a if i % 2 else b for i, (a, b) in enumerate(zip(full["grads"], low_grads, strict=True))]
    assert_close(kernels.global_norm(mixed), norm.double(), F32, 4, 20000)


def test_rates_on_the_device_are_the_same_step() -> None:
    numbers, tensor = state(), None
    tensor = {name: [one.clone() for one in numbers[name]] for name in NAMES}
    norm, steps = kernels.global_norm(numbers["grads"]), torch.ones(len(SHAPES))
    settings = {**SETTINGS, "ema_decay": 0.9999, "max_grad_norm": 1.0}
    rates = torch.tensor([settings["lr"], settings["ema_decay"]], dtype=torch.float64)
    absent = {**settings, "lr": 0.0, "ema_decay": 1.0}
    for tensors, where, given in ((numbers, None, settings), (tensor, rates, absent)):
        lists = [tensors[name] for name in NAMES]
        kernels.adamw_ema_step(*lists, None, steps, norm, where, SimpleNamespace(**given))
    for name in NAMES:
        assert all(torch.equal(a, b) for a, b in zip(numbers[name], tensor[name], strict=True))


def test_addresses_that_moved_are_looked_up_again() -> None:
    """The tables are kept by address: a gradient in new memory must not be read from the old."""
    first, second = torch.full((10,), 3.0), torch.full((10,), 4.0)
    assert kernels.global_norm([first]) == pytest.approx(3 * 10**0.5)
    assert kernels.global_norm([second]) == pytest.approx(4 * 10**0.5)
    first.fill_(5.0)
    assert kernels.global_norm([first]) == pytest.approx(5 * 10**0.5)


def test_few_tables_are_kept() -> None:
    held = [torch.randn(8) for _ in range(tensor_table.KEPT_TABLES + 5)]
    for tensor in held:
        tensor_table.address_table([[tensor]])
    assert len(tensor_table._address_tables) <= tensor_table.KEPT_TABLES


def test_misaligned_addresses_are_seen() -> None:
    buffer = torch.randn(64)
    assert tensor_table.address_table([[buffer[:8], buffer[4:8]]]).is_aligned == (buffer.data_ptr() % 16 == 0)
    assert not tensor_table.address_table([[buffer[0:4], buffer[1:5]]]).is_aligned
    assert kernels.global_norm([buffer[1:5]]) == pytest.approx(buffer[1:5].norm().item(), rel=1e-6)


def test_equal_runs_are_bitwise_equal() -> None:
    grads = [torch.randn(3 * tensor_table.CHUNK + 17), torch.randn(900)]
    assert torch.equal(kernels.global_norm(grads), kernels.global_norm(grads))
