"""`sra2-fast prepare`: a folder of images into shards of latents."""

from __future__ import annotations

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
