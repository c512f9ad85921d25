"""The project's own format: written whole or not at all, read through maps, and every kind of damage named."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from sra2_fast.data import make_loader, open_data
from sra2_fast.data.layouts import shards as shards_module
from sra2_fast.data.layouts.shards import ShardSource, finished_shard, shard_name, write_index, write_shard
from sra2_fast.errors import InputError
from sra2_fast.files import make_folder, write_whole
from sra2_fast.schemas import sealed

COUNTS = (5, 0, 7)  # a shard may be empty: all its images were unreadable
SHAPE = (3, 4, 2)


def write_data(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Three shards and their index; returns all moments and labels."""
    draws = np.random.default_rng(0)
    moments = draws.standard_normal((sum(COUNTS), 2 * SHAPE[0], *SHAPE[1:])).astype(np.float32)
    labels = draws.integers(0, 4, sum(COUNTS))
    written, start = [], 0
    for number, count in enumerate(COUNTS):
        part = slice(start, start + count)
        written.append(write_shard(folder, shard_name(number, 3), moments[part], labels[part], f"key {number}"))
        start += count
    write_index(
        folder,
        written,
        shape=list(SHAPE),
        num_classes=4,
        class_names=list("abcd"),
        shift=[0.5, -1.0, 2.0],
        scale=[2.0, 0.25, 1.0],
        vae={"name": "some/vae"},
    )
    return moments, labels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_data(tmp_path)
    return tmp_path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    moments, labels = write_data(tmp_path)
    source = open_data(tmp_path)
    assert (source.num_samples, source.num_classes, source.shape) == (12, 4, SHAPE)
    assert source.has_posterior and source.class_names == list("abcd")
    indices = np.array([11, 0, 4, 5, 5, 6])
    got, got_labels = source.read(indices)
    assert (got == moments[indices]).all() and got.dtype == np.float32 and got.flags.writeable
    assert (got_labels == labels[indices]).all() and got_labels.dtype == np.int64
    info = source.decode_info()
    assert (info.kind, info.vae, info.shift.tolist()) == ("vae", "some/vae", [0.5, -1.0, 2.0])


def test_normalisation_is_per_channel(tmp_path: Path) -> None:
    moments, _ = write_data(tmp_path)
    source = open_data(tmp_path)
    eps = np.random.default_rng(1).standard_normal((12, *SHAPE)).astype(np.float32)
    z = source.latents(moments, eps)
    want = moments[:, :3].astype(np.float64) + moments[:, 3:] * eps
    for channel, (shift, scale) in enumerate([(0.5, 2.0), (-1.0, 0.25), (2.0, 1.0)]):
        np.testing.assert_allclose(z[:, channel], (want[:, channel] - shift) * scale, rtol=1e-6, atol=1e-6)
    means = source.latents(moments, None)
    np.testing.assert_allclose(means[:, 1], (moments[:, 1] + 1.0) * 0.25, rtol=1e-6, atol=1e-6)


def test_latents_without_a_std_are_written_with_zeros(tmp_path: Path) -> None:
    """docs/data.md says so to those who bring latents that were sampled already: z is then the same at every step."""
    moments, labels = write_data(tmp_path)
    moments[:, 3:] = 0
    write_index(
        tmp_path,
        [write_shard(tmp_path, shard_name(0, 1), moments, labels, key="mine")],
        shape=list(SHAPE),
        num_classes=4,
        class_names=None,
        shift=[0.0] * 3,
        scale=[1.0] * 3,
        vae=None,
    )
    first, second = make_loader(open_data(tmp_path), batch_size=12, seed=0, num_steps=2)
    for batch in (first, second):
        assert sorted(batch.latents.flatten().tolist()) == sorted(moments[:, :3].flatten().tolist())


def test_other_tools_can_read_the_shards(tmp_path: Path) -> None:
    moments, labels = write_data(tmp_path)
    tensors = load_file(tmp_path / "latents-00002-of-00003.safetensors")
    assert (tensors["moments"] == moments[5:]).all() and (tensors["labels"] == labels[5:]).all()


