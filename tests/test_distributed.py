"""One training step on two processes (gloo, CPU) against the same step on one: DDP, and FSDP2 wrapped block by block.

The loss is computed inside the model's forward, where both wrappers see every weight that is used; a projector called
beside it would be averaged by neither.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import batch_for, small_model
from tolerance import allowed, relative_error
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sra2_fast import Aligner, LossOutput, SiT, SRA2Loss, choices
from sra2_fast.errors import InputError

pytestmark = pytest.mark.slow

PROCESSES = 2
BATCH = 4
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {"implementation": "fused"}),
    "ddp-recomputed": ("ddp", {"implementation": "eager", "checkpoint_blocks": True}),
    "fsdp2": ("fsdp2", {"implementation": "fused"}),
    "fsdp2-recomputed": ("fsdp2", {"implementation": "eager", "checkpoint_blocks": True}),
    "ddp-aligner": ("ddp", {"align_depth": None}),
    "fsdp2-aligner": ("fsdp2", {"align_depth": None}),
}
SIZES: dict[str, Any] = {"depth": 2, "align_depth": 1, "learn_sigma": False, "hidden_size": 24, "num_heads": 3}


def build(options: dict[str, Any]) -> SiT:
    return small_model(**{**SIZES, **options}).train()


def aligner_of(model: SiT) -> Aligner:
    """The projector of a model that has none of its own."""
    torch.manual_seed(4)
    return Aligner(model, "blocks.0", latent_channels=4, patch_size=2, grid=(4, 4))


def whole_batch() -> dict[str, torch.Tensor]:
    """Latents, labels, time, noise and drops of every sample."""
    latents, t, labels = batch_for(build({}), batch=BATCH)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    drop = torch.tensor([False, True, False, False])
    return {"latents": latents, "labels": labels, "t": t, "noise": noise, "label_drop": drop}


def local_loss(wrapped: torch.nn.Module, rank: int | None, aligner: torch.nn.Module | None = None) -> torch.Tensor:
    """The loss of the whole batch, or of this process's half of it; time, noise and drops are those of the sample."""
    mine = slice(None) if rank is None else slice(rank * BATCH // PROCESSES, (rank + 1) * BATCH // PROCESSES)
    batch = {name: value[mine] for name, value in whole_batch().items()}
    if aligner is None:
        return SRA2Loss()(wrapped, **batch).total
    z, noise, t = (batch[name] for name in ("latents", "noise", "t"))
    velocity = wrapped(
        torch.lerp(z, noise, t.view(-1, 1, 1, 1)), t, batch["labels"], force_drop_ids=batch["label_drop"]
    )
    return aligner(z, velocity, noise - z).total


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
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
    aligner = aligner_of(model) if model.align_depth is None else None
    wrapped_aligner = None if aligner is None else DistributedDataParallel(aligner)
    if wrapper == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    loss = local_loss(wrapped, rank, wrapped_aligner)
    loss.backward()
    mean_loss = loss.detach().clone()
    dist.all_reduce(mean_loss)
    return {"loss": mean_loss / PROCESSES, **gradients(model), **(gradients(aligner) if aligner else {})}


def chosen_by(rank: int, folder: Path) -> list[str]:
    """What a rank is told where each would choose otherwise, and where nothing runs on rank 0."""
    choices.cache_file = lambda: folder / f"choices-{rank}.json"
    ways = ("a", "b") if rank == 0 else ("b", "a")
    slow, fast = (lambda: time.sleep(0.003)), (lambda: None)
    told = choices.choose("op", {}, ways, lambda: dict(zip(ways, (fast, slow), strict=True)), torch.device("cpu"))
    try:
        choices.choose("op", {}, ["c"], lambda: {"c": broken if rank == 0 else fast}, torch.device("cpu"))
    except InputError as error:
        return [told.name, str(error)]
    return [told.name]


def broken() -> None:
    raise RuntimeError("no kernel")


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=180))
    try:
        torch.save(chosen_by(rank, Path(folder)), Path(folder) / f"choice-{rank}.pt")
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
    for rank in range(PROCESSES):
        assert torch.load(tmp_path / f"choice-{rank}.pt") == ["a", "op: none of c runs on cpu (c: no kernel)"]
    for case, (_, options) in CASES.items():
        model = build(options)
        aligner = aligner_of(model) if model.align_depth is None else None
        loss = local_loss(model, None, aligner)
        loss.backward()
        want = {"loss": loss.detach(), **gradients(model), **(gradients(aligner) if aligner else {})}
        results = [torch.load(tmp_path / f"{case}-{rank}.pt", weights_only=True) for rank in range(PROCESSES)]
        assert results[0].keys() == results[1].keys() == want.keys(), case
        for name, value in want.items():
            assert torch.equal(results[0][name], results[1][name]), f"{case}: {name} differs between the processes"
            # The same terms summed in another order: in each half of the batch, then over the two halves.
            error, _ = relative_error(results[0][name], value)
            assert error <= allowed(torch.float32, 8, summed=BATCH * 16), f"{case}: {name}: {error:.2e}"


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone: FSDP2's casts, hooks and sharded parameters, without a second process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def assert_same_step(got: tuple[LossOutput, SiT], want: tuple[LossOutput, SiT], roundings: int) -> None:
    for name, value in want[0]._asdict().items():
        error, _ = relative_error(got[0]._asdict()[name].detach(), value.detach())
        assert error <= allowed(torch.float32, 8, summed=BATCH * 16), f"{name}: {error:.2e}"
    gradients_got, gradients_want = gradients(got[1]), gradients(want[1])
    assert gradients_got.keys() == gradients_want.keys()
    for name, value in gradients_want.items():
        error, _ = relative_error(gradients_got[name], value)
        assert error <= allowed(value.dtype, roundings, summed=BATCH * 16, row_size=value.numel()), f"{name}: {error}"


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo")
@pytest.mark.parametrize("implementation", ("eager", "fused"))
@pytest.mark.parametrize("target", ("vae", "features"))
def test_mixed_precision_rounds_weights_and_inputs_but_not_what_is_compared(
    target: str, implementation: str, one_process: None
) -> None:
    """FSDP2 casts a dataclass's tensors on their way into forward: targets, noise and times were rounded to bf16."""
    model = build({"implementation": implementation})
    whole = build({"implementation": implementation}).bfloat16()
    loss_fn = SRA2Loss(target=target)
    batch = whole_batch()
    if target == "features":
        batch["features"] = torch.randn(BATCH, 16, 16, generator=torch.Generator().manual_seed(6))
    for block in whole.blocks:  # FSDP2's hooks close the stream between blocks, which rounds it to bf16
        block.register_forward_hook(lambda *_: None)
    want = loss_fn(whole, **batch)
    want.total.backward()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    got = loss_fn(model, **batch)
    got.total.backward()
    assert_same_step((got, model), (want, whole), roundings=2)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # of outputs that are views, which nobody changes in place
@pytest.mark.parametrize("implementation", ("eager", "fused"))
@pytest.mark.parametrize("shard", ("projector", "last", "patches"))
def test_a_projector_or_its_last_linear_sharded_by_itself(shard: str, implementation: str, one_process: None) -> None:
    """Its weights are whole only inside its own forward; they were read outside of it."""
    model, whole = build({"implementation": implementation}), build({"implementation": implementation})
    assert model.projector is not None
    batch = whole_batch()
    want = SRA2Loss()(whole, **batch)
    want.total.backward()
    fully_shard({"projector": model.projector, "last": model.projector[-1], "patches": model.x_embedder.proj}[shard])
    got = SRA2Loss()(model, **batch)
    got.total.backward()
    assert_same_step((got, model), (want, whole), roundings=8)
