"""The arithmetic of AdamWEMA: the reference against torch's AdamW, the kernels against the reference in float64.

A parameter that took k steps has been rounded a few times at each of them: the moments twice, the weight three times
(update, decay, sum), the average three times. Besides, the constants (1 - lr weight_decay, beta2, ..) are rounded once,
in the same direction at every step, so that adds up: k^2 independent roundings' worth.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from repository import ROOT
from tolerance import allowed, assert_close, relative_error
from torch import Tensor
from torch.optim.adamw import adamw

from sra2_fast.errors import InputError
from sra2_fast.ops import adamw_ema as op
from sra2_fast.optim import AdamWEMA
from sra2_fast.reference import adamw_ema as reference

CHUNK = 16384  # csrc/adamw_ema_cpu.cpp
SIZES = (1, 3, 15, 16, 17, 0, 129, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)
FEW = (1, 3, 17, 0, 1000)
SETTINGS: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.1, "ema_decay": 0.98, "max_grad_norm": 10.0}
needs_cpu_kernels = pytest.mark.skipif(
    not op.is_fused(torch.device("cpu")), reason="the extension is not built (sra2-fast info)"
)


def make(sizes: tuple[int, ...] = SIZES) -> list[Tensor]:
    return [torch.randn(n) for n in sizes]


def gradients(step: int, sizes: tuple[int, ...] = SIZES) -> list[Tensor]:
    """Sometimes above the clip and sometimes below; every seventh has one that is not a number."""
    draw = torch.Generator().manual_seed(step)
    grads = [torch.randn(n, generator=draw) * (0.2 if step % 3 else 2.0) for n in sizes]
    if step % 7 == 6:
        grads[-1][step] = float("nan")
    return grads


def trajectory_of_optimizer(opt_of: Any, start: list[Tensor], steps: int) -> list[list[Tensor]]:
    """[weights, exp_avgs, exp_avg_sqs, averages] after `steps`."""
    params = [torch.nn.Parameter(p.clone()) for p in start]
    opt = opt_of(params)
    for step in range(steps):
        for p, g in zip(params, gradients(step, FEW), strict=True):
            p.grad = g
        opt.step()
    states = [opt.state[p] for p in params]
    return [
        [p.detach() for p in params],
        *[[s[name] for s in states] for name in ("exp_avg", "exp_avg_sq", "ema")],
    ]


class PublicStyle(torch.optim.AdamW):
    """The loop of the public repositories: clip, AdamW, average; told to skip what is not finite."""

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        super().__init__(params, lr=SETTINGS["lr"], weight_decay=SETTINGS["weight_decay"])
        self.emas = [p.detach().clone() for p in params]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        params = self.param_groups[0]["params"]
        norm = torch.nn.utils.clip_grad_norm_(params, SETTINGS["max_grad_norm"])
        if torch.isfinite(norm):
            super().step()
            for p, ema in zip(params, self.emas, strict=True):
                ema.mul_(SETTINGS["ema_decay"]).add_(p.detach(), alpha=1 - SETTINGS["ema_decay"])
                self.state[p]["ema"] = ema


def trajectory_of_reference(start: list[Tensor], steps: int) -> list[list[Tensor]]:
    betas = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    now = [[p.double(), torch.zeros_like(p).double(), torch.zeros_like(p).double(), p.double()] for p in start]
    taken = 0
    for step in range(steps):
        grads = [g.double() for g in gradients(step, FEW)]
        norm = reference.global_norm(grads)
        taken += bool(torch.isfinite(norm))
        for i, (p, m, s, e) in enumerate(now):
            now[i] = list(reference.adamw_ema(p, grads[i], m, s, e, taken, norm=norm, **betas, **SETTINGS))
    return [list(kind) for kind in zip(*now, strict=True)]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def test_reference_is_torchs_adamw_in_float64() -> None:
    start = [p.double() for p in make((4, 7))]
    params = [torch.nn.Parameter(p.clone()) for p in start]
    opt = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.3, betas=(0.8, 0.95), eps=1e-3)
    mine = [(p, torch.zeros_like(p), torch.zeros_like(p), p) for p in start]
    for step in range(1, 6):
        grads = [torch.randn_like(p) * step for p in start]
        norm = reference.global_norm(grads)
        for i, one in enumerate(mine):
            settings = {"lr": 1e-2, "weight_decay": 0.3, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "ema_decay": 0.7}
            mine[i] = reference.adamw_ema(one[0], grads[i], *one[1:], step, norm=norm, max_grad_norm=4.0, **settings)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        torch.testing.assert_close(torch.nn.utils.clip_grad_norm_(params, 4.0), norm, rtol=1e-14, atol=0)
        opt.step()
        for p, one in zip(params, mine, strict=True):
            torch.testing.assert_close(p.detach(), one[0], rtol=1e-13, atol=1e-15)
            torch.testing.assert_close(opt.state[p]["exp_avg_sq"], one[2], rtol=1e-13, atol=1e-18)


@pytest.mark.parametrize("implementation", ["fused", "eager"])
def test_a_hundred_steps_are_the_public_loop_to_float32_rounding(implementation: str) -> None:
    start, steps = make(FEW), 100
    want = trajectory_of_reference(start, steps)
    public = trajectory_of_optimizer(PublicStyle, start, steps)
    ours = trajectory_of_optimizer(lambda p: AdamWEMA(p, **SETTINGS, implementation=implementation), start, steps)
    for name, roundings, mine, theirs, true in zip(
        ("weights", "exp_avg", "exp_avg_sq", "averages"), (3, 2, 2, 3), ours, public, want, strict=True
    ):
        assert_close(flat(mine), flat(true), torch.float32, roundings * steps + steps**2, name=name)
        error, of_public = (relative_error(flat(x), flat(true))[0] for x in (mine, theirs))
        assert error <= 1.5 * of_public + 2.0**-24, f"{name}: {error:.2e}, the public loop {of_public:.2e}"


@pytest.mark.parametrize("max_grad_norm", [None, 1e-3, 1e9])
@pytest.mark.parametrize("ema_decay", [None, 0.0, 0.9999, 1.0])
def test_one_step_with_and_without_clip_and_average(ema_decay: float | None, max_grad_norm: float | None) -> None:
    start, grads = make(), gradients(0)
    params = [torch.nn.Parameter(p.clone()) for p in start]
    settings = {**SETTINGS, "ema_decay": ema_decay, "max_grad_norm": max_grad_norm}
    opt = AdamWEMA(params, **settings)
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    opt.step()
    norm = reference.global_norm([g.double() for g in grads])
    assert_close(opt.grad_norm, norm, torch.float32, 2, sum(SIZES))
    betas = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    for p, before, g in zip(params, start, grads, strict=True):
        assert not op.is_fused(torch.device("cpu")) or torch.equal(p.grad, g)  # the kernels clip on the way
        zeros = torch.zeros_like(before).double()
        ema = None if ema_decay is None else before.double()
        true = reference.adamw_ema(before.double(), g.double(), zeros, zeros, ema, 1, norm=norm, **betas, **settings)
        assert_close(p.detach(), true[0], torch.float32, 3, name="weight")
        assert_close(opt.state[p]["exp_avg"], true[1], torch.float32, 3, name="exp_avg")
        assert_close(opt.state[p]["exp_avg_sq"], true[2], torch.float32, 5, name="exp_avg_sq")
        assert ("ema" in opt.state[p]) == (ema is not None)
        if true[3] is not None:
            assert_close(opt.state[p]["ema"], true[3], torch.float32, 4, name="ema")


@needs_cpu_kernels
def test_bf16_gradients_and_shadows_are_the_float32_step_on_the_rounded_gradient() -> None:
    """Bit for bit: bf16 is widened exactly, and the shadow is torch's rounding of the new weight."""
    start = make()
    start[1][0] = float("nan")  # rounding must keep it, and its neighbours as they are
    grads = [g.bfloat16() for g in gradients(0)]
    states: list[list[Any]] = []
    for low in (False, True):
        params = [torch.nn.Parameter(p.clone()) for p in start]
        shadows = [torch.zeros_like(p, dtype=torch.bfloat16) for p in params] if low else None
        given = list(grads) if low else [g.float() for g in grads]
        zeros = [[torch.zeros_like(p) for p in start] for _ in range(2)]
        emas = [p.clone() for p in start]
        tensors = op.AdamWEMATensors([p.data for p in params], given, *zeros, emas, torch.ones(len(start)), shadows)
        norm = op.global_norm(given)
        op.adamw_ema_step(tensors, norm, reference.AdamWEMASettings(1e-2, 0.9, 0.999, 1e-8, 0.1, 0.9, 1.0))
        states.append([norm, *tensors.params, *tensors.exp_avgs, *tensors.exp_avg_sqs, *emas])
        if shadows is not None:
            for shadow, param in zip(shadows, tensors.params, strict=True):
                assert torch.equal(shadow.nan_to_num(7), param.bfloat16().nan_to_num(7))
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(*states, strict=True))
    mixed = [g.float() if i % 2 else g for i, g in enumerate(grads)]
    assert torch.equal(op.global_norm(mixed), states[0][0])


