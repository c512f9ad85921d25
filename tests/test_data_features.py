"""Encoder features beside latents: our shards and features/ folders, read with their samples, and trained from disk."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from public_data import COUNT, LABELS, draw, write_dataset_json, write_flat, write_lightningdit
from training_runs import assert_same_checkpoint, final, records

from sra2_fast.checkpoints import load_checkpoint
from sra2_fast.cli import main
from sra2_fast.data import make_loader, open_data
from sra2_fast.data.layouts.feature_shards import (
    feature_file,
    finished_feature_file,
    write_feature_file,
    write_feature_index,
)
from sra2_fast.data.layouts.shards import ShardSource, shard_name, write_index, write_shard
from sra2_fast.errors import InputError

TOKENS, WIDTH = 4, 6
EVERY = np.arange(COUNT)


def draw_features(seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((COUNT, TOKENS, WIDTH)).astype(np.float16)


def write_shards(folder: Path, features: np.ndarray, flipped: np.ndarray | None = None, seed: int = 0) -> Path:
    """Two shards of latents with features beside them, and flips of both where there are any."""
    folder.mkdir(parents=True, exist_ok=True)
    moments, mirrored = np.abs(draw(8, seed=seed)), np.abs(draw(8, seed=seed + 1))
    shards, entries = [], []
    for number, part in enumerate((slice(0, 7), slice(7, COUNT))):
        name, labels = shard_name(number, 2), np.array(LABELS[part])
        flips = None if flipped is None else mirrored[part]
        shards.append(write_shard(folder, name, moments[part], labels, "k", flips=flips))
        write_feature_file(folder, feature_file(name), "k", features[part], None if flipped is None else flipped[part])
        entry = finished_feature_file(folder, feature_file(name), "k")
        assert entry is not None and finished_feature_file(folder, feature_file(name), "another") is None
        entries.append(entry)
    sizes: dict[str, Any] = {"shape": [4, 4, 4], "num_classes": 4, "class_names": None, "vae": None}
    write_index(folder, shards, shift=[0.0] * 4, scale=[1.0] * 4, has_flips=flipped is not None, **sizes)
    about: dict[str, Any] = {"encoder": "some", "fingerprint": "f", "tokens": TOKENS, "width": WIDTH}
    write_feature_index(folder, shards, entries, has_flips=flipped is not None, **about)
    return folder


def write_folder(folder: Path, features: np.ndarray) -> Path:
    """vae-sd/ and features/ with a name a sample, a leading dimension of 1 in half of them."""
    write_dataset_json(folder / "vae-sd", np.abs(draw(8, spread=3)), "img-mean-std-")
    for index, one in enumerate(features):
        path = folder / "features" / f"{index // 8:05d}" / f"img-features-{index:08d}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, one[None] if index % 2 else one)
    return folder


WRITERS: dict[str, Callable[[Path, np.ndarray], Path]] = {"shards": write_shards, "folder": write_folder}


@pytest.mark.parametrize("kind", WRITERS)
def test_features_travel_with_their_samples(tmp_path: Path, kind: str) -> None:
    features = draw_features()
    folder = WRITERS[kind](tmp_path / "data", features)
    source = open_data(folder, features=True)
    assert open_data(folder).features is None, "they are opened only where they are asked for"
    assert source.features is not None
    assert (source.features.num_tokens, source.features.width) == (TOKENS, WIDTH)
    rows = np.array([11, 0, 7, 6, 6])
    got = source.features.read(rows)
    assert got.dtype == np.float16 and (got == features[rows]).all()
    copy = pickle.loads(pickle.dumps(source))
    assert (copy.features.read(rows) == got).all() and copy.features.fingerprint() == source.features.fingerprint()
    options: dict[str, Any] = {"batch_size": 8, "seed": 3, "num_steps": 4}
    batches = list(make_loader(source, **options))
    values = source.read(EVERY)[0]
    for batch in batches:
        for z, label, one in zip(batch.latents, batch.labels, batch.features, strict=True):
            (index,) = np.flatnonzero((features == one.numpy()).all(axis=(1, 2)))
            assert label == LABELS[index]
            mean, std = np.split(values[index], 2)
            assert (np.abs(z.numpy() / source.scale[0] - mean) <= 6 * std + 1e-5).all()
    workers = list(make_loader(copy, num_workers=1, **options))
    assert all(torch.equal(a.features, b.features) for a, b in zip(batches, workers, strict=True))
    parts = batches[0].split(3)
    assert torch.equal(torch.cat([part.features for part in parts]), batches[0].features)


def test_features_of_the_mirrored_image_go_with_its_latents(tmp_path: Path) -> None:
    features, flipped = draw_features(), draw_features(8)
    source = open_data(write_shards(tmp_path / "data", features, flipped), features=True)
    assert source.has_flips and source.features is not None and source.features.has_flips
    stored = [source.read_flipped(EVERY, np.full(COUNT, side))[0][:, :4] for side in (False, True)]
    source.scale = np.ones(4, np.float32)
    seen = set()
    for batch in make_loader(source, batch_size=COUNT, seed=0, num_steps=4):
        for z, one in zip(batch.latents, batch.features, strict=True):
            (side,) = (
                side for side, all_of in enumerate((features, flipped)) if (all_of == one.numpy()).all((1, 2)).any()
            )
            (index,) = np.flatnonzero((((features, flipped)[side]) == one.numpy()).all(axis=(1, 2)))
            distance = [np.abs(z.numpy() - stored[other][index]).mean() for other in (0, 1)]
            std = [source.read_flipped(EVERY, np.full(COUNT, bool(other)))[0][index, 4:] for other in (0, 1)]
            assert (np.abs(z.numpy() - stored[side][index]) <= 6 * std[side]).all(), distance
            seen.add(side)
    assert seen == {0, 1}


def test_without_labels_the_features_stay(tmp_path: Path) -> None:
    for kind, write in WRITERS.items():
        source = open_data(write(tmp_path / kind, draw_features()), features=True, ignore_labels=True)
        assert source.features is not None and source.num_classes == 1
        assert (source.features.read(EVERY) == draw_features()).all()


# Training from disk


def train(data: Path, out: Path, *more: str) -> int:
    sizes = ["--model", "16,2,2,2", "--batch-size", "4", "--steps", "6", "--log-every", "3", "--sample-every", "0"]
    words = ["train", "--data", str(data), "--out", str(out), "--target", "features", *sizes]
    return main([*words, "--precision", "fp32", "--device", "cpu", *more])


@pytest.mark.training
@pytest.mark.parametrize("kind", WRITERS)
def test_repa_trains_from_disk_and_resumes_bitwise(tmp_path: Path, kind: str) -> None:
    folder = WRITERS[kind](tmp_path / "data", draw_features())
    assert train(folder, tmp_path / "whole") == 0
    assert train(folder, tmp_path / "parts", "--steps", "3") == 0
    assert train(folder, tmp_path / "parts", "--workers", "1") == 0
    assert_same_checkpoint(final(tmp_path / "whole", 6), final(tmp_path / "parts", 6))
    assert records(tmp_path / "whole") == records(tmp_path / "parts")
    config = load_checkpoint(final(tmp_path / "whole", 6)).state["model"]
    assert (config["projection_dim"], config["projector_layers"], config["projector_dim"]) == (WIDTH, 3, 2048)
    assert all(-1 <= line["align"] <= 1 and line["align"] != 0 for line in records(tmp_path / "whole"))


@pytest.mark.training
def test_the_features_decide_the_training_and_others_are_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = (write_folder(tmp_path / name, draw_features(seed)) for name, seed in (("a", 7), ("b", 8)))
    assert train(one, tmp_path / "one") == 0 and train(other, tmp_path / "other") == 0
    align = [records(tmp_path / name)[0]["align"] for name in ("one", "other")]
    assert align[0] != align[1]
    capsys.readouterr()
    assert train(other, tmp_path / "one", "--steps", "9") == 2
    assert "--data holds other latents than it was trained on" in capsys.readouterr().err


@pytest.mark.training
def test_bad_input_at_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = write_flat(tmp_path / "plain", draw(4))
    assert train(plain, tmp_path / "run") == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and "plain holds no features; compute them with sra2-fast prepare --features" in error[0]
    folder = write_folder(tmp_path / "data", draw_features())
    assert train(folder, tmp_path / "run", "--model", "16,2,2,4") == 2
    error = capsys.readouterr().err.splitlines()
    assert "features holds 4 tokens an image, --model 16,2,2,4 has 1; choose another patch size" in error[-1]
    assert train(folder, tmp_path / "run", "--align", "none") == 0, "a plain SiT needs no features"


# Bad input of the readers


def spoil_index(folder: Path, **changes: Any) -> None:
    path = folder / "features.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


FILE = "features/00000/img-features-00000005.npy"
SHARD = "features-00001-of-00002.safetensors"
NAN = np.full((TOKENS, WIDTH), np.nan, np.float16)
BAD: list[tuple[str, Callable[[Path], Any], str]] = [
    ("folder", lambda at: (at / FILE).unlink(), "has no features of .*vae-sd/00000/img-mean-std-00000005.npy"),
    ("folder", lambda at: np.save(at / FILE, np.ones((3, WIDTH))), r"0005.npy must be \(4, 6\), got \(3, 6\); compute"),
    ("folder", lambda at: np.save(at / FILE, np.ones((TOKENS, WIDTH), int)), r"must be \(N, F\) floats, got .*int64"),
    ("folder", lambda at: np.save(at / FILE, NAN), "NaN or infinity in the features of .*0005.npy; compute them again"),
    ("folder", lambda at: np.save(at / "features/x-5.npy", NAN), "has two files of sample 5, "),
    ("folder", lambda at: (at / FILE).write_bytes(b""), "img-features-00000005.npy cannot be read"),
    ("shards", lambda at: (at / SHARD).unlink(), "features-00001-of-00002.safetensors is missing, truncated or was ch"),
    (
        "shards",
        lambda at: (at / SHARD).write_bytes((at / SHARD).read_bytes()[:-1] + b"\1"),
        "002.* is damaged .its che",
    ),
    ("shards", lambda at: spoil_index(at, width=7), r"features.json is damaged \(it is not what was written\); run"),
    ("shards", lambda at: (at / "features.json").write_text("[1"), "features.json cannot be read .*; run the same"),
    ("shards", lambda at: (at / "features.json").write_text("{}"), "features.json is None version None, not sra2_fast"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_features(tmp_path: Path, case: int) -> None:
    kind, spoil, message = BAD[case]
    folder = WRITERS[kind](tmp_path / "data", draw_features())
    spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        list(make_loader(open_data(folder, features=True), batch_size=COUNT, seed=0, num_steps=1))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_features_that_do_not_go_with_the_latents(tmp_path: Path) -> None:
    mixed = write_shards(tmp_path / "mixed", draw_features())
    other = write_shards(tmp_path / "other", draw_features(), seed=5)
    shutil.copy(mixed / "features.json", other / "features.json")
    with pytest.raises(InputError, match="is of other latents than lie beside it; run the same"):
        open_data(other, features=True)
    lightning = write_lightningdit(tmp_path / "lightning", draw(16), None)
    (lightning / "features").mkdir()
    with pytest.raises(InputError, match=r"features is for latents that are a file each, not for .*lightning; move it"):
        open_data(lightning, features=True)
    shutil.copy(mixed / "features.json", lightning / "features.json")
    with pytest.raises(InputError, match=r"features.json goes with shards of latents, not with .*lightning; move it"):
        open_data(lightning, features=True)


def test_mirrored_latents_need_features_of_mirrored_images(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data", draw_features(), draw_features(8))
    index = json.loads((folder / "features.json").read_text())
    source = open_data(folder)
    assert isinstance(source, ShardSource)
    entries = []
    for number, entry in enumerate(index["files"]):
        write_feature_file(folder, entry["file"], "k", draw_features()[: entry["samples"]], None)
        found = finished_feature_file(folder, entry["file"], "k")
        assert found is not None and found.samples == source.shards[number].samples
        entries.append(found)
    about = {key: index[key] for key in ("encoder", "fingerprint", "tokens", "width")}
    write_feature_index(folder, source.shards, entries, has_flips=False, **about)
    with pytest.raises(InputError, match=r"features.json holds no features of mirrored images, the latents do; run"):
        open_data(folder, features=True)
