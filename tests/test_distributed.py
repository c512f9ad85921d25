"""One training step on two processes (gloo, CPU) against the same step on one: DDP, and FSDP2 wrapped block by block.

The loss is computed inside the model's forward, where both wrappers see every weight that is used; a projector called
beside it would be averaged by neither.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import batch_for, small_model
from tolerance import allowed, relative_error
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sra2_fast import SiT, SRA2Loss

pytestmark = pytest.mark.slow

PROCESSES = 2
BATCH = 4
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {"implementation": "fused"}),
    "ddp-recomputed": ("ddp", {"implementation": "eager", "checkpoint_blocks": True}),
    "fsdp2": ("fsdp2", {"implementation": "fused"}),
    "fsdp2-recomputed": ("fsdp2", {"implementation": "eager", "checkpoint_blocks": True}),
}
SIZES: dict[str, Any] = {"depth": 2, "align_depth": 1, "learn_sigma": False, "hidden_size": 24, "num_heads": 3}


def local_loss(wrapped: torch.nn.Module, model: SiT, rank: int | None) -> torch.Tensor:
    """The loss of the whole batch, or of this process's half of it; time, noise and drops are those of the sample."""
    latents, t, labels = batch_for(model, batch=BATCH)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    drop = torch.tensor([False, True, False, False])
    mine = slice(None) if rank is None else slice(rank * BATCH // PROCESSES, (rank + 1) * BATCH // PROCESSES)
    loss_fn = SRA2Loss()
    return loss_fn(wrapped, latents[mine], labels[mine], t=t[mine], noise=noise[mine], label_drop=drop[mine]).total


def build(options: dict[str, Any]) -> SiT:
    return small_model(**SIZES, **options).train()


def gradients(model: SiT) -> dict[str, torch.Tensor]:
    """Whole gradients, whether a parameter is sharded or not."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
    return found


def step_on_several(case: str, rank: int) -> dict[str, torch.Tensor]:
    wrapper, options = CASES[case]
    model = build(options)
    wrapped: torch.nn.Module = model
    if wrapper == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    loss = local_loss(wrapped, model, rank)
    loss.backward()
    mean_loss = loss.detach().clone()
    dist.all_reduce(mean_loss)
    return {"loss": mean_loss / PROCESSES, **gradients(model)}


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=180))
    try:
        for case in CASES:
            torch.save(step_on_several(case, rank), Path(folder) / f"{case}-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo")
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    """One test for all cases, because it is starting the processes that takes the time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, (port, str(tmp_path)), nprocs=PROCESSES)
    for case, (_, options) in CASES.items():
        model = build(options)
        loss = local_loss(model, model, None)
        loss.backward()
        want = {"loss": loss.detach(), **gradients(model)}
        results = [torch.load(tmp_path / f"{case}-{rank}.pt", weights_only=True) for rank in range(PROCESSES)]
        assert results[0].keys() == results[1].keys() == want.keys(), case
        for name, value in want.items():
            assert torch.equal(results[0][name], results[1][name]), f"{case}: {name} differs between the processes"
            # The same terms summed in another order: in each half of the batch, then over the two halves.
            error, _ = relative_error(results[0][name], value)
            assert error <= allowed(torch.float32, 8, summed=BATCH * 16), f"{case}: {name}: {error:.2e}"
