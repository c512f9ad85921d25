"""AdamWEMA's state as other tools ask for it: torch.distributed.checkpoint, public optimizers, saved averages."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from sra2_fast.errors import InputError
from sra2_fast.optim import AdamWEMA


@pytest.mark.parametrize("implementation", ["fused", "eager"])
def test_the_step_by_which_torch_makes_a_fresh_state_counts_nothing(implementation: str) -> None:
    """torch.distributed.checkpoint asks for state by a step of rate 0 on zero gradients: it would be update one."""
    model = torch.nn.Linear(3, 2)
    opt = AdamWEMA(model.named_parameters(), lr=0.1, implementation=implementation)
    before = [p.detach().clone() for p in model.parameters()]
    named = get_optimizer_state_dict(model, opt)
    assert sorted(named["state"]) == ["bias", "weight"] and named["param_groups"][0]["lr"] == 0.1
    assert all(float(entry["step"]) == 0 for entry in named["state"].values()) and not opt.skipped_steps
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    twin = torch.nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    other = AdamWEMA(twin.named_parameters(), lr=0.1, implementation=implementation)
    for one, its in ((model, opt), (twin, other)):
        one(torch.ones(4, 3)).sum().backward()
        its.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(float(opt.state[p]["step"]) == 1 for p in model.parameters())


def test_a_rate_of_zero_on_real_gradients_is_a_step() -> None:
    """A warm-up that begins at 0 moves the moments, as torch's AdamW does."""
    weight = torch.nn.Parameter(torch.ones(3))
    opt = AdamWEMA([weight], lr=0.0, max_grad_norm=None)
    weight.grad = torch.full((3,), 2.0)
    opt.step()
    assert float(opt.state[weight]["step"]) == 1 and torch.equal(weight.detach(), torch.ones(3))
    torch.testing.assert_close(opt.state[weight]["exp_avg"], torch.full((3,), 0.2))


def trained(implementation: str = "fused") -> tuple[torch.nn.Module, AdamWEMA]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    model[1].bias.requires_grad_(False)
    opt = AdamWEMA(model.named_parameters(), lr=0.1, ema_decay=0.5, implementation=implementation)
    for _ in range(3):
        model(torch.randn(4, 3)).sum().backward()
        opt.step()
        opt.zero_grad()
    return model, opt


@pytest.mark.parametrize("implementation", ["fused", "eager"])
def test_a_public_optimizer_state_and_its_average_go_on_where_they_were(implementation: str) -> None:
    """A state of torch's AdamW has no averages: they restarted at the raw weights without a word."""
    model, opt = trained(implementation)
    averages = {name: value.clone() for name, value in opt.ema_state_dict().items()}
    packed = opt.state_dict()
    for entry in packed["state"].values():
        entry.pop("ema")
    other = AdamWEMA(model.named_parameters(), lr=0.1, ema_decay=0.5, implementation=implementation)
    with pytest.warns(UserWarning, match="the loaded state has no averages; they start at the weights as they are now"):
        other.load_state_dict(packed)
    other.load_ema_state_dict(averages)
    for name, value in other.ema_state_dict().items():
        assert torch.equal(value, averages[name])
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    start = [p.detach().clone() for p in model.parameters()]
    other.step()
    for (name, p), before in zip(model.named_parameters(), start, strict=True):
        if p.requires_grad:
            assert not torch.equal(p, before)
            torch.testing.assert_close(other.ema_state_dict()[name], 0.5 * averages[name] + 0.5 * p.detach())


@pytest.mark.filterwarnings("error")
def test_a_state_with_averages_or_none_kept_warns_of_nothing() -> None:
    model, opt = trained()
    AdamWEMA(model.named_parameters(), ema_decay=0.5).load_state_dict(opt.state_dict())
    packed = opt.state_dict()
    packed["param_groups"][0].pop("ema_decay")
    for entry in packed["state"].values():
        entry.pop("ema")
    AdamWEMA(model.named_parameters(), ema_decay=None).load_state_dict(packed)


def test_averages_that_do_not_fit_are_named() -> None:
    _, opt = trained()
    averages = dict(opt.ema_state_dict())
    with pytest.raises(InputError, match=r"the average of 0.weight must be \(2, 3\), got \(3,\)"):
        opt.load_ema_state_dict({**averages, "0.weight": torch.zeros(3)})
    with pytest.raises(InputError, match=r"averages must be by the parameters' names .*as 0.weight, got 2.weight"):
        opt.load_ema_state_dict({**averages, "2.weight": torch.zeros(1)})
    averages.pop("1.weight")
    with pytest.raises(InputError, match=r"the average of 1.weight must be \(1, 2\), got none"):
        opt.load_ema_state_dict(averages)
    averages = dict(opt.ema_state_dict())
    averages.pop("1.bias")  # frozen: it stands for itself
    opt.load_ema_state_dict(averages)


@pytest.mark.parametrize("implementation", ["fused", "eager"])
def test_a_state_that_was_cleared_or_replaced_is_the_state_of_the_next_step(implementation: str) -> None:
    """The tensors gathered at an earlier step went on being updated; the new ones stood still beside them."""
    model, opt = trained(implementation)
    opt.state.clear()
    fresh = AdamWEMA(model.named_parameters(), lr=0.1, ema_decay=0.5, implementation=implementation)
    weights = [p.detach().clone() for p in model.parameters()]
    results = []
    for one in (opt, fresh):
        for p, weight in zip(model.parameters(), weights, strict=True):
            p.data.copy_(weight)
            p.grad = torch.ones_like(p) if p.requires_grad else None
        one.step()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    for p in model.parameters():
        assert opt.state.get(p, {}).keys() == fresh.state.get(p, {}).keys()
        assert all(torch.equal(value, fresh.state[p][key]) for key, value in opt.state.get(p, {}).items())
    weight = model[0].weight
    for key, value in (("exp_avg", torch.full_like(weight, 3.0)), ("ema", torch.zeros_like(weight))):
        opt.state[weight][key] = value
    opt.state[weight]["step"] = torch.tensor(6.0)
    opt.step()
    assert float(opt.state[weight]["step"]) == 7.0
    clipped = weight.grad / opt.grad_norm if implementation == "fused" else weight.grad  # eager clips in place
    torch.testing.assert_close(opt.state[weight]["exp_avg"], 0.9 * torch.full_like(weight, 3.0) + 0.1 * clipped)
    torch.testing.assert_close(opt.state[weight]["ema"], 0.5 * weight.detach())
