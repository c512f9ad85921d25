"""What AdamWEMA refuses, and in which words."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from test_optim import make_model, train
from torch import nn

from sra2_fast import backends
from sra2_fast.errors import InputError
from sra2_fast.optim import AdamWEMA


def parameter(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros(4, dtype=dtype))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite float, 0 or more, got -1.0"),
        ({"lr": torch.tensor([0.1])}, r"lr must be a float, or a 0-d floating tensor, got torch.float32 \(1,\)"),
        ({"ema_decay": torch.tensor(1)}, r"ema_decay must be a float, or a 0-d floating tensor, got torch.int64 \(\)"),
        ({"lr": "fast"}, "lr must be a float, or a 0-d floating tensor, got str"),
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
        TypeError, match=r'parameter 0 must be float32 \(implementation="eager" also takes.*got torch.bfloat16'
    ):
        AdamWEMA([parameter(torch.bfloat16)])
    for dtype in (torch.float16, torch.complex64):
        with pytest.raises(TypeError, match="parameter w must be float32, bfloat16 or float64, got torch"):
            AdamWEMA([("w", parameter(dtype))], implementation="eager")
    with pytest.raises(InputError, match="parameter 1 must be on cpu as the first one, got meta"):
        AdamWEMA([parameter(), nn.Parameter(torch.zeros(3, device="meta"))])
    with pytest.raises(InputError, match="parameter 0 must be dense in memory, got strides"):
        AdamWEMA([nn.Parameter(torch.zeros(4, 4)[:, ::2])])
    sharded = parameter()
    sharded.to_local = lambda: sharded  # what makes a DTensor of it here
    with pytest.raises(
        TypeError, match=r"parameter 0 must be a plain tensor \(what FSDP2 shards is for torch.optim.Adam"
    ):
        AdamWEMA([sharded])
    opt = AdamWEMA([parameter()])
    with pytest.raises(InputError, match="lr must be"):
        opt.add_param_group({"params": [parameter()], "lr": -1.0})
    assert len(opt.param_groups) == 1
    opt.param_groups[0]["lr"] = "fast"
    opt.param_groups[0]["params"][0].grad = torch.ones(4)
    with pytest.raises(InputError, match="lr must be a float, or a 0-d floating tensor, got str"):
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


def test_apex_is_refused_clearly_where_it_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = 'AdamWEMA: implementation="apex" needs NVIDIA apex with its CUDA kernels: '
    monkeypatch.setattr(backends, "has_apex", lambda: False)
    with pytest.raises(InputError, match=f"{needs}apex.optimizers does not import .PyPI's apex is another package"):
        AdamWEMA([parameter()], implementation="apex")
    monkeypatch.setattr(backends, "has_apex", lambda: True)
    monkeypatch.setitem(sys.modules, "amp_C", None)
    with pytest.raises(InputError, match=f"{needs}its CUDA extension does not import"):
        AdamWEMA([parameter()], implementation="apex")
    monkeypatch.setitem(sys.modules, "amp_C", types.ModuleType("amp_C"))
    with pytest.raises(InputError, match=f"{needs}it is older than its capturable FusedAdam"):
        AdamWEMA([parameter()], implementation="apex")
    amp = types.SimpleNamespace(multi_tensor_adam_capturable=None)
    monkeypatch.setitem(sys.modules, "amp_C", amp)
    with pytest.raises(InputError, match='parameter 0 must be on cuda for implementation="apex", got cpu'):
        AdamWEMA([parameter()], implementation="apex")
