"""AdamWEMA against AdamW + clip_grad_norm_ + an EMA loop in PyTorch's ways, apex, and a copy of as many bytes.

    pytest benchmarks/bench_adamw_ema.py [--bench-device cuda] [--bench-json FILE] [--bench-slow]

One step over the parameters of a registry model: 40 bytes an element (gradient read twice, weight, both moments and the
average read and written). --bench-slow adds the loop under `torch.compile`, which takes two minutes to compile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from lib.op_bench import OpCase

from sra2_fast import SiT, backends
from sra2_fast.models import model_sizes
from sra2_fast.optim import AdamWEMA
from sra2_fast.reference import adamw_ema as reference

MODELS = {"cpu": "SiT-S/2", "cuda": "SiT-XL/2", "small": "64,2,2,8"}
BYTES_AN_ELEMENT = 40
LR, DECAY, MAX_NORM = 1e-4, 0.9999, 1.0
CHECKED = 3  # parameters whose step is compared with the reference


def public_loop(params: list[torch.nn.Parameter], **options: bool) -> Callable[[], None]:
    """The step of the public repositories, with AdamW's options."""
    opt = torch.optim.AdamW(params, lr=LR, weight_decay=0.0, **options)
    emas = [p.detach().clone() for p in params]

    @torch.no_grad()
    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        opt.step()
        for ema, p in zip(emas, params, strict=True):
            ema.mul_(DECAY).add_(p, alpha=1 - DECAY)

    return step


def test_adamw_ema(compare, bench_device, bench_size, request):
    torch.manual_seed(0)
    with torch.device("meta"):
        model = SiT(**model_sizes(MODELS[bench_size]), learn_sigma=False)
    shapes = [p.shape for p in model.parameters()]
    elements = sum(s.numel() for s in shapes)

    def make() -> list[torch.nn.Parameter]:
        params = [torch.nn.Parameter(torch.randn(s, device=bench_device)) for s in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        return params

    ours = make()
    opt = AdamWEMA(ours, lr=LR, ema_decay=DECAY, max_grad_norm=MAX_NORM)
    variants = {
        "fused": opt.step,
        "eager": public_loop(make(), foreach=True),
        "adamw-fused": public_loop(make(), fused=True),
    }
    if request.config.getoption("--bench-slow"):
        variants["compile"] = torch.compile(public_loop(make()))
    if bench_device.type == "cuda" and backends.has_apex():
        variants["apex"] = AdamWEMA(make(), lr=LR, ema_decay=DECAY, implementation="apex").step

    def check() -> None:
        norm = reference.global_norm([p.grad.double() for p in ours])
        settings = {"lr": LR, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "ema_decay": DECAY}
        want = []
        for p in ours[:CHECKED]:
            state = opt.state[p] or {"exp_avg": p * 0, "exp_avg_sq": p * 0, "ema": p, "step": 0}
            before = [x.detach().double() for x in (p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["ema"])]
            step = int(state["step"]) + 1
            want.append(reference.adamw_ema(*before, step, norm=norm, max_grad_norm=MAX_NORM, **settings))
        opt.step()
        for p, true in zip(ours, want, strict=False):
            for got, one in zip((p, *[opt.state[p][n] for n in ("exp_avg", "exp_avg_sq", "ema")]), true, strict=True):
                assert float((got.double() - one).norm() / one.norm()) < 8 * 2.0**-24

    moved = BYTES_AN_ELEMENT * elements
    case = OpCase("adamw_ema", (elements,), torch.float32, "step", moved, extra={"tensors": len(shapes)})
    compare(case, variants, check=check)
