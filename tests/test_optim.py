"""AdamWEMA as an optimizer: state, groups, schedulers, names, averages. The arithmetic is test_adamw_ema's."""

from __future__ import annotations

import copy
import io
import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sra2_fast.errors import InputError
from sra2_fast.optim import AdamWEMA
from sra2_fast.reference import adamw_ema as reference

IMPLEMENTATIONS = ("eager", "fused")


def make_model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3))
    model[2].bias.requires_grad_(False)
    return model


def train(model: nn.Module, opt: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        opt.zero_grad()
        (model(x).square().mean() * 100).backward()
        opt.step()


def through_disk(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_twenty_plus_twenty_steps_are_forty(implementation: str) -> None:
    whole = make_model()
    start = copy.deepcopy(whole.state_dict())
    opt = AdamWEMA(whole.named_parameters(), lr=1e-2, ema_decay=0.9, implementation=implementation)
    train(whole, opt, 0, 40)

    first = make_model()
    first.load_state_dict(start)
    opt_first = AdamWEMA(first.named_parameters(), lr=1e-2, ema_decay=0.9, implementation=implementation)
    train(first, opt_first, 0, 20)
    second = make_model()
    second.load_state_dict(first.state_dict())
    opt_second = AdamWEMA(second.named_parameters(), lr=1.0, ema_decay=0.5, implementation=implementation)
    opt_second.load_state_dict(through_disk(opt_first.state_dict()))
    train(second, opt_second, 20, 40)
    assert same(whole.state_dict(), second.state_dict())
    assert same(opt.ema_state_dict(), opt_second.ema_state_dict())
    assert not same(whole.state_dict(), start)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_state_goes_to_torch_and_back(implementation: str) -> None:
    model = make_model()
    opt = AdamWEMA(model.parameters(), lr=1e-2, weight_decay=0.1, max_grad_norm=None, implementation=implementation)
    train(model, opt, 0, 5)
    theirs_model = copy.deepcopy(model)
    theirs = torch.optim.AdamW(theirs_model.parameters(), lr=1.0)
    theirs.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(model, opt, 5, 10)
    train(theirs_model, theirs, 5, 10)
    for a, b in zip(model.parameters(), theirs_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    back_model = copy.deepcopy(theirs_model)
    back = AdamWEMA(back_model.parameters(), lr=1.0, max_grad_norm=None, implementation=implementation)
    back.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert back.param_groups[0]["lr"] == 1e-2
    assert all(float(s["step"]) == 10 for s in back.state.values())
    assert set(back.param_groups[0]) == {"params", "lr", "betas", "eps", "weight_decay", "ema_decay"}
    train(theirs_model, theirs, 10, 15)
    train(back_model, back, 10, 15)
    for a, b in zip(back_model.parameters(), theirs_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_average_starts_at_the_weights_of_a_loaded_adamw() -> None:
    model = make_model()
    theirs = torch.optim.AdamW(model.parameters())
    train(model, theirs, 0, 3)
    state = theirs.state_dict()
    for entry in state["state"].values():
        entry.pop("ema", None)
    opt = AdamWEMA(model.named_parameters())
    with pytest.warns(UserWarning, match="the loaded state has no averages"):
        opt.load_state_dict(state)
    assert same(opt.ema_state_dict(), dict(model.state_dict()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(implementation: str, bad: float) -> None:
    model = make_model()
    opt = AdamWEMA(model.named_parameters(), lr=1e-2, ema_decay=0.9, implementation=implementation)
    train(model, opt, 0, 3)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    averages = copy.deepcopy(opt.ema_state_dict())
    model[0].weight.grad[0, 0] = bad
    opt.step()
    assert same(model.state_dict(), weights) and same(opt.ema_state_dict(), averages)
    for index, entry in opt.state_dict()["state"].items():
        assert same(entry, state["state"][index])
    assert int(opt.skipped_steps) == 1 and not torch.isfinite(opt.grad_norm)
    train(model, opt, 3, 4)
    assert int(opt.skipped_steps) == 1 and torch.isfinite(opt.grad_norm)
    assert not same(model.state_dict(), weights)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_groups_scheduler_and_decay_warm_up(implementation: str) -> None:
    model = make_model()
    groups = [
        {"params": list(model[0].named_parameters(prefix="0")), "lr": 1e-2, "weight_decay": 0.5},
        {"params": list(model[2].named_parameters(prefix="2")), "lr": 0.0, "ema_decay": None},
    ]
    opt = AdamWEMA(groups, ema_decay=0.0, implementation=implementation)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0 if step < 2 else 0.0)
    still = model[2].weight.detach().clone()
    for step in range(2):
        train(model, opt, step, step + 1)
        schedule.step()
        assert torch.equal(opt.ema_state_dict()["0.weight"], model[0].weight)  # decay 0: the average is the weight
    assert torch.equal(model[2].weight, still)
    before = model[0].weight.detach().clone()
    opt.param_groups[0]["ema_decay"] = 1.0
    train(model, opt, 2, 3)  # the rate is zero now, and the average stands still
    assert torch.equal(model[0].weight, before)
    assert set(opt.ema_state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    opt.param_groups[1]["ema_decay"] = 0.5  # averaging may begin later
    opt.param_groups[1]["lr"] = 1e-2
    train(model, opt, 3, 4)
    moved = opt.ema_state_dict()["2.weight"]
    torch.testing.assert_close(moved, (still + model[2].weight) / 2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_parameter_without_gradient_keeps_its_moments_and_is_still_averaged(implementation: str) -> None:
    a, b = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
    opt = AdamWEMA([a, b], lr=0.1, ema_decay=0.5, implementation=implementation)
    a.grad, b.grad = torch.randn(6), torch.randn(6)
    opt.step()
    weight, average = b.detach().clone(), opt.ema_state_dict()["1"].clone()
    assert not torch.equal(weight, average)
    b.grad = None
    opt.step()
    assert torch.equal(b, weight)
    assert float(opt.state[b]["step"]) == 1 and float(opt.state[a]["step"]) == 2
    torch.testing.assert_close(opt.ema_state_dict()["1"], (weight + average) / 2)
    a.grad[0] = float("inf")
    kept = opt.ema_state_dict()["1"].clone()
    opt.step()
    assert torch.equal(opt.ema_state_dict()["1"], kept)
    b.grad = torch.randn(6)
    a.grad = torch.randn(6)
    opt.step()
    assert float(opt.state[b]["step"]) == 2 and float(opt.state[a]["step"]) == 3


def test_step_without_any_gradient_does_nothing_and_returns_the_closure() -> None:
    model = make_model()
    opt = AdamWEMA(model.parameters())
    assert opt.step() is None and not opt.state
    assert opt.step(lambda: 3.0) == 3.0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_frozen_and_never_used_parameters_stand_in_the_average(implementation: str) -> None:
    model = make_model()
    opt = AdamWEMA(model.named_parameters(), implementation=implementation)
    averages = opt.ema_state_dict()
    assert same(averages, dict(model.state_dict()))
    assert averages["0.weight"].data_ptr() != model[0].weight.data_ptr()  # a copy from the start, also before a step
    assert averages["2.bias"].data_ptr() == model[2].bias.data_ptr()
    train(model, opt, 0, 1)
    assert averages["0.weight"].data_ptr() == opt.ema_state_dict()["0.weight"].data_ptr()  # live
    assert not torch.equal(averages["0.weight"], model[0].weight)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_swap_ema_exchanges_in_place_and_always_restores(implementation: str) -> None:
    model = make_model()
    opt = AdamWEMA(model.named_parameters(), lr=1e-2, ema_decay=0.9, implementation=implementation)
    train(model, opt, 0, 3)
    weights, averages = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.ema_state_dict())
    addresses = [p.data_ptr() for p in model.parameters()]
    with opt.swap_ema(model):
        assert same(model.state_dict(), averages)
        assert [p.data_ptr() for p in model.parameters()] == addresses
        refused: list[tuple[str, Callable[[], object]]] = [
            (r"step\(\)", opt.step),
            ("state_dict", opt.state_dict),
            ("ema_state_dict", opt.ema_state_dict),
            ("swap_ema", lambda: opt.swap_ema(model).__enter__()),
        ]
        for what, call in refused:
            with pytest.raises(
                InputError, match=rf"AdamWEMA: {what} must be called outside swap_ema, got a call inside"
            ):
                call()
    assert same(model.state_dict(), weights) and same(opt.ema_state_dict(), averages)
    with pytest.raises(RuntimeError, match="evaluation failed"), opt.swap_ema(model):
        raise RuntimeError("evaluation failed")
    assert same(model.state_dict(), weights) and same(opt.ema_state_dict(), averages)
    with (
        pytest.raises(
            InputError, match="AdamWEMA: model must be the module whose parameters are optimized, got Linear"
        ),
        opt.swap_ema(nn.Linear(2, 2)),
    ):
        pass


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_memory_order_of_weights_gradients_and_loaded_state_may_differ(implementation: str) -> None:
    plain = nn.Parameter(torch.randn(4, 3, 2, 2))
    last = nn.Parameter(plain.detach().clone(memory_format=torch.channels_last))
    opts = [AdamWEMA([p], lr=0.1, ema_decay=0.5, implementation=implementation) for p in (plain, last)]
    for step in range(4):
        grad = torch.randn(4, 3, 2, 2)
        plain.grad = grad.clone(memory_format=torch.channels_last)
        last.grad = grad.clone() if step % 2 else grad.clone(memory_format=torch.channels_last)
        for opt in opts:
            opt.step()
    opts[1].load_state_dict(copy.deepcopy(opts[0].state_dict()))
    plain.grad, last.grad = grad, grad.clone()
    for opt in opts:
        opt.step()
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain.detach(), last.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(opts[0].ema_state_dict()["0"], opts[1].ema_state_dict()["0"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_eager_takes_other_types(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.ones(5, dtype=dtype))
    opt = AdamWEMA([p], lr=0.25, ema_decay=0.5, implementation="eager")
    p.grad = torch.ones(5, dtype=dtype)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full((5,), 0.75, dtype=dtype))
    torch.testing.assert_close(opt.ema_state_dict()["0"], torch.full((5,), 0.875, dtype=dtype))


def test_apex_is_called_as_its_kernel_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in of the kernel's argument list (apex/optimizers/fused_adam.py, capturable): apex needs a GPU."""

    def adam(chunk, noop, lists, lr, beta1, beta2, eps, step, mode, bias_correction, weight_decay, inv_scale):
        assert mode == bias_correction == 1 and step.dtype == noop.dtype == torch.int32
        if int(noop):
            return
        for grad, *rest in zip(*lists, strict=True):
            p, m, s = rest
            settings = {"lr": float(lr), "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
            no_more = {"norm": inv_scale.new_ones(()), "ema_decay": None, "max_grad_norm": None}
            new = reference.adamw_ema(p, grad * inv_scale, m, s, None, int(step), **settings, **no_more)
            for old, value in zip(rest, new[:3], strict=True):
                old.copy_(value)

    amp = types.SimpleNamespace(multi_tensor_adam_capturable=adam)
    apply = types.SimpleNamespace(multi_tensor_applier=lambda f, noop, lists, *rest: f(65536, noop, lists, *rest))
    monkeypatch.setitem(sys.modules, "amp_C", amp)
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.multi_tensor_apply", apply)
    models = [make_model()]
    models.append(copy.deepcopy(models[0]))
    settings = {"lr": 1e-2, "weight_decay": 0.1, "ema_decay": 0.9}
    opts = [AdamWEMA(m.named_parameters(), **settings, implementation="eager") for m in models]
    opts[1].implementation = "apex"  # past the refusal of a CPU
    for opt, model in zip(opts, models, strict=True):
        train(model, opt, 0, 6)
        model[0].weight.grad[0, 0] = float("nan")
        opt.step()
        assert int(opt.skipped_steps) == 1
    for one, other in zip(*[opt.ema_state_dict().values() for opt in opts], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert [float(s["step"]) for s in opts[1].state.values()] == [6.0] * 3


def test_copy_and_pickle_keep_everything() -> None:
    p = nn.Parameter(torch.randn(5))
    opt = AdamWEMA([p], lr=0.1, ema_decay=0.5, max_grad_norm=2.0, implementation="eager")
    p.grad = torch.randn(5)
    opt.step()
    twin = copy.deepcopy(opt)
    q = twin.param_groups[0]["params"][0]
    q.grad, p.grad = torch.ones(5), torch.ones(5)
    opt.step()
    twin.step()
    assert torch.equal(p, q) and twin.max_grad_norm == 2.0 and twin.implementation == "eager"
    assert torch.equal(opt.ema_state_dict()["0"], twin.ema_state_dict()["0"])
