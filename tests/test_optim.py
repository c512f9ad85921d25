"""AdamWEMA as an optimizer: state, groups, schedulers, names, averages, refusals. The arithmetic is test_adamw_ema's."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sra2_fast.errors import InputError
from sra2_fast.optim import AdamWEMA

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
    state = {k: v for k, v in theirs.state_dict().items()}
    for entry in state["state"].values():
        entry.pop("ema", None)
    opt = AdamWEMA(model.named_parameters())
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


def parameter(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros(4, dtype=dtype))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite float, 0 or more, got -1.0"),
        ({"lr": torch.tensor(0.1)}, "lr must be a finite float, 0 or more"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"eps": -1e-8}, "eps must be a finite number, 0 or more, got -1e-08"),
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number, 0 or more, got nan"),
        ({"ema_decay": 1.5}, r"ema_decay must be in \[0, 1\], or None, got 1.5"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a number above 0, or None, got 0.0"),
        ({"implementation": "quick"}, "implementation must be one of fused, eager.*, got 'quick'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=f"AdamWEMA: {message}"):
        AdamWEMA([parameter()], **settings)


def test_parameters_it_cannot_take_are_refused() -> None:
    with pytest.raises(
        TypeError, match='parameter 0 must be float32 .implementation="eager" also takes.*got torch.bfl'
    ):
        AdamWEMA([parameter(torch.bfloat16)])
    for dtype in (torch.float16, torch.complex64):
        with pytest.raises(TypeError, match="parameter w must be float32, bfloat16 or float64, got torch"):
            AdamWEMA([("w", parameter(dtype))], implementation="eager")
    with pytest.raises(InputError, match="parameter 1 must be on cpu as the first one, got meta"):
        AdamWEMA([parameter(), nn.Parameter(torch.zeros(3, device="meta"))])
    with pytest.raises(InputError, match="parameter 0 must be dense in memory, got strides"):
        AdamWEMA([nn.Parameter(torch.zeros(4, 4)[:, ::2])])
    opt = AdamWEMA([parameter()])
    with pytest.raises(InputError, match="lr must be"):
        opt.add_param_group({"params": [parameter()], "lr": -1.0})
    assert len(opt.param_groups) == 1
    opt.param_groups[0]["lr"] = torch.tensor(0.1)
    opt.param_groups[0]["params"][0].grad = torch.ones(4)
    with pytest.raises(InputError, match="lr must be a float, got Tensor"):
        opt.step()


def test_sparse_gradient_is_refused_by_name() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    opt = AdamWEMA(table.named_parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(
        InputError, match=r"the gradient of weight must be dense \(embeddings: sparse=False\), got a spa"
    ):
        opt.step()


def test_states_of_other_optimizers_are_refused() -> None:
    def state_of(cls: type[torch.optim.Optimizer], **options: bool) -> dict:
        return cls([parameter()], **options).state_dict()

    opt = AdamWEMA([parameter()])
    with pytest.raises(InputError, match="amsgrad of the loaded state must be False, got True"):
        opt.load_state_dict(state_of(torch.optim.AdamW, amsgrad=True))
    with pytest.raises(InputError, match="maximize of the loaded state must be False, got True"):
        opt.load_state_dict(state_of(torch.optim.AdamW, maximize=True))
    with pytest.raises(InputError, match="the loaded state must be of AdamW, got Adam's"):
        opt.load_state_dict(state_of(torch.optim.Adam))
    with pytest.raises(ValueError, match="different number of parameter groups"):
        opt.load_state_dict(AdamWEMA([{"params": [parameter()]}, {"params": [parameter()]}]).state_dict())


def test_averages_that_are_not_kept_are_refused() -> None:
    model = make_model()
    opt = AdamWEMA(model.parameters(), ema_decay=None)
    train(model, opt, 0, 1)
    assert "ema" not in opt.state[model[0].weight]
    with pytest.raises(InputError, match="ema_decay must be a float for ema_state_dict, got None"):
        opt.ema_state_dict()
    with pytest.raises(InputError, match="ema_decay must be a float for swap_ema, got None"), opt.swap_ema(model):
        pass
