"""The autoencoders of the field, small: their form, their shift and scale, and what is stored of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import COUNT, SIZE, command, refused, save_vae

from sra2_fast.cli import main
from sra2_fast.data import make_loader, open_data
from sra2_fast.vae.autoencoder import decode, downsample_factor, encode, load_vae, normalisation
from sra2_fast.vae.decode import make_decoder

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("PIL.Image")
pytest_plugins = ["photos"]
SIXTEEN = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
VAVAE = {"latents_mean": [0.5] * 32, "latents_std": [4.0] * 32, "scaling_factor": 1.0, "latent_channels": 32}
KINDS = {  # configurations as they are published, but for the width; shift and scale of their latents
    "sd-vae-ft-ema": ({"latent_channels": 4, "scaling_factor": 0.18215}, 0.0, 0.18215),
    "sdxl": ({"latent_channels": 4, "scaling_factor": 0.13025, "force_upcast": True}, 0.0, 0.13025),
    "sd3": ({**SIXTEEN, "scaling_factor": 1.5305, "shift_factor": 0.0609}, 0.0609, 1.5305),
    "flux": ({**SIXTEEN, "scaling_factor": 0.3611, "shift_factor": 0.1159}, 0.1159, 0.3611),
    "e2e-vavae": (VAVAE, 0.5, 0.25),
}


def save_dc_ae(folder: Path) -> Path:
    """A small AutoencoderDC: 8 pixels a latent, an attention block, no posterior."""
    torch.manual_seed(0)
    both = {
        f"{part}_{key}": value
        for part in ("encoder", "decoder")
        for key, value in {
            "block_types": ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
            "block_out_channels": (8, 8, 16, 16),
            "layers_per_block": (1, 1, 1, 1),
            "qkv_multiscales": ((), (), (), (5,)),
        }.items()
    }
    vae = diffusers.AutoencoderDC(latent_channels=8, attention_head_dim=8, scaling_factor=0.41407, **both)
    vae.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_shift_and_scale_are_those_of_the_configuration(tmp_path: Path, kind: str) -> None:
    config, shift, scale = KINDS[kind]
    vae = load_vae(str(save_vae(tmp_path, **config)))
    about, channels = normalisation(vae), config["latent_channels"]
    assert (
        about.shift.tolist() == [np.float32(shift)] * channels
        and about.scale.tolist() == [np.float32(scale)] * channels
    )
    moments = encode(vae, torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8))
    assert moments.shape == (2, 2 * channels, SIZE // 4, SIZE // 4) and (moments[:, channels:] > 0).all()
    assert decode(vae, torch.from_numpy(moments[:, :channels])).shape == (2, 3, SIZE, SIZE)


def test_sixteen_channels_from_images_to_batches(photos: Path, tmp_path: Path) -> None:
    config, shift, scale = KINDS["flux"]
    vae = save_vae(tmp_path / "vae", **config)
    assert main(command(photos, vae, tmp_path / "out")) == 0
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["shift"] == [float(np.float32(shift))] * 16 and index["scale"] == [float(np.float32(scale))] * 16
    made_with = index["vae"]
    assert (made_with["class"], made_with["shift_factor"], made_with["scaling_factor"]) == (
        "AutoencoderKL",
        shift,
        scale,
    )
    source = open_data(tmp_path / "out")
    values, _ = source.read(np.arange(COUNT))
    z = source.latents(values)
    np.testing.assert_allclose(z, (values[:, :16] - np.float32(shift)) * np.float32(scale), rtol=1e-6)
    (batch,) = make_loader(source, batch_size=4, seed=0, num_steps=1)
    assert batch.latents.shape == (4, 16, SIZE // 4, SIZE // 4)


def test_dc_ae_has_no_posterior(photos: Path, tmp_path: Path) -> None:
    path = save_dc_ae(tmp_path / "vae")
    assert main(command(photos, path, tmp_path / "out")) == 0
    source = open_data(tmp_path / "out")
    assert source.shape == (8, SIZE // 8, SIZE // 8) and source.scale.tolist() == [np.float32(0.41407)] * 8
    values, _ = source.read(np.arange(COUNT))
    assert values.shape[1] == 16 and values[:, :8].std() > 0 and not values[:, 8:].any()
    vae = load_vae(str(path))
    assert (type(vae).__name__, downsample_factor(vae)) == ("AutoencoderDC", 8)
    pixels = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    want = diffusers.AutoencoderDC.from_pretrained(path).encode(pixels / 127.5 - 1).latent
    np.testing.assert_allclose(encode(vae, pixels)[:, :8], want.detach().numpy(), rtol=1e-4, atol=1e-5)
    first, second = make_loader(source, batch_size=COUNT, seed=0, num_steps=2)
    assert sorted(first.latents.flatten().tolist()) == sorted(second.latents.flatten().tolist())
    images = make_decoder(source.decode_info())(torch.from_numpy(source.latents(values[:1])))
    assert images.shape == (1, SIZE, SIZE, 3)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["vae"]["class"] == "AutoencoderDC" and index["vae"]["downsample_factor"] == 8


def test_a_normalisation_of_one_s_own(
    photos: Path, vae_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For autoencoders whose configuration says nothing, or the default of another."""
    out = tmp_path / "out"
    own = ("--latent-shift", "-0.5,0,0,1", "--latent-scale", "2")
    assert main(command(photos, vae_path, out, *own)) == 0
    source = open_data(out)
    assert source.shift.tolist() == [-0.5, 0, 0, 1] and source.scale.tolist() == [2] * 4
    assert main(command(photos, vae_path, out, *own)) == 0
    capsys.readouterr()
    refused(capsys, command(photos, vae_path, out), "out was begun with --latent-scale 2, not None; give another --out")
    for option, value in (("--latent-scale", "1,2"), ("--latent-scale", "0"), ("--latent-shift", "x")):
        refused(capsys, command(photos, vae_path, tmp_path / "no", option, value), rf"{option} must be .*, got {value}")
    assert not (tmp_path / "no").exists()


def test_an_autoencoder_of_another_form_is_named(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    match = "vae: .* is an AutoencoderTiny; give one of AutoencoderKL, AutoencoderDC"
    refused(capsys, command(photos, tmp_path, tmp_path / "out"), match)
