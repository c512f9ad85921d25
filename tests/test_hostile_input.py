"""Files and options that nobody meant: one line each, that names them, where there were tracebacks and hangs."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import loss_batch, random_model

from sra2_fast import SRA2Loss
from sra2_fast.data import open_data
from sra2_fast.data.layouts.npy_files import read_floats
from sra2_fast.data.layouts.shards import shard_name, write_index, write_shard
from sra2_fast.errors import InputError
from sra2_fast.schemas import SEAL
from sra2_fast.train.options import TrainOptions, read_config

DEEP = b"[" * 100_000


def one_line(match: str) -> Any:
    return pytest.raises(InputError, match=rf"\A[^\n]*{match}[^\n]*\Z")


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def with_header(header: str) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def zip_bytes() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", npy(np.ones((8, 4, 4), np.float32)))
    return file.getvalue()


def header(descr: str, shape: str) -> bytes:
    return with_header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        zip_bytes(),
        npy(np.zeros((8, 4, 4), dtype="V4")),
        npy(np.zeros((8, 4, 4), dtype=np.complex64)),
        npy(np.full((8, 4, 4), "text")),
        npy(np.zeros((8, 4, 4), dtype=bool)),
        npy(np.zeros((8, 4, 4), dtype=np.int32)),
        npy(np.zeros((8, 4, 4), dtype=[("a", "<f4")])),
        npy(np.zeros((8, 4), dtype=np.float32)),
        npy(np.zeros((8, 4, 4), dtype=np.float32))[:-1],
        header("'<f4'", "(8, 1099511627776, 8)"),
        header("'<f4'", f"({10**30}, 4, 4)"),
        header("'<f4'", "(-1, 4, 4)"),
        header("'<f4'", "(4294967296, 4294967296, 1)"),
        header("'<f4'", "(" * 300 + ")" * 300),
        header("'|O'", "(8, 4, 4)"),
        header("'<f4", "(8, 4, 4)"),
        header("7", "(8, 4, 4)"),
        with_header("{}"),
        with_header("0" * 9000),
    ],
    ids=lambda data: f"{len(data)} bytes",
)
def test_what_is_no_npy_of_latents_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(data)
    with one_line(r"data: .*a\.npy "):
        read_floats(tmp_path / "a.npy")


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("a.npy", "a.toml"):
        os.mkfifo(tmp_path / name)
    with one_line(r"a\.npy cannot be read \(it is no \.npy file\)"):
        read_floats(tmp_path / "a.npy")
    with one_line(r"a\.toml: not a regular file"):
        read_config(tmp_path / "a.toml")
    folder = vae_sd(tmp_path)
    (folder / "dataset.json").unlink()
    os.mkfifo(folder / "dataset.json")
    with one_line(r"dataset\.json is no regular file"):
        open_data(folder)


def vae_sd(folder: Path) -> Path:
    """Two samples in REPA's layout."""
    folder = folder / "vae-sd"
    folder.mkdir()
    names = [f"img-mean-std-{number:08d}.npy" for number in range(2)]
    for name in names:
        values = np.random.default_rng(0).normal(size=(8, 4, 4)).astype(np.float32) * 5
        values[4:] = 0.1
        np.save(folder / name, values)
    (folder / "dataset.json").write_text(json.dumps({"labels": [[name, 0] for name in names]}))
    return folder


FIRST = "img-mean-std-00000000.npy"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (DEEP, r"dataset\.json is nested too deeply; write it again"),
        (b"\xff\xff", r"dataset\.json cannot be read"),
        (b"[]", r"dataset\.json cannot be read"),
        (b"7", r"dataset\.json cannot be read"),
        (json.dumps({"labels": [[FIRST, 0], [FIRST, 1]]}).encode(), rf"{FIRST} has two labels, 0 and 1; leave one"),
        (json.dumps({"labels": [[FIRST, float("inf")]]}).encode(), r"label out of range"),
        (json.dumps({"labels": [[FIRST, True]]}).encode(), r"label out of range"),
        (json.dumps({"labels": [["x" * 300, 0]]}).encode(), r"x is missing"),
    ],
)
def test_a_dataset_json_that_nobody_meant_is_named(tmp_path: Path, text: bytes, match: str) -> None:
    folder = vae_sd(tmp_path)
    (folder / "dataset.json").write_bytes(text)
    with one_line(match):
        open_data(folder)


