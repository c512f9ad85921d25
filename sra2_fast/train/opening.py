"""The first lines of a run: what is trained on what, how, and what the user may not expect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tqdm import tqdm

from .. import backends

if TYPE_CHECKING:
    from .loop import Trainer


def say_what_runs(run: Trainer, changes: list[str], notes: list[str]) -> None:
    """Model, data and how it is computed; where it goes on; what is missing or was decided for the user.

    changes: options that differ from those of the run it goes on from. notes: lines of their own.
    """
    options = run.options
    million = sum(p.numel() for p in run.model.parameters() if p.requires_grad) / 1e6
    parts = -(-options.batch_size // (options.microbatch or options.batch_size))
    how = {
        options.implementation: True,
        "compiled": options.compile,
        "one CUDA graph a step": options.graph,
        "weights cast at every use": options.precision == "bf16" and not run.take_step.keeps_bf16_weights(parts),
    }
    ways = [*(way for way, is_so in how.items() if is_so), *run.chosen]
    tqdm.write(
        f"SiT {options.model} ({million:.1f} M parameters) on {run.source.name}: {run.description['data']}; "
        f"{options.precision} on {options.device}, {', '.join(ways)}; --out {options.out}"
    )
    if run.checkpoint is not None:
        changed = f", with {'; '.join(changes)}" if changes else ""
        tqdm.write(f"going on from {run.checkpoint}{changed}")
    missing = backends.without_kernels(run.device.type) if options.implementation == "fused" else ""
    if missing:
        tqdm.write(f"without kernels here, run by PyTorch's operators: {missing}")
    for note in (*notes, *run.source.notes):
        tqdm.write(note)
    if options.sample_every and run.grid is None:
        tqdm.write("no sample grids: pip install pillow")
