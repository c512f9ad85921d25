"""`sra2-fast prepare` from end to end: real photos, a small AutoencoderKL, every interruption and every bad input."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerance import assert_close

from sra2_fast import prepare
from sra2_fast.cli import main
from sra2_fast.data import encode as encode_module
from sra2_fast.data import make_loader, open_data
from sra2_fast.data import vae as vae_module
from sra2_fast.data.decode import make_decoder
from sra2_fast.data.images import center_crop, list_images
from sra2_fast.data.shards import ShardSource
from sra2_fast.errors import InputError

Image = pytest.importorskip("PIL.Image")
diffusers = pytest.importorskip("diffusers")

SIZE, SHARD_SIZE = 32, 5
COUNT = 14  # in shards of 5, 5 and 4


def save_vae(folder: Path, **config: object) -> Path:
    """A small AutoencoderKL with random weights: three levels, so 4 pixels a latent."""
    torch.manual_seed(0)
    options = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 8),
        "norm_num_groups": 4,
        "latent_channels": 4,
        **config,
    }
    diffusers.AutoencoderKL(**options).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's two sample photos, cropped into a class each; PNG and JPEG, some in a deeper folder."""
    from sklearn.datasets import load_sample_images

    folder = tmp_path_factory.mktemp("photos")
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        for number in range(COUNT // 2):
            path = folder / name / ("deeper" if number == 3 else "") / f"{number}.{'jpg' if number % 2 else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photo[10 * number : 10 * number + 90, 70 * number : 70 * number + 80]).save(path)
    return folder


@pytest.fixture(scope="session")
def vae_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae"))


def command(photos: Path, vae_path: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--image-size", str(SIZE), "--batch-size", "2", "--shard-size", str(SHARD_SIZE), "--num-workers", "0"]
    return ["prepare", "--images", str(photos), "--vae", str(vae_path), "--out", str(out), *sizes, *more]


@pytest.fixture(scope="session")
def whole(photos: Path, vae_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run makes."""
    out = tmp_path_factory.mktemp("whole") / "latents"
    assert main(command(photos, vae_path, out)) == 0
    return out


@pytest.fixture
def own_photos(photos: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(photos, tmp_path / "photos"))


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], match: str) -> None:
    """Exit code 2 and one line on the last line of stderr (a progress bar may stand before it)."""
    import re

    assert main(arguments) == 2
    error = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert error.startswith("sra2-fast prepare: ") and re.search(match, error), error


def test_latents_are_the_autoencoder_s(photos: Path, vae_path: Path, whole: Path) -> None:
    source = open_data(whole)
    assert isinstance(source, ShardSource)
    assert (source.num_samples, source.num_classes, source.shape) == (COUNT, 2, (4, SIZE // 4, SIZE // 4))
    assert source.class_names == ["china", "flower"] and source.vae == str(vae_path)
    assert [shard.samples for shard in source.shards] == [5, 5, 4]
    images = list_images(photos)
    options = encode_module.EncodeOptions(str(photos), str(vae_path), SIZE, 2, "fp32", SHARD_SIZE)
    order = np.concatenate([job.positions for job in encode_module.shard_jobs(images, options)])
    assert sorted(order) == list(range(COUNT)) and (order != np.arange(COUNT)).any()
    values, labels = source.read(np.arange(COUNT))
    assert (labels == images.labels[order]).all()
    vae = diffusers.AutoencoderKL.from_pretrained(vae_path).double().eval()
    for value, position in zip(values, order, strict=True):
        image = center_crop(Image.open(photos / images.files[position]), SIZE)
        pixels = torch.from_numpy(image.transpose(2, 0, 1)[None].copy()).double() / 127.5 - 1
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
        want = torch.cat([posterior.mean, posterior.std], dim=1)[0].flatten(1)
        # 16 convolutions, each summing up to 8 * 9 products, and 14 normalisations over 2 * 32 * 32 elements
        assert_close(torch.from_numpy(value).flatten(1), want, torch.float32, roundings=64, summed=2 * SIZE * SIZE)


def test_training_batches_come_from_it(whole: Path) -> None:
    first, second = make_loader(open_data(whole), batch_size=COUNT, seed=0, num_steps=2)
    assert sorted(first.labels.tolist()) == [0] * (COUNT // 2) + [1] * (COUNT // 2)
    assert torch.isfinite(first.latents).all() and not torch.equal(first.latents, second.latents)


def test_grids_are_decoded_images(vae_path: Path, whole: Path) -> None:
    source = open_data(whole)
    values, _ = source.read(np.arange(9))  # more than one decoding batch
    z = torch.from_numpy(source.latents(values, None))
    images = make_decoder(source.decode_info(), str(vae_path))(z)
    assert images.shape == (9, SIZE, SIZE, 3) and images.dtype == np.uint8
    vae = diffusers.AutoencoderKL.from_pretrained(vae_path).eval()
    with torch.no_grad():
        want = (vae.decode(torch.from_numpy(values[:, :4])).sample + 1) * 127.5
    assert (np.abs(images - want.clamp(0, 255).permute(0, 2, 3, 1).numpy()) <= 0.51).all()


def test_a_decoder_of_another_autoencoder_is_refused(tmp_path: Path, whole: Path) -> None:
    other = save_vae(tmp_path, latent_channels=2)
    with pytest.raises(InputError, match="has 2 latent channels, the data 4; give the VAE it was made with"):
        make_decoder(open_data(whole).decode_info(), str(other))


@pytest.mark.parametrize(
    ("config", "shift", "scale"),
    [
        ({"scaling_factor": 0.36, "shift_factor": 0.12, "latent_channels": 3}, [0.12] * 3, [0.36] * 3),
        (
            {"scaling_factor": 0.5, "latents_mean": [1.0, -2.0], "latents_std": [2.0, 4.0], "latent_channels": 2},
            [1.0, -2.0],
            [0.25, 0.125],
        ),
    ],
)
def test_any_channels_downsampling_and_normalisation(
    photos: Path, tmp_path: Path, config: dict[str, object], shift: list[float], scale: list[float]
) -> None:
    levels = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 4),
    }
    # A pipeline's folder, with the autoencoder in its subfolder.
    save_vae(tmp_path / "pipeline" / "vae", **levels, **config)
    assert main(command(photos, tmp_path / "pipeline", tmp_path / "out")) == 0
    source = open_data(tmp_path / "out")
    assert source.shape == (len(shift), SIZE // 2, SIZE // 2)
    assert source.shift.tolist() == np.float32(shift).tolist() and source.scale.tolist() == np.float32(scale).tolist()


def test_bf16_is_near_float32(photos: Path, vae_path: Path, whole: Path, tmp_path: Path) -> None:
    assert main(command(photos, vae_path, tmp_path / "out", "--precision", "bf16")) == 0
    got = open_data(tmp_path / "out").read(np.arange(COUNT))[0]
    want = open_data(whole).read(np.arange(COUNT))[0]
    assert (got != want).any()
    # 30 layers in a row, each rounding its input and its output to bf16
    assert_close(torch.from_numpy(got).flatten(1), torch.from_numpy(want).flatten(1), torch.bfloat16, roundings=60)


# Interruptions


def test_workers_change_nothing(photos: Path, vae_path: Path, whole: Path, tmp_path: Path) -> None:
    assert main(command(photos, vae_path, tmp_path / "out", "--num-workers", "2")) == 0
    assert contents(tmp_path / "out") == contents(whole)


def test_ctrl_c_and_the_same_command_again(
    photos: Path,
    vae_path: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, encode, calls = tmp_path / "out", encode_module.encode, []

    def interrupted(*arguments: object) -> np.ndarray:
        calls.append(arguments)
        if len(calls) == 5:  # the second shard's second batch
            raise KeyboardInterrupt
        return encode(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(encode_module, "encode", interrupted)
        assert main(command(photos, vae_path, out)) == 130
    assert "interrupted with 1 of 3 shards finished; run the same command again to continue" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"has no index.json, so it is not finished"):
        open_data(out)
    calls.clear()
    monkeypatch.setattr(encode_module, "encode", lambda *arguments: calls.append(arguments) or encode(*arguments))
    assert main(command(photos, vae_path, out)) == 0
    assert len(calls) == 5  # only the two missing shards
    assert contents(out) == contents(whole)


def test_killed_in_the_middle_of_a_write(photos: Path, vae_path: Path, whole: Path, tmp_path: Path, root: Path) -> None:
    out = tmp_path / "out"
    script = (
        "import os, signal, sys\n"
        "from sra2_fast.cli import main\n"
        "real = os.replace\n"
        "def replace(source, target):\n"
        "    if '00001-of' in str(target): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(source, target)\n"
        "os.replace = replace\n"
        "main(sys.argv[1:])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.run(
        [sys.executable, "-c", script, *command(photos, vae_path, out)], env=environment, capture_output=True, cwd=root
    )
    assert process.returncode == -signal.SIGKILL
    assert not (out / "index.json").exists() and (out / "latents-00000-of-00003.safetensors").exists()
    assert main(command(photos, vae_path, out)) == 0
    assert contents(out) == contents(whole)


def test_a_finished_folder_is_checked_and_repaired(
    photos: Path, vae_path: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    assert main(command(photos, vae_path, out)) == 0
    assert "already complete, all checksums right: 14 latents of 4x8x8, 2 classes, 3 shards" in capsys.readouterr().out
    assert main(["prepare", "--out", str(out), "--verify"]) == 0
    assert "all checksums right: 14 latents" in capsys.readouterr().out
    damaged = out / "latents-00001-of-00003.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 64
    damaged.write_bytes(data)
    refused(capsys, ["prepare", "--out", str(out), "--verify"], "latents-00001-of-00003.safetensors is damaged")
    assert main(command(photos, vae_path, out)) == 0
    assert contents(out) == contents(whole)


def test_a_full_disk_keeps_what_is_finished(
    photos: Path,
    vae_path: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, replace = tmp_path / "out", os.replace

    def full(source: Path, target: Path) -> None:
        if "00001-of" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        refused(capsys, command(photos, vae_path, out), r"00001-of-00003.safetensors \(No space left on device\); make")
    assert sorted(contents(out)) == ["latents-00000-of-00003.safetensors", "prepare.json"]
    assert main(command(photos, vae_path, out)) == 0
    assert contents(out) == contents(whole)


# Unreadable images


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
    assert main(command(own_photos, vae_path, out)) == 0
    assert open_data(out).num_samples == 11 and not (out / "unreadable.txt").exists()


def test_no_readable_image_at_all(tmp_path: Path, vae_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(7):
        path = tmp_path / "photos" / "a" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    arguments = command(tmp_path / "photos", vae_path, tmp_path / "out", "--skip-unreadable")
    refused(capsys, arguments, "none of the 7 images in .*photos can be read")
    assert not (tmp_path / "out" / "index.json").exists()


# Bad input


def test_images_that_are_not_there(tmp_path: Path, vae_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    arguments = command(images, vae_path, out)
    refused(capsys, arguments, "--images .*images is no folder; give one with a subfolder for every class")
    images.mkdir()
    refused(capsys, arguments, "--images .*images is empty; it must hold a subfolder of images for every class")
    (images / "cats").mkdir()
    refused(capsys, arguments, "class folder .*images/cats holds no PNG or JPEG; add some or remove it")
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
    refused(capsys, command(photos, tmp_path / "bad", out), "vae: .*bad holds no AutoencoderKL that can be loaded")

    def offline(*_: object, **__: object) -> None:
        raise OSError("does not appear to have a file named config.json") from LocalEntryNotFoundError("no network")

    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", offline)
    refused(capsys, command(photos, Path("some/vae"), out), "vae: some/vae .* the Hugging Face hub cannot be reached")

    def unknown(*_: object, **__: object) -> None:
        raise OSError("no such repository")

    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", unknown)
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
    refused(capsys, command(photos, broken, tmp_path / "out"), "vae: .*vae holds no AutoencoderKL that can be loaded")


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
    match = r"is no AutoencoderKL: it lacks 1 of its weights, such as encoder\.conv_in\.weight; give"
    refused(capsys, command(photos, broken, tmp_path / "out"), match)


def test_latents_that_are_not_finite(
    photos: Path, vae_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode = vae_module.encode

    def overflowing(*arguments: object) -> np.ndarray:
        moments = encode(*arguments)  # type: ignore[arg-type]
        moments[-1, 0, 0, 0] = np.inf
        return moments

    monkeypatch.setattr(encode_module, "encode", overflowing)
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


# The crop


def test_the_crop_is_central_and_exact_without_resizing() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 71, 3), dtype=np.uint8)
    assert (center_crop(Image.fromarray(pixels), 40) == pixels[:, 15:55]).all()
    assert (center_crop(Image.fromarray(pixels.transpose(1, 0, 2)), 40) == pixels.transpose(1, 0, 2)[15:55]).all()


def test_large_images_are_halved_with_a_box_filter_first() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    boxes = pixels.reshape(40, 2, 40, 2, 3).mean(axis=(1, 3))
    # Pillow filters rows, then columns, and rounds to a whole grey level each time.
    assert np.abs(center_crop(Image.fromarray(pixels), 40) - boxes).max() <= 1


@pytest.mark.parametrize(("width", "height", "mode"), [(33, 100, "RGBA"), (200, 31, "L"), (65, 64, "P"), (7, 9, "1")])
def test_every_size_and_mode_becomes_a_square_of_three_channels(width: int, height: int, mode: str) -> None:
    square = center_crop(Image.new("RGB", (width, height), (255, 255, 255)).convert(mode), 32)
    assert square.shape == (32, 32, 3) and square.dtype == np.uint8 and (square == 255).all()


def test_help_names_every_option() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    text = parser.format_help()
    for option in ("images", "vae", "out", "image-size", "batch-size", "precision", "device", "shard-size"):
        assert f"--{option}" in text
