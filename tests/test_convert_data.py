"""`sra2-fast convert-data`: any layout into shards that train the same, whatever was stopped or damaged on the way."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from public_data import (
    COUNT,
    LABELS,
    draw,
    write_dataset_json,
    write_fast_dit,
    write_flat,
    write_lightningdit,
    write_repa_e,
)

from sra2_fast import convert_data
from sra2_fast.cli import main
from sra2_fast.data import LatentSource, open_data
from sra2_fast.data.precision import PRECISIONS, to_float32, to_stored
from sra2_fast.errors import InputError
from sra2_fast.files import FolderLock
from sra2_fast.randomness import Stream, generator

ORDER = generator(Stream.PREPARE, seed=0).permutation(COUNT)
EVERY = np.arange(COUNT)


def convert(data: Path, out: Path, *more: str) -> int:
    return main(
        ["convert-data", "--data", str(data), "--out", str(out), "--shard-size", "5", "--num-workers", "0", *more]
    )


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def assert_same_samples(converted: LatentSource, source: LatentSource) -> None:
    for flipped in (False, True)[: 1 + source.has_flips]:
        chosen = np.full(COUNT, flipped)
        reads = (
            one.read_flipped if one.has_flips else lambda rows, _, one=one: one.read(rows)
            for one in (converted, source)
        )
        got, want = next(reads)(EVERY, chosen), next(reads)(ORDER, chosen)
        assert (got[0] == want[0]).all() and (got[1] == want[1]).all()
    for name in ("shape", "num_classes", "has_posterior", "has_flips", "has_labels"):
        assert getattr(converted, name) == getattr(source, name), name
    assert converted.scale.tolist() == source.scale.tolist() and converted.shift.tolist() == source.shift.tolist()


@pytest.mark.parametrize("layout", ["vae-sd", "fast-DiT", "LightningDiT", "REPA-E", "SR-DiT", "flat"])
def test_every_layout_becomes_shards(tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    if layout == "vae-sd":
        write_dataset_json(data / "vae-sd", np.abs(draw(8)), "img-mean-std-")
    elif layout == "fast-DiT":
        write_fast_dit(data, draw(4))
    elif layout == "LightningDiT":
        write_lightningdit(data, draw(16), draw(16, seed=1))
    elif layout == "REPA-E":
        write_repa_e(data, np.abs(draw(64)))
    elif layout == "SR-DiT":
        write_dataset_json(data / "vae-in", draw(32, spread=3), "img-latents-")
    else:
        write_flat(data, draw(4))
    assert convert(data, out) == 0
    assert "12 latents of " in capsys.readouterr().out
    converted = open_data(out)
    assert_same_samples(converted, open_data(data))
    assert [path.name for path in sorted(out.glob("*.safetensors"))] == [
        f"latents-{number:05d}-of-00003.safetensors" for number in range(3)
    ]
    # What an earlier version reads rightly keeps its number.
    index = json.loads((out / "index.json").read_text())
    assert index["version"] == (1 if layout in ("vae-sd", "REPA-E") else 2)
    again, second = open_data(out), tmp_path / "second"
    assert convert(out, second) == 0  # shards are a layout too
    assert open_data(second).num_samples == again.num_samples


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precisions_round_once(tmp_path: Path, precision: str) -> None:
    latents, flipped = draw(16), draw(16, seed=1)
    data, out = write_lightningdit(tmp_path / "data", latents, flipped), tmp_path / "out"
    assert convert(data, out, "--precision", precision) == 0
    source = open_data(out)
    for chosen, stored in ((False, latents), (True, flipped)):
        want = torch.from_numpy(stored[ORDER]).to(getattr(torch, precision)).float().numpy()
        assert (source.read_flipped(EVERY, np.full(COUNT, chosen))[0] == want).all()
    size = (out / "latents-00000-of-00003.safetensors").stat().st_size
    assert 5 * 2 * 16 * 16 * 2 < size < 5 * 2 * 16 * 16 * 2 + 1000
    from safetensors.torch import load_file

    opened = load_file(out / "latents-00000-of-00003.safetensors")
    assert opened["latents"].dtype == getattr(torch, precision)  # plain safetensors to anyone


def test_bfloat16_is_torch_s() -> None:
    values = np.concatenate(
        [draw(4).ravel(), np.float32([0, -0.0, np.inf, -np.inf, 3e38, 1e-40, 1.00390625, 1.01171875])]
    )
    want = torch.from_numpy(values).bfloat16()
    assert (to_stored(values, "bfloat16") == want.view(torch.uint16).numpy()).all()
    assert (to_float32(to_stored(values, "bfloat16")) == want.float().numpy()).all()
    assert np.isnan(to_float32(to_stored(np.float32([np.nan]), "bfloat16"))).all()
    assert all(to_stored(values[:4], name).dtype == dtype for name, (_, dtype) in PRECISIONS.items())


def test_labels_can_be_left_out(tmp_path: Path) -> None:
    data, out = write_fast_dit(tmp_path / "data", draw(4)), tmp_path / "out"
    assert convert(data, out, "--ignore-labels") == 0
    source = open_data(out)
    assert (source.has_labels, source.num_classes) == (False, 1) and not source.read(EVERY)[1].any()
    assert sorted(open_data(data).read(EVERY)[1].tolist()) == sorted(LABELS)


def test_workers_change_no_byte(tmp_path: Path) -> None:
    data = write_lightningdit(tmp_path / "data", draw(16), draw(16, seed=1))
    assert convert(data, tmp_path / "a") == 0 and convert(data, tmp_path / "b", "--num-workers", "2") == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_fast_dit(tmp_path / "data", draw(4))
    assert convert(data, tmp_path / "whole") == 0
    written = convert_data._write_shards

    def stopped(*args: object) -> object:
        shards = written(*args)  # type: ignore[arg-type]
        yield next(shards)
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_data, "_write_shards", stopped)
    assert convert(data, tmp_path / "parts") == 130
    assert "interrupted with 5 of 12 latents in finished shards; run the same" in capsys.readouterr().err
    assert not (tmp_path / "parts" / "index.json").exists()
    monkeypatch.undo()
    before = (tmp_path / "parts" / "latents-00000-of-00003.safetensors").stat().st_mtime_ns
    assert convert(data, tmp_path / "parts") == 0
    assert (tmp_path / "parts" / "latents-00000-of-00003.safetensors").stat().st_mtime_ns == before, "kept"
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    index = tmp_path / "parts" / "index.json"
    index.write_bytes(index.read_bytes().replace(b"0.18215", b"0.18216"))
    capsys.readouterr()
    assert convert(data, tmp_path / "parts") == 0
    assert "index.json is damaged (it is not what was written); it is made anew" in capsys.readouterr().out
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    damaged = tmp_path / "parts" / "latents-00001-of-00003.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    capsys.readouterr()
    assert convert(data, tmp_path / "parts") == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert "already complete" not in capsys.readouterr().out
    assert convert(data, tmp_path / "parts") == 0
    assert "already complete, all checksums right: 12 latents of 4x4x4" in capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], code: int, words: str) -> None:
    error = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert code == 2 and error.startswith("sra2-fast convert-data: ") and words in error, error


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_fast_dit(tmp_path / "data", draw(4)), tmp_path / "out"
    refused(capsys, convert(tmp_path / "nowhere", out), "nowhere does not exist; give `digits` or a folder of latents")
    refused(capsys, convert(data, data), "is --data itself; give another folder")
    refused(capsys, convert(data, out, "--shard-size", "0"), "--shard-size must be 1 or more, got 0")
    refused(capsys, convert(data, out, "--num-workers", "-1"), "--num-workers must be 0 or more, got -1")
    refused(capsys, convert(Path("digits"), out), "--data digits is held in memory and needs no shards")
    refused(capsys, convert(data, out, "--precision", "float8"), "argument --precision: invalid choice: 'float8'")
    assert not out.exists()
    assert convert(data, out) == 0
    refused(
        capsys, convert(data, out, "--precision", "float16"), "was begun with --precision float32, not float16; give"
    )
    refused(capsys, convert(data, out, "--ignore-labels"), "was begun with other data")
    (out / "convert-data.json").write_text("[1")
    refused(capsys, convert(data, out), "convert-data.json cannot be read")
    (out / "convert-data.json").unlink()
    refused(capsys, convert(data, out), "holds latents of another origin; give another folder")
    with pytest.raises(InputError, match="some values are above 65504, the largest of float16; store them in bfloat16"):
        to_stored(np.float32([7e4]), "float16")


def test_two_processes_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_fast_dit(tmp_path / "data", draw(4)), tmp_path / "out"
    out.mkdir()
    with contextlib.closing(FolderLock(out, "test")):
        assert convert(data, out) == 75
    assert "--out" in capsys.readouterr().err
    assert convert(data, out) == 0


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_nan_found_on_the_way_leaves_nothing_half_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sra2_fast.data.source.SPREAD_SAMPLES", 2)  # so that opening does not see it
    data, out = write_flat(tmp_path / "data", draw(4)), tmp_path / "out"
    np.save(data / "5.npy", np.full((4, 4, 4), np.nan, np.float32))
    refused(capsys, convert(data, out, "--num-workers", workers), "NaN or infinity in")
    assert not list(out.glob("*.partial")) and not (out / "index.json").exists()
    np.save(data / "5.npy", draw(4)[5])
    shutil.rmtree(out)
    assert convert(data, out) == 0
