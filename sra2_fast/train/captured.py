"""A training step as one CUDA graph: forward, backward, clip, AdamW and EMA with a single launch.

What changes from step to step without being computed on the device stands in memory that the graph reads: the batch,
and a few numbers (each group's learning rate and decay of the average, the alignment weight). Everything else must stay
as it was when the step was captured, so before each replay the addresses of weights and state are compared, and where
one has moved (a loaded checkpoint) the next step runs as it is and the one after it is captured anew. So do the first
steps: compilers, libraries and the optimizer's tables settle there.

Left out: several processes, and batches whose shape changes; both are refused in a line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data import Batch
from ..errors import InputError, must_be
from ..optim import AdamWEMA
from ..optim.replay import addresses, note_replayed

if TYPE_CHECKING:
    from .step import TrainStep

WARM_UP_STEPS = 3
_HAS_GRAPHS = ("cuda",)


class CudaGraph:
    """Device work that is recorded once and launched as a whole; on a stream of its own, as torch wants captures."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._graph: Any = None

    def on_stream(self, run: Callable[[], Any]) -> Any:
        """Run on that stream, after and before all else."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = run()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def capture(self, run: Callable[[], None]) -> None:
        """Record `run`; nothing is computed."""
        self._graph = None  # its memory is free for the next one
        graph = torch.cuda.CUDAGraph()
        # Threads that load data may meanwhile ask CUDA for pinned memory.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            run()
        self._graph = graph

    def replay(self) -> None:
        self._graph.replay()


class CapturedStep:
    """The device work of a `TrainStep`, captured after its first steps.

    Raises InputError where it cannot be: several processes, another device than a GPU, an optimizer that is not ours.
    """

    def __init__(self, step: TrainStep) -> None:
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise InputError("train: --graph captures the step of one process; leave it out under torchrun")
        if step.device.type not in _HAS_GRAPHS:
            raise InputError(f"train: --graph captures a CUDA graph, {step.device} has none; leave it out")
        if not isinstance(step.optimizer, AdamWEMA) or step.optimizer.implementation != "fused":
            raise InputError("train: --graph needs the fused optimizer, --optimizer adamw-ema; leave one of them out")
        self._step, self._optimizer = step, step.optimizer
        self._graph = CudaGraph(step.device)
        groups = len(step.optimizer.param_groups)
        # lr and ema_decay of each group, then the alignment weight; in float64, to which 1 - ema_decay is exact.
        self._numbers = torch.zeros(2 * groups + 1, dtype=torch.float64, device=step.device)
        self._align_weight = torch.zeros((), device=step.device)
        self._batches: list[Batch] = []
        self._figures = torch.zeros(4, device=step.device)
        self._addresses: list[int] | None = None
        self._warm_up = WARM_UP_STEPS

    def __call__(self, microbatches: Sequence[Batch]) -> Tensor:
        """(4,) float32: total, velocity, align and gradient norm of one step."""
        if self._addresses is not None and self._addresses != addresses(self._optimizer):
            self._addresses, self._warm_up = None, 1
        if self._warm_up:
            self._warm_up -= 1
            return self._graph.on_stream(lambda: self._step.compute(microbatches))
        self._take(microbatches)
        if self._optimizer.shadows is not None:
            self._optimizer.shadows.refresh(only_stale=True)
        if self._addresses is None:
            self._capture()
            self._addresses = addresses(self._optimizer)
        self._graph.replay()
        note_replayed(self._optimizer)
        return self._figures.clone()

    def _take(self, microbatches: Sequence[Batch]) -> None:
        """Copy the batch and this step's numbers to where the graph reads them."""
        shapes = [_shapes(batch) for batch in microbatches]
        if not self._batches:
            self._batches = [batch.map(torch.clone) for batch in microbatches]
        elif shapes != [_shapes(batch) for batch in self._batches]:
            expected = f"of the shape that was captured, latents {_latents(self._batches)}"
            raise must_be("train", "with --graph every batch", expected, _latents(microbatches))
        for ours, new in zip(self._batches, microbatches, strict=True):
            for kept, tensor in zip(ours, new, strict=True):
                if kept is not None and tensor is not None:
                    kept.copy_(tensor, non_blocking=True)
        rates = [(group["lr"], group["ema_decay"] or 0.0) for group in self._optimizer.param_groups]
        weight = self._step.loss_fn.weight_at(self._step.step)
        numbers = torch.tensor([*(one for pair in rates for one in pair), weight], dtype=torch.float64)
        # Pinned memory of torch's own cache: it waits with handing a block out again until the copy has been made.
        numbers = numbers.pin_memory() if self._numbers.is_cuda else numbers
        self._numbers.copy_(numbers, non_blocking=True)
        self._align_weight.copy_(self._numbers[-1])

    def _capture(self) -> None:
        def run() -> None:
            with self._numbers_on_device():
                self._figures.copy_(self._step.compute(self._batches, self._align_weight))

        self._graph.capture(run)

    @contextlib.contextmanager
    def _numbers_on_device(self) -> Iterator[None]:
        """Within the block the optimizer's groups have the tensors that the graph will read."""
        groups = self._optimizer.param_groups
        before = [{name: group[name] for name in ("lr", "ema_decay")} for group in groups]
        for index, group in enumerate(groups):
            group["lr"] = self._numbers[2 * index]
            if group["ema_decay"] is not None:
                group["ema_decay"] = self._numbers[2 * index + 1]
        try:
            yield
        finally:
            for group, settings in zip(groups, before, strict=True):
                group.update(settings)


def _shapes(batch: Batch) -> list[tuple[int, ...] | None]:
    return [None if tensor is None else tuple(tensor.shape) for tensor in batch]


def _latents(batches: Sequence[Batch]) -> str:
    return " + ".join(str(tuple(batch.latents.shape)) for batch in batches)
