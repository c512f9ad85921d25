"""`sra2-fast prepare`: every bad input is one line that names it, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from photos import command, contents, refused

from sra2_fast.cli import main
from sra2_fast.data import open_data
from sra2_fast.prepare import encode as encode_module
from sra2_fast.vae import autoencoder as vae_module

pytest.importorskip("PIL.Image")
diffusers = pytest.importorskip("diffusers")
pytest_plugins = ["photos"]


def test_unreadable_images_are_named_or_left_out(
    own_photos: Path, vae_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    truncated = own_photos / "flower" / "1.jpg"
    truncated.write_bytes(truncated.read_bytes()[:500])
    (own_photos / "china" / "0.png").write_text("no image at all")
    (own_photos / "china" / "2.png").write_bytes((own_photos / "china" / "2.png").read_bytes()[:200])
    refused(
        capsys,
        command(own_photos, vae_path, out),
        r"3 of 14 images cannot be read: .*/.*\.png \(.*unreadable.txt\); repair .* or .* --skip-unreadable",
    )
    listed = (out / "unreadable.txt").read_text()
    assert all(name in listed for name in ("flower/1.jpg (", "china/0.png (", "china/2.png ("))
    assert listed.count("\n") == 3 and not (out / "index.json").exists()
    for _ in range(2):  # the second time from the finished shards
        assert main(command(own_photos, vae_path, out, "--skip-unreadable")) == 0
        source = open_data(out)
        assert source.num_samples == 11 and sorted(source.read(np.arange(11))[1].tolist()) == [0] * 5 + [1] * 6
    assert "left out 3 unreadable images: " in capsys.readouterr().out
    (out / "index.json").unlink()
    for name in ("flower/1.jpg", "china/0.png", "china/2.png"):  # removing them is the other way
        (own_photos / name).unlink()
    (out / "latents-00002-of-00009.safetensors.partial").touch()  # left by a kill, under an earlier list of images
    assert main(command(own_photos, vae_path, out)) == 0
    assert len(list(out.glob("latents-*"))) == 3
    assert open_data(out).num_samples == 11 and not (out / "unreadable.txt").exists()


def test_no_readable_image_at_all(tmp_path: Path, vae_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(7):
        path = tmp_path / "photos" / "a" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    arguments = command(tmp_path / "photos", vae_path, tmp_path / "out", "--skip-unreadable")
    match = r"none of the 7 images in class folder .*photos/a can be read \(a/0.png: cannot identify image file\); rep"
    refused(capsys, arguments, match)
    assert not (tmp_path / "out" / "index.json").exists()


def test_images_that_are_not_there(tmp_path: Path, vae_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    arguments = command(images, vae_path, out)
    refused(
        capsys,
        arguments,
        "--images .*images is no folder and no zip archive; give one with a subfolder for every class",
    )
    images.mkdir()
    refused(capsys, arguments, "--images .*images is empty; it must hold a subfolder of images for every class")
    (images / "cats").mkdir()
    refused(capsys, arguments, "class folder .*images/cats holds no PNG, .* GIF, BMP or TIFF; add some or")
    (images / "loose.JPG").touch()
    refused(capsys, arguments, "images/loose.JPG is in no class subfolder, like 0 others; move it into one")
    assert not out.exists()


def test_options_out_of_range(photos: Path, vae_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    refused(capsys, command(photos, vae_path, out, "--image-size", "34"), "--image-size must be a multiple of 4 .* 34")
    refused(capsys, command(photos, vae_path, out, "--image-size", "0"), "--image-size must be 1 or more, got 0")
    refused(capsys, command(photos, vae_path, out, "--batch-size", "0"), "--batch-size must be 1 or more, got 0")
    refused(capsys, command(photos, vae_path, out, "--shard-size", "-3"), "--shard-size must be 1 or more, got -3")
    refused(capsys, command(photos, vae_path, out, "--num-workers", "-1"), "--num-workers must be 0 or more, got -1")
    refused(capsys, command(photos, vae_path, out, "--device", "abacus"), "--device abacus cannot be used .*; try")
    refused(capsys, ["prepare", "--out", str(out)], "--images is missing")
    refused(capsys, ["prepare", "--out", str(out), "--images", str(photos)], "--vae is missing")
    refused(capsys, ["prepare", "--out", str(out), "--verify"], "has no index.json")
    assert not out.exists()


def test_an_autoencoder_that_is_not_there(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    out = tmp_path / "out"
    refused(capsys, command(photos, tmp_path / "none", out), "vae: .*none does not exist; give a folder with")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    refused(capsys, command(photos, tmp_path / "bad", out), "vae: .*bad holds no autoencoder that can be loaded")

    def offline(*_: object, **__: object) -> None:
        raise OSError("does not appear to have a file named config.json") from LocalEntryNotFoundError("no network")

    monkeypatch.setattr(diffusers.AutoencoderKL, "load_config", offline)
    refused(capsys, command(photos, Path("some/vae"), out), "vae: some/vae .* the Hugging Face hub cannot be reached")

    def unknown(*_: object, **__: object) -> None:
        raise OSError("no such repository")

    monkeypatch.setattr(diffusers.AutoencoderKL, "load_config", unknown)
    refused(capsys, command(photos, Path("some/vae"), out), r"cannot be loaded from the .* hub \(no such repository\)")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refused(capsys, command(photos, Path("some/vae"), out), "vae: some/vae needs diffusers; pip install diffusers")
    assert not out.exists()


def test_a_truncated_autoencoder(
    photos: Path, vae_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(vae_path, tmp_path / "vae"))
    weights = broken / "diffusion_pytorch_model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    refused(capsys, command(photos, broken, tmp_path / "out"), "vae: .*vae holds no autoencoder that can be loaded")


def test_an_autoencoder_without_all_its_weights(
    photos: Path, vae_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """diffusers fills missing weights with random numbers and goes on; latents of those are worthless."""
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(vae_path, tmp_path / "vae"))
    weights = broken / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    del state["encoder.conv_in.weight"]
    save_file(state, weights)
    match = r"is no whole AutoencoderKL: it lacks 1 of its weights, such as encoder\.conv_in\.weight; give"
    refused(capsys, command(photos, broken, tmp_path / "out"), match)


def test_latents_that_are_not_finite(
    photos: Path, vae_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode = vae_module.encode

    def overflowing(*arguments: object) -> Callable[[], np.ndarray]:
        moments = encode(*arguments)  # type: ignore[arg-type]
        moments[-1, 0, 0, 0] = np.inf
        return lambda: moments

    monkeypatch.setattr(encode_module, "start_encoding", overflowing)
    refused(
        capsys,
        command(photos, vae_path, tmp_path / "out"),
        r"NaN or infinity in the latents of (china|flower)/.*; use --precision fp32",
    )
    assert sorted(contents(tmp_path / "out")) == ["prepare.json"]


def test_another_data_set_is_never_overwritten(
    own_photos: Path, vae_path: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(command(own_photos, vae_path, out)) == 0
    before = contents(out)
    refused(
        capsys, command(own_photos, vae_path, out, "--image-size", "16"), "begun with --image-size 32, not 16; give"
    )
    (own_photos / "china" / "0.png").unlink()
    refused(capsys, command(own_photos, vae_path, out), "out is finished, and .*photos holds other images now")
    assert contents(out) == before
    (out / "prepare.json").write_text("[")
    refused(capsys, command(own_photos, vae_path, out), "prepare.json cannot be read .*; remove it or give")
    (out / "prepare.json").unlink()
    refused(capsys, command(own_photos, vae_path, out), "--out .*out holds latents of another origin; give")


def test_a_folder_that_cannot_be_written(
    photos: Path, vae_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    arguments = command(photos, vae_path, tmp_path / "file" / "out")
    refused(capsys, arguments, r"cannot write into .*file/out \(Not a directory\); choose another --out")


def test_devices_without_values_and_autoencoders_of_no_groups(
    photos: Path, vae_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A NotImplementedError in the middle of the encoding, and a ZeroDivisionError of diffusers."""
    refused(capsys, command(photos, vae_path, tmp_path / "out", "--device", "meta"), "--device meta cannot be used")
    broken = Path(shutil.copytree(vae_path, tmp_path / "vae"))
    config = json.loads((broken / "config.json").read_text())
    for change in ({"norm_num_groups": 0}, {"block_out_channels": []}):
        (broken / "config.json").write_text(json.dumps({**config, **change}))
        refused(capsys, command(photos, broken, tmp_path / "out"), "vae holds no autoencoder that can be loaded")
