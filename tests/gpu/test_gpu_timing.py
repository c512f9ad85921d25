"""The timer on a GPU: events, graphs, the cold L2, memory and energy."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from lib import energy, op_bench, timing
from rehearsal import of_a_gpu_alone


def test_events_time_the_device_and_not_the_launch(device: torch.device) -> None:
    cycles = 2_000_000
    calls = {"one": lambda: torch.cuda._sleep(cycles), "four": lambda: torch.cuda._sleep(4 * cycles)}
    taken = timing.interleave(calls, device=device, rounds=7)
    assert timing.paired_ratio(taken["four"], taken["one"]) == pytest.approx(4, rel=0.1)
    assert taken["one"].ms_median > 0.3  # two million cycles at any clock below 6 GHz


def test_flush_buffer_is_larger_than_the_l2(device: torch.device) -> None:
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    assert timing.l2_flush_buffer(device).numel() >= 2 * l2_bytes > 0


def test_graphed_replays_on_the_same_memory(device: torch.device) -> None:
    x = torch.ones(1000, device=device)
    replay = timing.graphed(lambda: x * 3)
    x.fill_(2)
    y = replay()
    torch.cuda.synchronize()
    assert isinstance(y, torch.Tensor) and bool((y == 6).all())


def test_a_kept_backward_is_captured(device: torch.device) -> None:
    x = torch.randn(8, 64, 256, device=device, requires_grad=True)
    dy = torch.randn_like(x)
    variants = {"eager": op_bench.passes(lambda x: F.layer_norm(x, (256,)), (x,), (dy,), "backward")}
    case = op_bench.OpCase("layer_norm", (8, 64, 256), torch.float32, "backward", bytes_moved=3 * x.numel() * 4)
    compared = op_bench.compare_variants(case, variants, device=device, rounds=5)
    assert compared.was_graphed and set(compared.timings) == {"eager", "copy"}


@of_a_gpu_alone
def test_peak_memory_is_the_most_held_at_once(device: torch.device) -> None:
    x = torch.randn(2 << 20, device=device)  # 8 MiB: blocks of their own in the allocator

    def call() -> None:
        a = x + x
        b = a + x
        del a
        b + x

    call()
    assert timing.peak_memory_bytes(call, device) == 16 << 20
    assert timing.peak_memory_bytes(lambda: x.add_(x), device) == 0


def test_energy_grows_while_the_device_works(device: torch.device) -> None:
    meter = energy.EnergyMeter.of(device)
    if meter is None:
        pytest.skip("NVML or its energy counter cannot be used here")
    a = torch.randn(4096, 4096, device=device)
    begin, start = time.perf_counter(), meter.joules()
    while time.perf_counter() - begin < 1:
        torch.mm(a, a)
        torch.cuda.synchronize()
    watts = (meter.joules() - start) / (time.perf_counter() - begin)
    assert 20 < watts < 2000
