"""What is written during training and read back."""

from __future__ import annotations

from .training import (
    Checkpoint,
    checkpoint_name,
    join_optimizer,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    prune_checkpoints,
    remove_partial_checkpoints,
    save_checkpoint,
    split_optimizer,
)

__all__ = [
    "Checkpoint",
    "checkpoint_name",
    "join_optimizer",
    "list_checkpoints",
    "load_checkpoint",
    "load_weights",
    "prune_checkpoints",
    "remove_partial_checkpoints",
    "save_checkpoint",
    "split_optimizer",
]
