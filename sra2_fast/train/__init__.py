"""`sra2-fast train`: one training run in one folder.

options.py        every option, from the command line and TOML
build.py          model, loss, optimizer, device and precision from the options
step.py           one training step
loop.py           the steps, and what happens between them
run_directory.py  config.json, metrics.jsonl
scalars.py        TensorBoard
initial.py        what a run starts from, and what of it is trained
resume.py         which checkpoint to start from, and whether it fits
diagnosis.py      losses read late, and what to say when one is not finite
grid.py           sample grids
interrupt.py      Ctrl-C and SIGTERM
allocator.py      memory kept from step to step, on a CPU
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from .options import TrainOptions, add_arguments, read_options

if TYPE_CHECKING:
    from .loop import TrainResult, train

__all__ = ["TrainOptions", "TrainResult", "add_arguments", "run", "train"]


def run(args: argparse.Namespace) -> int:
    """The command: exit code 0, 1 for a loss that is not finite, 130 or 143 after a signal."""
    from .diagnosis import NonFiniteLoss
    from .loop import train

    options = read_options(args)
    try:
        result = train(options)
    except NonFiniteLoss as error:
        print(f"sra2-fast train: {error}", file=sys.stderr)
        return 1
    if result.exit_code == 0 and result.last_record is not None:
        record = result.last_record
        print(
            f"done: step {result.step}, loss {record['loss']:.4f} (velocity {record['velocity']:.4f}, "
            f"align {record['align']:.4f}); {result.checkpoint}"
        )
    return result.exit_code


def __getattr__(name: str) -> Any:
    if name in ("train", "TrainResult"):  # late, so that --help does not wait for torch
        from . import loop

        return getattr(loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
