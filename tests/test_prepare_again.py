"""The same `sra2-fast prepare` again: what was encoded is kept, and other inputs are no longer taken for the same."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import COUNT, SHARD_SIZE, command, contents, refused

from sra2_fast.cli import main
from sra2_fast.data import open_data
from sra2_fast.errors import InputError
from sra2_fast.files import FolderLock
from sra2_fast.prepare import encode as encode_module
from sra2_fast.prepare import shard_work
from sra2_fast.prepare.listing import list_images
from sra2_fast.randomness import Stream, generator
from sra2_fast.vae.autoencoder import fingerprint, load_vae

pytest.importorskip("PIL.Image")
pytest.importorskip("diffusers")
pytest_plugins = ["photos"]
StopAt = Callable[..., list[int]]
BATCHES = 7  # of 2 in 14 images, where a shard holds them all
ONE_SHARD = ("--shard-size", "100")


class Killed(BaseException):
    """As SIGKILL: nothing of the program's own runs after it."""


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> StopAt:
    """stop_at(call, error) makes that call of `encode` raise it (no call: none); returns how many images each got."""
    start_encoding = encode_module.start_encoding

    def install(call: int = 0, error: type[BaseException] = Killed) -> list[int]:
        sizes: list[int] = []

        def watched(vae: torch.nn.Module, pixels: torch.Tensor, precision: str) -> Callable[[], np.ndarray]:
            sizes.append(len(pixels))
            if len(sizes) == call:
                raise error
            return start_encoding(vae, pixels, precision)

        monkeypatch.setattr(encode_module, "start_encoding", watched)
        return sizes

    return install


# Going on