SHARD = {"file": "latents-00000-of-00001.safetensors", "samples": 2, "bytes": 3, "checksum": "0" * 64}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"shape": [4, 8]}, r"shape\[2\] is missing"),
        ({"shape": [float("inf"), 8, 8]}, r"shape\[0\]: input should be a valid integer, got inf"),
        ({"shape": [True, 8, 8]}, r"shape\[0\]"),
        ({"shape": 4}, r"shape: "),
        ({"num_classes": float("nan")}, r"num_classes: input should be a valid integer, got nan"),
        ({"num_classes": 10**400}, r"num_classes: "),
        ({"num_classes": 0}, r"num_classes: input should be greater than or equal to 1, got 0"),
        ({"class_names": ["a"]}, r"class_names and num_classes disagree"),
        ({"class_names": [1, 2, 3]}, r"class_names\[0\]: input should be a valid string, got 1"),
        ({"scale": [0.0] * 4}, r"scale\[0\]: input should be greater than or equal to .*, got 0\.0"),
        ({"scale": [float("nan")] * 4}, r"scale\[0\]: .*, got nan"),
        ({"scale": [-1.0] * 4}, r"scale\[0\]: .*, got -1\.0"),
        ({"scale": ["1"] * 4}, r"scale\[0\]: input should be a valid number, got '1'"),
        ({"shift": [float("inf")] * 4}, r"shift\[0\]: .*, got inf"),
        ({"shift": [1e300] * 4}, r"shift\[0\]: .*, got 1e\+300"),
        ({"shift": [0.0]}, r"shape, shift and scale disagree"),
        ({"vae": "sd"}, r"vae: "),
        ({"vae": {"name": 7}}, r"vae\.name: input should be a valid string, got 7"),
        ({"shards": {}}, r"shards: input should be a valid list"),
        ({"shards": [7]}, r"shards\[0\]: "),
        ({"shards": [{**SHARD, "samples": float("inf")}]}, r"shards\[0\]\.samples: .*, got inf"),
        ({"shards": [{**SHARD, "samples": -1}]}, r"shards\[0\]\.samples: .*, got -1"),
        ({"shards": [{**SHARD, "samples": True}]}, r"shards\[0\]\.samples: "),
        ({"shards": [{**SHARD, "file": "../secret"}]}, r"shards\[0\]\.file: "),
        ({"shards": [{**SHARD, "file": "x" * 300}]}, r"shards\[0\]\.file: "),
        ({"shards": [{**SHARD, "checksum": 7}]}, r"shards\[0\]\.checksum: "),
        ({"shards": [{**SHARD, "unreadable": "a"}]}, r"shards\[0\]\.unreadable: "),
    ],
)
def test_what_may_not_stand_in_an_index_is_named(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    index = {name: value for name, value in json.loads(write_data(tmp_path).read_text()).items() if name != SEAL}
    (tmp_path / "index.json").write_text(json.dumps({**index, **change}))
    with one_line(rf"index\.json is damaged \({match}.*; run the same sra2-fast prepare"):
        open_data(tmp_path)


def write_data(folder: Path) -> Path:
    shard = write_shard(folder, shard_name(0, 1), np.ones((2, 8, 8, 8), np.float32), np.array([0, 2]), key="mine")
    about: dict[str, Any] = {"shape": [4, 8, 8], "num_classes": 3, "class_names": None, "vae": None}
    write_index(folder, [shard], shift=[0.0] * 4, scale=[1.0] * 4, **about)
    return folder / "index.json"


def test_every_changed_digit_of_an_index_is_noticed(tmp_path: Path) -> None:
    """A changed digit of the scale loaded, and every latent was another one."""
    path = write_data(tmp_path)
    text = path.read_bytes()
    open_data(tmp_path)
    for place in (at for at, byte in enumerate(text) if chr(byte).isalnum()):
        path.write_bytes(text[:place] + bytes([text[place] ^ 1]) + text[place + 1 :])
        with one_line(r"index\.json "):
            open_data(tmp_path)


@pytest.mark.parametrize("text", [DEEP, b"{", b"\xff\xff", b"[1]", b"null", b""])
def test_an_index_that_is_no_object_is_named(tmp_path: Path, text: bytes) -> None:
    write_data(tmp_path).write_bytes(text)
    with one_line(r"index\.json .*; run the same sra2-fast prepare"):
        open_data(tmp_path)


def test_paths_that_no_file_can_have_are_named(tmp_path: Path) -> None:
    for name in ("x" * 300, "a\0b"):
        with one_line(r"data: .* does not exist; give"):
            open_data(tmp_path / name)


def test_deep_toml_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"lr = " + DEEP)
    with one_line(r"a\.toml: not valid TOML: nested too deeply"):
        read_config(tmp_path / "a.toml")


@pytest.mark.parametrize("option", ["log_every", "batch_size", "num_classes"])
def test_counts_that_no_memory_holds_are_refused(option: str) -> None:
    changes: dict[str, Any] = {option: 10**12}
    with one_line(rf"--{option.replace('_', '-')} must be from 1 to 1,000,000, got 1000000000000"):
        TrainOptions(out="run", **changes)


def test_types_that_the_loss_cannot_take_are_named() -> None:
    model, batch = random_model().float(), loss_batch()
    labels = batch["labels"]
    loss_fn = SRA2Loss()
    with one_line(r"SRA2Loss: latents must be float32 or bfloat16 for this model, got torch\.float64"):
        loss_fn(model, batch["latents"], labels)
    for dtype in (torch.int8, torch.uint8, torch.float32, torch.bool):
        with one_line(r"SRA2Loss: labels must be int64, got torch\."):
            loss_fn(model, batch["latents"].float(), labels.to(dtype))
