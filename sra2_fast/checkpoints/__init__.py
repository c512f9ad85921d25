"""What is written during training and read back, and what the public repositories write."""

from __future__ import annotations

from .converting import convert_state_dict
from .opening import OpenedWeights, open_model, open_weights
from .training import (
    Checkpoint,
    checkpoint_name,
    join_optimizer,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    newest_whole,
    prune_checkpoints,
    remove_partial_checkpoints,
    save_checkpoint,
    split_optimizer,
)

__all__ = [
    "Checkpoint",
    "OpenedWeights",
    "checkpoint_name",
    "convert_state_dict",
    "join_optimizer",
    "list_checkpoints",
    "load_checkpoint",
    "load_weights",
    "newest_whole",
    "open_model",
    "open_weights",
    "prune_checkpoints",
    "remove_partial_checkpoints",
    "save_checkpoint",
    "split_optimizer",
]