@pytest.mark.parametrize("implementation", ["fused", "eager"])
def test_rates_on_the_device_are_the_same_step(implementation: str) -> None:
    """What a captured step reads: 0-d tensors in place of the numbers, float64 so that 1 - ema_decay stays exact."""
    start, runs = make(FEW), []
    for as_tensor in (False, True):
        made = {"lr": 3e-3, "ema_decay": 0.9999}
        if as_tensor:
            made = {name: torch.tensor(value, dtype=torch.float64) for name, value in made.items()}  # type: ignore[misc]
        settings = {**SETTINGS, **made, "implementation": implementation}
        runs.append(trajectory_of_optimizer(lambda p, settings=settings: AdamWEMA(p, **settings), start, 9))
    assert all(torch.equal(a, b) for kind in zip(*runs, strict=True) for a, b in zip(*kind, strict=True))


def test_eager_on_a_gpu_takes_its_flag_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the update is torch's fused AdamW with `found_inf`, and the averages' weight a tensor: driven here."""
    start, steps = make(FEW), 8  # the seventh has a gradient that is not a number
    on_host = trajectory_of_optimizer(lambda p: AdamWEMA(p, **SETTINGS, implementation="eager"), start, steps)
    monkeypatch.setattr(op, "_READ_THE_FLAG_ON", ())
    used: list[bool] = []
    monkeypatch.setattr(op, "adamw", lambda *a, fused, **k: (used.append(fused), adamw(*a, fused=fused, **k)))
    on_device = trajectory_of_optimizer(lambda p: AdamWEMA(p, **SETTINGS, implementation="eager"), start, steps)
    assert used == [True] * steps
    for name, a, b in zip(("weights", "exp_avg", "exp_avg_sq", "averages"), on_device, on_host, strict=True):
        assert_close(flat(a), flat(b).double(), torch.float32, 2 * 3 * steps, name=name)


@needs_cpu_kernels
@pytest.mark.parametrize("sizes", [(5,), (CHUNK + 1,), SIZES, (0, 7), (70001, 1)], ids=str)
def test_norm_is_the_reference(sizes: tuple[int, ...]) -> None:
    for scale in (1.0, 1e-15, 1e15):
        grads = [g * scale for g in make(sizes)]
        assert_close(op.global_norm(grads), reference.global_norm([g.double() for g in grads]), torch.float32, 2, 512)
    grads[0][:1] = float("inf")
    assert sizes[0] == 0 or op.global_norm(grads) == float("inf")
    assert op.global_norm([torch.zeros(9)]) == 0


@needs_cpu_kernels
def test_equal_bits_for_any_number_of_threads() -> None:
    start, threads = make((*SIZES, 400_000)), torch.get_num_threads()
    grads = gradients(0, (*SIZES, 400_000))
    results = []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            params = [torch.nn.Parameter(p.clone()) for p in start]
            opt = AdamWEMA(params, lr=0.1, ema_decay=0.5)
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            opt.step()
            results.append([opt.grad_norm, *[p.detach() for p in params], *opt.ema_state_dict().values()])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def arguments(sizes: tuple[int, ...] = (5, 6), has_shadows: bool = False) -> list[Any]:
    lists = [make(sizes) for _ in range(5)]
    lists[3] = [s.square() for s in lists[3]]
    shadows = [p.bfloat16() for p in lists[0]] if has_shadows else []
    rates = torch.empty(0, dtype=torch.float64)
    numbers = (1e-2, 0.9, 0.999, 1e-8, 0.1, 0.9, 1.0)
    return [*lists, shadows, torch.ones(len(sizes)), torch.tensor(2.0), rates, *numbers]


@needs_cpu_kernels
def test_ops_pass_opcheck_and_compile() -> None:
    ops = torch.ops.sra2_fast
    torch.library.opcheck(ops.adamw_ema_norm, (make((5, 6)),))
    torch.library.opcheck(ops.adamw_ema_step, tuple(arguments()))
    without_average = arguments()
    without_average[4] = []
    torch.library.opcheck(ops.adamw_ema_step, tuple(without_average))
    torch.library.opcheck(ops.adamw_ema_step, tuple(arguments(has_shadows=True)))

    def step(args: list[Any]) -> None:
        ops.adamw_ema_step(*args[:7], ops.adamw_ema_norm(args[1]), *args[8:])

    plain, compiled = arguments(), arguments()
    for a, b in zip(plain[:5], compiled[:5], strict=True):
        for one, other in zip(a, b, strict=True):
            other.copy_(one)
    step(plain)
    torch.compile(step, fullgraph=True, backend="aot_eager")(compiled)
    for a, b in zip(plain[:5], compiled[:5], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, [torch.zeros(5).double(), torch.zeros(6)], "params must be float32, got torch.float64"),
        (1, [torch.zeros(5)], "grads must be 2 tensors, as many as params, got 1"),
        (1, [torch.zeros(5), torch.zeros(7)], r"grads must be of its parameter's shape and strides, got \(7,\)"),
        (2, [torch.zeros(5), torch.zeros(12)[::2]], r"exp_avgs must be of its parameter's shape and strides, got"),
        (3, [torch.zeros(5), torch.zeros(6).bfloat16()], "exp_avg_sqs must be float32, got torch.bfloat16"),
        (4, [torch.zeros(5)] * 3, "emas must be 2 tensors, as many as params, got 3"),
        (1, [torch.zeros(5).double()] * 2, "grads must be float32 or bfloat16, got torch.float64"),
        (5, [torch.zeros(5).bfloat16()], "shadows must be 2 tensors, as many as params, got 1"),
        (5, [torch.zeros(5), torch.zeros(6)], "shadows must be bfloat16, got torch.float32"),
        (6, torch.zeros(3), r"steps must be \(2,\), got \(3,\)"),
        (7, torch.zeros(2), r"norm must be one float32, got \(2,\)"),
        (8, torch.zeros(2), r"rates must be two float64, lr and ema_decay, got torch.float32 \(2,\)"),
    ],
)
def test_the_kernels_refuse_what_they_cannot_walk(index: int, value: Any, message: str) -> None:
    args = arguments()
    args[index] = value
    with pytest.raises(RuntimeError, match=f"adamw_ema_step: {message}"):
        torch.ops.sra2_fast.adamw_ema_step(*args)


def test_the_norm_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="adamw_ema: grads must be at least one tensor, got none"):
        op.global_norm([])


@needs_cpu_kernels
@pytest.mark.parametrize("isa", ["avx2", "base"])
def test_one_step_with_lesser_instructions(isa: str) -> None:
    code = (
        "import torch, test_adamw_ema as t; torch.manual_seed(0); from sra2_fast import backends\n"
        f"assert backends.cpu_instruction_set() in ({isa!r}, 'base')\n"
        "t.test_one_step_with_and_without_clip_and_average(0.9, 1.0); t.test_norm_is_the_reference(t.SIZES)"
    )
    env = {**os.environ, "SRA2_CPU_ISA": isa, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("implementation", ["fused", "eager"])
def test_autograd_notices_that_a_step_changed_a_weight_it_had_saved(implementation: str) -> None:
    """The kernels wrote without moving the tensors' versions, so a backward through an old graph was silently wrong."""
    weight = torch.nn.Parameter(torch.ones(3))
    opt = AdamWEMA([weight], lr=0.1, implementation=implementation)
    x = torch.ones(3, requires_grad=True)
    weight.grad = torch.ones(3)
    graph = (x * weight).sum()
    opt.step()
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        graph.backward()
    versions = [t._version for t in (weight, *(opt.state[weight][n] for n in ("exp_avg", "exp_avg_sq", "ema")))]
    opt.step()
    after = [t._version for t in (weight, *(opt.state[weight][n] for n in ("exp_avg", "exp_avg_sq", "ema")))]
    assert all(a > b for a, b in zip(after, versions, strict=True))


def test_the_tolerance_of_a_trajectory_can_fail() -> None:
    """A hundred steps without bias correction, or with the clip left out, are far outside."""
    start, steps = make(FEW), 20
    want = trajectory_of_reference(start, steps)
    unclipped = {**SETTINGS, "max_grad_norm": None}
    wrong = trajectory_of_optimizer(lambda p: AdamWEMA(p, **unclipped), start, steps)
    limit = allowed(torch.float32, 3 * steps + steps**2)
    assert all(relative_error(flat(a), flat(b))[0] > limit for a, b in zip(wrong, want, strict=True))