def test_moments_are_mapped_not_loaded(folder: Path) -> None:
    source = open_data(folder)
    assert isinstance(source, ShardSource)
    assert isinstance(source._file(0).moments(), np.memmap)
    assert len(pickle.dumps(source)) < 4096  # a worker process gets names, not arrays
    again = pickle.loads(pickle.dumps(source))
    assert (again.read(np.arange(12))[0] == source.read(np.arange(12))[0]).all()


def test_batches_from_shards_with_and_without_workers(folder: Path) -> None:
    source = open_data(folder)
    for workers in (0, 1):
        batches = list(make_loader(source, batch_size=6, seed=1, num_steps=2, num_workers=workers))
        assert sorted(batches[0].labels.tolist() + batches[1].labels.tolist()) == sorted(source.read(np.arange(12))[1])


def test_reading_ahead_covers_each_block_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "BLOCK_SIZE", 4)
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, length, advice: asked.append((offset, length)))
    source = open_data(folder)
    source.will_need(np.array([3, 9, 2, 4, 8]))  # blocks 0..3, 4..7 (crosses the empty shard) and 8..11
    row = 2 * SHAPE[0] * SHAPE[1] * SHAPE[2] * 4
    assert [length // row for _, length in asked] == [4, 1, 3, 4]
    first, last = source._file(0).moments(), source._file(2).moments()
    assert [offset for offset, _ in asked] == [
        first.offset,
        first.offset + 4 * row,
        last.offset,
        last.offset + 3 * row,
    ]


def test_a_finished_shard_is_recognised_and_a_changed_one_is_not(folder: Path) -> None:
    name = shard_name(0, 3)
    found = finished_shard(folder, name, "key 0")
    assert found is not None and found.samples == 5
    assert finished_shard(folder, name, "another key") is None
    assert finished_shard(folder, shard_name(7, 9), "key 0") is None
    _flip_a_byte(folder / name)
    assert finished_shard(folder, name, "key 0") is None


def test_what_is_recorded_is_not_told_again(folder: Path) -> None:
    with pytest.raises(InputError, match=r"records its own normalisation; leave out --latent-scale 0.5"):
        open_data(folder, latent_scale=0.5)
    with pytest.raises(InputError, match=r"digits records its own normalisation; leave out --latent-shift 1,2"):
        open_data("digits", latent_shift="1,2")


def test_labels_can_be_ignored(folder: Path) -> None:
    source, labelled = open_data(folder, ignore_labels=True), open_data(folder)
    values, labels = source.read(np.arange(12))
    assert source.num_classes == 1 and not labels.any() and labels.dtype == np.int64
    assert (values == labelled.read(np.arange(12))[0]).all()
    assert (source.shape, source.has_posterior, source.block_size) == (SHAPE, True, labelled.block_size)
    assert (source.describe(7), source.vae) == (labelled.describe(7), "some/vae")
    (batch,) = make_loader(source, batch_size=6, seed=1, num_steps=1)
    assert batch.labels.tolist() == [0] * 6


# Flips


@pytest.fixture
def flipped_folder(tmp_path: Path) -> Path:
    """Three shards whose flips are 100 more than the moments."""
    (tmp_path / "plain").mkdir()
    moments, labels = write_data(tmp_path / "plain")
    parts = [slice(0, 5), slice(5, 5), slice(5, 12)]
    written = [
        write_shard(tmp_path, shard_name(number, 3), moments[part], labels[part], key="mine", flips=moments[part] + 100)
        for number, part in enumerate(parts)
    ]
    about = json.loads((tmp_path / "plain" / "index.json").read_text())
    kept = {key: about[key] for key in ("shape", "num_classes", "class_names", "shift", "scale", "vae")}
    write_index(tmp_path, written, has_flips=True, **kept)
    return tmp_path


def test_flips_are_read_where_they_are_asked_for(flipped_folder: Path) -> None:
    source, plain = open_data(flipped_folder), open_data(flipped_folder / "plain")
    assert source.has_flips and not plain.has_flips and source.fingerprint() != plain.fingerprint()
    indices, flipped = np.array([11, 0, 4, 5, 5, 6]), np.array([True, False, True, True, False, True])
    want, want_labels = plain.read(indices)
    got, labels = source.read_flipped(indices, flipped)
    assert (got == want + np.float32(100) * flipped[:, None, None, None]).all() and (labels == want_labels).all()
    assert (source.read(indices)[0] == want).all()
    unlabelled = open_data(flipped_folder, ignore_labels=True)
    assert unlabelled.has_flips and (unlabelled.read_flipped(indices, flipped)[0] == got).all()
    assert not unlabelled.read_flipped(indices, flipped)[1].any()


def test_without_flips_the_index_is_of_version_1(flipped_folder: Path) -> None:
    """What an earlier version can read stays readable by it; and the checksum is that of before."""
    plain, flips = (
        json.loads((folder / "index.json").read_text()) for folder in (flipped_folder / "plain", flipped_folder)
    )
    assert (plain["version"], "has_flips" in plain, flips["version"], flips["has_flips"]) == (1, False, 2, True)
    assert plain["shards"][0]["checksum"] != flips["shards"][0]["checksum"]


def test_a_damaged_flip_and_a_shard_without_flips(flipped_folder: Path) -> None:
    path = flipped_folder / shard_name(2, 3)
    whole = path.read_bytes()
    data = bytearray(whole)
    flips = load_file(path)["moments_flip"]
    data[whole.index(flips.tobytes()) + 2] ^= 1
    path.write_bytes(data)
    refused(flipped_folder, "00002-of-00003.safetensors is damaged .its checksum differs from index.json.; run the")
    path.write_bytes(whole.replace(b"[7,6,4,2]", b"[7,6,2,4]", 1))
    refused(flipped_folder, "no shard of latents .shapes of moments and moments_flip disagree.")
    path.write_bytes(whole)
    _edit_index(flipped_folder, has_flips=False)
    refused(flipped_folder, "latents-00000-of-00003.safetensors does not belong to index.json")


def test_reading_ahead_covers_the_flips_too(flipped_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, length, advice: asked.append((offset, length)))
    source = open_data(flipped_folder)
    source.will_need(np.arange(12))
    opened = [source._file(number) for number in (0, 2)]
    want = [(array.offset, array.nbytes) for file in opened for array in (file.moments(), file.flips())]
    assert asked == want


# Damage


def _flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def _edit_index(folder: Path, **changes: object) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(sealed({**index, **changes})))