@pytest.fixture(scope="module")
def one_shard(photos: Path, vae_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one_shard") / "out"
    assert main(command(photos, vae_path, out, *ONE_SHARD)) == 0
    return out


def test_ctrl_c_below_one_shard_keeps_what_is_encoded(
    photos: Path,
    vae_path: Path,
    one_shard: Path,
    tmp_path: Path,
    stop_at: StopAt,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Work was kept in whole shards of 4,096: with fewer images every interruption began anew."""
    out = tmp_path / "out"
    for done in (3, 3 + 2):  # twice, so that there are two parts
        stop_at(done + 1 if done == 3 else 3, KeyboardInterrupt)
        assert main(command(photos, vae_path, out, *ONE_SHARD)) == 130
        assert f"interrupted with {2 * done} of {COUNT} images encoded; run the same" in capsys.readouterr().err
    parts = [f"latents-00000-of-00001.part-{first:05d}.safetensors" for first in (0, 3)]
    assert sorted(contents(out)) == [*parts, "prepare.json"]
    sizes = stop_at()
    assert main(command(photos, vae_path, out, *ONE_SHARD)) == 0
    assert len(sizes) == BATCHES - 5
    assert contents(out) == contents(one_shard)


def test_a_kill_below_one_shard_loses_what_came_after_the_last_part(
    photos: Path,
    vae_path: Path,
    one_shard: Path,
    tmp_path: Path,
    stop_at: StopAt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, clock = tmp_path / "out", iter(range(0, 10_000, 20))
    monkeypatch.setattr(shard_work.time, "monotonic", lambda: next(clock))  # a part every second batch
    stop_at(6)
    with pytest.raises(Killed):
        main(command(photos, vae_path, out, *ONE_SHARD))
    assert len(list(out.glob("*.part-*"))) == 2
    sizes = stop_at()
    assert main(command(photos, vae_path, out, *ONE_SHARD)) == 0
    assert len(sizes) == BATCHES - 4
    assert contents(out) == contents(one_shard)


def test_a_damaged_part_is_encoded_again(
    photos: Path, vae_path: Path, one_shard: Path, tmp_path: Path, stop_at: StopAt
) -> None:
    out = tmp_path / "out"
    stop_at(4, KeyboardInterrupt)
    assert main(command(photos, vae_path, out, *ONE_SHARD)) == 130
    (part,) = out.glob("*.part-*")
    data = bytearray(part.read_bytes())
    data[-5] ^= 1
    part.write_bytes(data)
    sizes = stop_at()
    assert main(command(photos, vae_path, out, *ONE_SHARD)) == 0
    assert len(sizes) == BATCHES and contents(out) == contents(one_shard)


def test_unreadable_images_cost_nothing_that_came_before(
    own_photos: Path, vae_path: Path, tmp_path: Path, stop_at: StopAt, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = command(own_photos, vae_path, out, *ONE_SHARD)
    good = (own_photos / "china" / "0.png").read_bytes()
    (own_photos / "china" / "0.png").write_text("no image")
    before = stop_at()
    refused(capsys, arguments, "1 of 14 images cannot be read")
    assert before == [2]  # it is in the second batch
    (own_photos / "china" / "0.png").write_bytes(good)
    after = stop_at()
    assert main(arguments) == 0
    assert len(after) == BATCHES - len(before)


# Other inputs


def test_other_weights_in_the_same_folder_are_refused(
    photos: Path, vae_path: Path, tmp_path: Path, stop_at: StopAt, capsys: pytest.CaptureFixture[str]
) -> None:
    """--vae was compared by its name alone: half of a data set could be of one autoencoder, half of another."""
    from safetensors.torch import load_file, save_file

    own, out = Path(shutil.copytree(vae_path, tmp_path / "vae")), tmp_path / "out"
    stop_at(3, KeyboardInterrupt)
    assert main(command(photos, own, out)) == 130
    stop_at()
    weights = own / "diffusion_pytorch_model.safetensors"
    original = weights.read_bytes()
    state = load_file(weights)
    state["encoder.conv_in.bias"][0] += 1
    save_file(state, weights)
    match = r"out was begun with other weights \(--vae .*vae\) than --vae .*vae holds now; give another --out"
    refused(capsys, command(photos, own, out), match)
    weights.write_bytes(original)
    assert main(command(photos, own, out)) == 0  # finished now
    save_file(state, weights)
    refused(capsys, command(photos, own, out), match)
    index = json.loads((out / "index.json").read_text())
    assert index["prepared_from"]["vae_fingerprint"] == fingerprint(load_vae(str(vae_path)))


def test_another_normalisation_of_the_same_weights_is_another_autoencoder(vae_path: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(vae_path, tmp_path / "vae"))
    before = fingerprint(load_vae(str(own)))
    assert before == fingerprint(load_vae(str(vae_path)))
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}))
    assert fingerprint(load_vae(str(own))) != before


def test_harmless_spellings_are_the_same_input(
    photos: Path,
    vae_path: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`vae/` after `vae`, or a relative path after the absolute one, was refused as another autoencoder."""
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    monkeypatch.chdir(vae_path.parent)
    images = Path(os.path.relpath(photos))
    for spelled in (f"{vae_path}/", vae_path.name, f"./{vae_path.name}/."):
        arguments = command(images, vae_path, out)
        arguments[arguments.index("--vae") + 1] = spelled
        assert main(arguments) == 0
        assert "already complete" in capsys.readouterr().out
    assert contents(out) == contents(whole)
    copy = shutil.copytree(vae_path, tmp_path / "copy")
    assert main(command(images, Path(copy), out)) == 0
    assert "already complete" in capsys.readouterr().out


def swap(photos: Path, first: str, second: str) -> None:
    """Exchange the contents of two pictures and make them equally long: names, sizes and times stay."""
    paths = [photos / first, photos / second]
    pictures = [path.read_bytes() for path in paths]
    longest = max(map(len, pictures))
    for path, picture in zip(paths, pictures[::-1], strict=True):
        path.write_bytes(picture.ljust(longest, b"\0"))
        os.utime(path, ns=(1, 1))


def test_other_pictures_under_the_same_names_are_refused(
    own_photos: Path, vae_path: Path, tmp_path: Path, stop_at: StopAt, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images were known by name and size: others of the same size passed, of other sizes replaced the finished ones."""
    out = tmp_path / "out"
    swap(own_photos, "china/0.png", "flower/0.png")
    assert main(command(own_photos, vae_path, out)) == 0
    before = contents(out)
    swap(own_photos, "china/0.png", "flower/0.png")  # sizes and times as they were
    sizes = stop_at()
    match = r"out is finished, and .*photos holds other images now \((china|flower)/0.png was changed\); give another"
    refused(capsys, command(own_photos, vae_path, out), match)
    (own_photos / "china" / "0.png").write_bytes((own_photos / "china" / "2.png").read_bytes())
    refused(capsys, command(own_photos, vae_path, out), match)
    assert contents(out) == before and not sizes


def test_a_damaged_shard_is_not_made_anew_from_other_pictures(
    own_photos: Path, vae_path: Path, tmp_path: Path, stop_at: StopAt, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(command(own_photos, vae_path, out)) == 0
    images = list_images(own_photos)
    order = generator(Stream.PREPARE, seed=0).permutation(COUNT)
    changed = own_photos / images.files[order[SHARD_SIZE]]  # the first of the second shard
    changed.write_bytes(changed.read_bytes() + b"\0")
    os.truncate(out / "latents-00001-of-00003.safetensors", 100)
    before, sizes = contents(out), stop_at()
    match = r"holds other images now \(those of latents-00001-of-00003.safetensors were changed\); give another --out"
    refused(capsys, command(own_photos, vae_path, out), match)
    assert contents(out) == before and not sizes


@pytest.mark.parametrize("shards", [(), ONE_SHARD])
def test_pictures_changed_before_the_end_are_encoded_again(
    own_photos: Path, vae_path: Path, tmp_path: Path, stop_at: StopAt, shards: tuple[str, ...]
) -> None:
    """Whether a whole shard was made from them, or a part of one."""
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    swap(own_photos, "china/0.png", "flower/0.png")
    stop_at(7, KeyboardInterrupt)
    assert main(command(own_photos, vae_path, out, *shards)) == 130
    swap(own_photos, "china/0.png", "flower/0.png")
    stop_at()
    assert main(command(own_photos, vae_path, out, *shards)) == 0
    assert main(command(own_photos, vae_path, fresh, *shards)) == 0
    assert contents(out) == contents(fresh) and open_data(out).num_samples == COUNT


def test_a_folder_of_an_earlier_version(
    photos: Path, vae_path: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    index = json.loads((out / "index.json").read_text())
    del index["prepared_from"]["pictures"], index["seal"]
    (out / "index.json").write_text(json.dumps(index))
    refused(capsys, command(photos, vae_path, out), r"does not say what it was made from \(KeyError.*\); give")
    plan = json.loads((out / "prepare.json").read_text())
    del plan["vae_fingerprint"]
    (out / "prepare.json").write_text(json.dumps(plan))
    refused(capsys, command(photos, vae_path, out), "out was begun by an earlier version of sra2-fast; give another")


def change(path: Path, before: bytes, after: bytes) -> None:
    data = path.read_bytes()
    assert data.count(before) >= 1 and len(before) == len(after)
    path.write_bytes(data.replace(before, after, 1))


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("index.json", b'"scale": [', b'"scale": {'),
        ("index.json", b'"seal": ', b'"sebl": '),
        ("index.json", b'"num_classes": 2', b'"num_classes": 3'),
        ("index.json", b'"format": "sra2_fast', b'"format": "sra3_fast'),
        ("latents-00001-of-00003.safetensors", b'"unreadable":"[]"', b'"unreadable":"{}"'),
        ("latents-00001-of-00003.safetensors", b'"unreadable":', b'"unreaaable":'),
        ("latents-00001-of-00003.safetensors", b'"key":"', b'"kez":"'),
    ],
)
def test_a_damaged_index_or_key_is_repaired_by_the_rerun_that_its_message_asks_for(
    photos: Path, vae_path: Path, whole: Path, tmp_path: Path, file: str, before: bytes, after: bytes
) -> None:
    """The message said to run the same command again, which gave the same message again."""
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    change(out / file, before, after)
    if file == "index.json":
        with pytest.raises(InputError, match=r"index.json .*; run the same sra2-fast prepare .or convert-data. again"):
            open_data(out)
    assert main(command(photos, vae_path, out)) == 0
    assert contents(out) == contents(whole)


def test_two_at_once_do_not_write_into_one_folder(
    photos: Path, vae_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    lock = FolderLock(out, "prepare")
    assert main(command(photos, vae_path, out)) == 75
    assert "out is in use by another process; choose another folder, or wait for it" in capsys.readouterr().err
    assert not contents(out)
    lock.close()
    assert main(command(photos, vae_path, out)) == 0
