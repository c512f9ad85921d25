"""A fingerprint differs when the training set does, and for nothing else: what a resumed run must share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sra2_fast.data import open_data
from sra2_fast.data import source as source_module
from sra2_fast.data.layouts.shards import shard_name, write_index, write_shard

COUNT, SHAPE = 6, (4, 8, 8)
DIGITS = "87a68a838169d875017713645853362e46580abdaaace815a073b545a2e55f2c"


def write_shards(folder: Path, *, value: float = 0.0, label: int = 0, scale: float = 1.0, vae: str = "a") -> Path:
    draws = np.random.default_rng(0)
    moments = draws.standard_normal((COUNT, 2 * SHAPE[0], *SHAPE[1:])).astype(np.float32)
    moments[-1, 0, 0, 0] += value
    labels = np.arange(COUNT) % 3
    labels[-1] += label
    folder.mkdir(parents=True, exist_ok=True)
    shards = [write_shard(folder, shard_name(0, 1), moments, labels, key=vae)]
    write_index(
        folder,
        shards,
        shape=list(SHAPE),
        num_classes=5,
        class_names=None,
        shift=[0.0] * 4,
        scale=[scale] * 4,
        vae={"name": vae},
    )
    return folder


def write_vae_sd(folder: Path, *, value: float = 0.0, label: int = 0, spaces: int = 0) -> Path:
    draws = np.random.default_rng(0)
    labels = []
    for index in range(COUNT):
        name = f"img-mean-std-{index:08d}.npy"
        moments = draws.standard_normal((2 * SHAPE[0], *SHAPE[1:])).astype(np.float32)
        moments[0, 0, 0] += value
        (folder / "vae-sd").mkdir(parents=True, exist_ok=True)
        np.save(folder / "vae-sd" / name, moments)
        labels.append([name, index % 3 + label * (index == 4)])
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}, indent=spaces))
    return folder


@pytest.mark.parametrize(
    ("write", "changes"),
    [
        (write_shards, [{"value": 1e-3}, {"label": 1}, {"scale": 2.0}]),
        (write_vae_sd, [{"value": 1e-3}, {"label": 1}]),
    ],
)
def test_other_latents_under_the_same_path_are_noticed(
    tmp_path: Path, write: Callable[..., Path], changes: list[dict[str, float]]
) -> None:
    """A resumed run compared path, counts and shapes only: other latents of the same size went unnoticed."""
    seen = {open_data(write(tmp_path)).fingerprint()}
    for count, change in enumerate(changes, start=2):
        seen.add(open_data(write(tmp_path, **change)).fingerprint())
        assert len(seen) == count, change


@pytest.mark.parametrize(
    ("write", "harmless"), [(write_shards, {"vae": "/another/name/of/it"}), (write_vae_sd, {"spaces": 4})]
)
def test_the_path_and_what_decides_nothing_are_not_part_of_it(
    tmp_path: Path, write: Callable[..., Path], harmless: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    want = open_data(write(tmp_path / "a")).fingerprint()
    assert open_data(write(tmp_path / "b", **harmless)).fingerprint() == want
    monkeypatch.chdir(tmp_path)
    assert open_data("a/").fingerprint() == want


def test_every_label_of_a_vae_sd_folder_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "FINGERPRINT_SAMPLES", 2)  # the first and the last; the fifth label changes
    before = open_data(write_vae_sd(tmp_path)).fingerprint()
    assert open_data(write_vae_sd(tmp_path, label=1)).fingerprint() != before


def test_options_are_part_of_it(tmp_path: Path) -> None:
    write_vae_sd(tmp_path)
    options: list[dict[str, object]] = [{}, {"latent_scale": 1.0}, {"latent_shift": 1.0}, {"ignore_labels": True}]
    assert len({open_data(tmp_path, **each).fingerprint() for each in options}) == len(options)  # type: ignore[arg-type]


def test_digits_have_one_on_every_machine() -> None:
    assert open_data("digits").fingerprint() == DIGITS
    assert open_data("digits", ignore_labels=True).fingerprint() != DIGITS