def refused(folder: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        open_data(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_a_wrong_and_an_empty_path(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere does not exist; give `digits` or a folder of latents")
    refused(tmp_path, "is empty; make latents with sra2-fast prepare --images")
    (tmp_path / "notes.txt").write_text("x")
    refused(
        tmp_path,
        "holds no known layout .sra2-fast shards, REPA/SRA vae-sd .* flat .npy files.; make latents with sra2-fast "
        "prepare, "
        "or bring your own as docs/data.md says",
    )
    refused(tmp_path / "notes.txt", "notes.txt is a file; give the folder")


def test_an_unfinished_folder(folder: Path) -> None:
    (folder / "index.json").unlink()
    refused(folder, "has no index.json, so it is not finished; run the same sra2-fast prepare .or convert-data. again")


def test_a_truncated_shard(folder: Path) -> None:
    path = folder / shard_name(2, 3)
    size = path.stat().st_size
    os.truncate(path, size - 100)
    refused(folder, f"00002-of-00003.safetensors is truncated or was changed: {size - 100} bytes instead of {size}")
    os.truncate(path, 3)
    assert finished_shard(folder, path.name, "key 2") is None


def test_a_missing_shard(folder: Path) -> None:
    (folder / shard_name(0, 3)).unlink()
    refused(
        folder, "latents-00000-of-00003.safetensors is missing; run the same sra2-fast prepare .or convert-data. again"
    )


def test_a_changed_shard(folder: Path) -> None:
    _flip_a_byte(folder / shard_name(2, 3))
    refused(folder, "00002-of-00003.safetensors is damaged .its checksum differs from index.json.; run the same")


def test_checksums_of_large_data_are_left_to_verify(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "VERIFY_AT_OPEN_BYTES", 1000)
    _flip_a_byte(folder / shard_name(2, 3))
    source = open_data(folder)
    assert isinstance(source, ShardSource)
    with pytest.raises(InputError, match=r"latents-00002-of-00003.safetensors is damaged"):
        source.verify()


def test_a_shard_of_another_data_set(folder: Path) -> None:
    other = write_shard(folder, shard_name(0, 3), np.ones((5, 8, 2, 2), np.float32), np.zeros(5, np.int64), "key 0")
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0].update(bytes=other.bytes, checksum=other.checksum)
    _edit_index(folder, shards=index["shards"])
    refused(folder, "latents-00000-of-00003.safetensors does not belong to index.json")


def test_a_file_that_is_no_shard(folder: Path) -> None:
    path = folder / shard_name(0, 3)
    size = path.stat().st_size
    path.write_bytes(b"\x02" + b"\0" * 7 + b"{}" + b"\0" * (size - 10))
    refused(folder, "latents-00000-of-00003.safetensors is truncated or no shard of latents .'moments'.")
    path.write_bytes(b"\x09" + b"\0" * 7 + b"not json!" + b"\0" * (size - 17))
    refused(folder, "latents-00000-of-00003.safetensors cannot be read")


def test_a_label_out_of_range_names_its_sample(folder: Path) -> None:
    labels = np.array([0, 1, 9, 2, 3])
    shard = write_shard(folder, shard_name(0, 3), np.ones((5, 6, 4, 2), np.float32), labels, "key 0")
    refused(folder, "latents-00000-of-00003.safetensors holds other latents than index.json says; run the same")
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["checksum"] = shard.checksum
    _edit_index(folder, shards=index["shards"])
    refused(folder, "label out of range: .*latents-00000-of-00003.safetensors, sample 2 has label 9, .* says 4 classes")
    with pytest.raises(InputError, match=r"label out of range: .* has 4 classes, the model 2"):
        write_data(folder)
        open_data(folder, num_classes=2)


def test_a_nan_names_its_file_and_sample(tmp_path: Path) -> None:
    moments, labels = write_data(tmp_path)
    moments[7, 1, 0, 0] = np.nan
    shard = write_shard(tmp_path, shard_name(2, 3), moments[5:], labels[5:], "key 2")
    index = json.loads((tmp_path / "index.json").read_text())
    index["shards"][2]["checksum"] = shard.checksum
    _edit_index(tmp_path, shards=index["shards"])
    with pytest.raises(InputError, match=r"NaN or infinity in .*latents-00002-of-00003.safetensors, sample 2; encode"):
        list(make_loader(open_data(tmp_path), batch_size=12, seed=0, num_steps=1))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": "other"}, "index.json is not an index of sra2_fast latents"),
        ({"version": 3}, "index.json has version 3; this version reads 1 to 2, a newer one that one"),
        ({"version": 2, "has_flips": True}, "00000-of-00003.safetensors does not belong to index.json"),
        ({"shape": [3, 4]}, "index.json is damaged"),
        ({"shift": [0.0]}, "index.json is damaged .shape, shift and scale disagree."),
        ({"shards": [{"file": "x"}]}, "index.json is damaged"),
        ({"shards": []}, "holds no samples"),
    ],
)
def test_a_damaged_index(folder: Path, changes: dict[str, object], match: str) -> None:
    _edit_index(folder, **changes)
    refused(folder, match)


def test_an_index_that_is_no_json(folder: Path) -> None:
    (folder / "index.json").write_text("{")
    refused(folder, "index.json cannot be read")


# Writing


def test_a_full_disk_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write .*00000-of-00003.safetensors \(No space left on device\); "):
        write_shard(folder, shard_name(0, 3), np.ones((2, 6, 4, 2), np.float32), np.zeros(2, np.int64), "key")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a", b"old")

    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write into .*file.out \(Not a directory\); choose another --out"):
        make_folder(tmp_path / "file" / "out")
