"""AdamWEMA's kernels on a GPU against PyTorch's own operators; no synchronisation, graphs, skipped steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from rehearsal import sized
from tolerance import assert_close

from sra2_fast.optim import AdamWEMA

SHAPES = sized([(1000, 37), (3,), (64, 3, 5, 5), (1,), (70001,)], [(10, 37), (3,), (4, 3, 5, 5), (1,), (4099,)])


def parameters(device: torch.device, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in SHAPES]


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        grad = torch.randn(p.shape, generator=generator).to(p.device)
        p.grad = grad if p.grad is None else p.grad.copy_(grad)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_same_trajectory_as_eager(device: torch.device, max_grad_norm: float | None) -> None:
    ours, theirs = parameters(device), parameters(device)
    settings = dict(lr=1e-2, weight_decay=0.01, ema_decay=0.9, max_grad_norm=max_grad_norm)  # noqa: C408
    fused, eager = AdamWEMA(ours, **settings), AdamWEMA(theirs, **settings, implementation="eager")
    steps = 20
    for step in range(steps):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        fused.step()
        eager.step()
    assert_close(fused.grad_norm, eager.grad_norm.double(), torch.float32, 4, summed=sum(p.numel() for p in ours))
    for a, b in zip(ours, theirs, strict=True):
        # Every step rounds the moments, the update and the weight: a dozen roundings.
        assert_close(a, b.detach().double(), torch.float32, 12 * steps, name="weights")
        assert_close(fused.state[a]["ema"], eager.state[b]["ema"].double(), torch.float32, 12 * steps, name="average")


def test_a_step_never_synchronises(device: torch.device) -> None:
    params = parameters(device)
    optimizer = AdamWEMA(params)
    set_gradients(params, 0)
    optimizer.step()
    with no_synchronisation():
        optimizer.step()
    for p in params:
        p.grad = torch.ones_like(p)  # at another address
    with no_synchronisation():
        optimizer.step()


def test_a_non_finite_gradient_changes_nothing(device: torch.device) -> None:
    params = parameters(device)
    optimizer = AdamWEMA(params)
    set_gradients(params, 0)
    optimizer.step()
    before = [t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())]
    params[2].grad[0, 0, 0, 0] = float("nan")  # type: ignore[index]
    with no_synchronisation():
        optimizer.step()
    after = [t for p in params for t in (p.detach(), *optimizer.state[p].values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert int(optimizer.skipped_steps) == 1


def test_a_step_replays_from_a_graph(device: torch.device) -> None:
    captured, plain = parameters(device), parameters(device)
    one, other = AdamWEMA(captured), AdamWEMA(plain)
    for params in (captured, plain):
        set_gradients(params, 0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        one.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one.step()
    other.step()
    for step in range(1, 4):
        set_gradients(captured, step)
        set_gradients(plain, step)
        graph.replay()
        other.step()
    for a, b in zip(captured, plain, strict=True):
        assert torch.equal(a, b) and torch.equal(one.state[a]["ema"], other.state[b]["ema"])
