"""`sra2-fast prepare` from end to end on real photos: what it makes, and that no interruption changes it."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import COUNT, SHARD_SIZE, SIZE, command, contents, refused, save_vae
from safetensors.torch import load_file, save_file
from tolerance import assert_close

from sra2_fast import prepare
from sra2_fast.cli import main
from sra2_fast.data import make_loader, open_data
from sra2_fast.data.layouts.shards import ShardSource
from sra2_fast.errors import InputError
from sra2_fast.prepare import encode as encode_module
from sra2_fast.prepare.crop import center_crop
from sra2_fast.prepare.listing import list_images
from sra2_fast.vae.decode import make_decoder

Image = pytest.importorskip("PIL.Image")
diffusers = pytest.importorskip("diffusers")
pytest_plugins = ["photos"]


def test_latents_are_the_autoencoder_s(photos: Path, vae_path: Path, whole: Path) -> None:
    source = open_data(whole)
    assert isinstance(source, ShardSource)
    assert (source.num_samples, source.num_classes, source.shape) == (COUNT, 2, (4, SIZE // 4, SIZE // 4))
    assert source.class_names == ["china", "flower"] and source.vae == str(vae_path)
    assert [shard.samples for shard in source.shards] == [5, 5, 4]
    images = list_images(photos)
    options = encode_module.EncodeOptions(str(photos), str(vae_path), "weights", SIZE, 2, "fp32", SHARD_SIZE)
    order = np.concatenate([job.positions for job in encode_module.shard_jobs(images, options)])
    assert sorted(order) == list(range(COUNT)) and (order != np.arange(COUNT)).any()
    values, labels = source.read(np.arange(COUNT))
    assert (labels == images.labels[order]).all()
    vae = diffusers.AutoencoderKL.from_pretrained(vae_path).double().eval()
    for value, position in zip(values, order, strict=True):
        image = center_crop(Image.open(photos / images.files[position]).convert("RGB"), SIZE)
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


def test_grids_are_decoded_with_the_autoencoder_of_the_data(vae_path: Path, whole: Path) -> None:
    source = open_data(whole)
    z = torch.from_numpy(source.latents(source.read(np.arange(2))[0]))
    decode, named = make_decoder(source.decode_info()), make_decoder(source.decode_info(), str(vae_path))
    assert (decode.vae, decode.note) == (named.vae, named.note) == (str(vae_path), None)
    assert (decode(z) == named(z)).all() and decode(z).shape == (2, SIZE, SIZE, 3)
    switched_off = make_decoder(source.decode_info(), "none")
    assert switched_off(z).shape == (2, SIZE // 4, SIZE // 4, 3) and (switched_off.vae, switched_off.note) == (
        None,
        None,
    )


def test_without_the_autoencoder_of_the_data_latents_are_colours_and_that_is_said(
    photos: Path, vae_path: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(vae_path, tmp_path / "vae"))
    assert main(command(photos, own, tmp_path / "out")) == 0
    info = open_data(tmp_path / "out").decode_info()
    z = torch.randn(1, 4, 8, 8)
    save_vae(own, latent_channels=2)
    gone = make_decoder(info)
    assert gone.note is not None and gone.note.endswith(
        "has 2 latent channels, the data 4; give the VAE it was made with"
    )
    shutil.rmtree(own)
    gone = make_decoder(info)
    assert gone.vae is None and (gone(z) == make_decoder(info, "none")(z)).all()
    assert gone.note is not None and gone.note.startswith(
        "samples are latents shown as colours (--vae names an autoenc"
    )
    assert "vae does not exist; give a folder with an autoencoder" in gone.note
    elsewhere = make_decoder(dataclasses.replace(info, vae="some/vae"))  # asks no network
    assert elsewhere.note is not None and "some/vae is not on this machine; --vae some/vae downloads" in elsewhere.note
    unknown = make_decoder(dataclasses.replace(info, vae=None))
    assert unknown.note is not None and unknown.note.endswith(": the data name no autoencoder")


def test_an_autoencoder_with_other_weights_is_said(vae_path: Path, whole: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(vae_path, tmp_path / "vae"))
    weights = other / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["decoder.conv_in.bias"] += 1
    save_file(state, weights)
    decode = make_decoder(open_data(whole).decode_info(), str(other))
    assert decode.vae == str(other)
    assert decode.note == f"{other} has other weights than the autoencoder the latents were made with ({vae_path})"


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
    out, encode, calls = tmp_path / "out", encode_module.start_encoding, []

    def interrupted(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 5:  # the second shard's second batch
            raise KeyboardInterrupt
        return encode(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(encode_module, "start_encoding", interrupted)
        assert main(command(photos, vae_path, out)) == 130
    assert "interrupted with 7 of 14 images encoded; run the same command again to go on" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"has no index.json, so it is not finished"):
        open_data(out)
    calls.clear()
    monkeypatch.setattr(
        encode_module, "start_encoding", lambda *arguments: calls.append(arguments) or encode(*arguments)
    )
    assert main(command(photos, vae_path, out)) == 0
    assert len(calls) == 4  # only the missing batches of the second shard, and the third
    assert contents(out) == contents(whole)


def test_killed_in_the_middle_of_a_write(
    photos: Path, vae_path: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after SIGKILL: the file under its other name stays behind, the index is not there."""
    out, replace = tmp_path / "out", os.replace

    class Killed(BaseException):
        pass

    def killed(source: Path, target: Path) -> None:
        if "00001-of" in str(target):
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", killed)
        main(command(photos, vae_path, out))
    assert sorted(contents(out)) == [
        "latents-00000-of-00003.safetensors",
        "latents-00001-of-00003.safetensors.partial",
        "prepare.json",
    ]
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


def test_help_names_every_option() -> None:
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    text = parser.format_help()
    for option in ("images", "vae", "out", "image-size", "batch-size", "precision", "device", "shard-size"):
        assert f"--{option}" in text
