"""Encoding on a GPU: batches that were queued arrive in order, each its own, and are those of a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from photos import SIZE, command, contents
from rehearsal import IS_REHEARSAL
from tolerance import assert_close

from sra2_fast.cli import main
from sra2_fast.vae.autoencoder import encode, load_vae, start_encoding

pytest.importorskip("diffusers")
pytest.importorskip("PIL.Image")
pytest_plugins = ["photos"]


def test_queued_batches_arrive_each_as_its_own(vae_path: Path, device: torch.device) -> None:
    vae, on_cpu = load_vae(str(vae_path), device), load_vae(str(vae_path))
    batches = [torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8) for _ in range(3)]
    waiting = [start_encoding(vae, batch, "fp32") for batch in batches]
    for batch, wait in zip(batches, waiting, strict=True):
        got, want = wait(), encode(on_cpu, batch)
        assert (got == encode(vae, batch)).all() and (got.flags.owndata or IS_REHEARSAL)
        # cuDNN's float32 convolutions may use TF32: 16 of them, two inputs each rounded to 11 bits
        assert_close(torch.from_numpy(got).flatten(1), torch.from_numpy(want).flatten(1), torch.bfloat16, roundings=32)


def test_prepare_ends_with_the_same_bytes_whatever_was_done_before(
    photos: Path, vae_path: Path, tmp_path: Path, device: torch.device
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(photos, vae_path, whole, "--num-workers", "2")) == 0
    assert main(command(photos, vae_path, parts)) == 0
    (parts / "index.json").unlink()
    next(parts.glob("*00001-of*")).unlink()
    assert main(command(photos, vae_path, parts)) == 0
    assert contents(parts) == contents(whole)
    assert b'"precision": "bf16"' in contents(whole)["index.json"]
