"""`sra2-fast prepare --verify N`: what is shown is the image and what its own latent decodes to, and PSNR is right."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import COUNT, SIZE, command, contents, refused, save_vae

from sra2_fast.cli import main
from sra2_fast.data import open_data
from sra2_fast.pictures import HEADER, MARGIN
from sra2_fast.prepare.verify import Pair
from sra2_fast.vae.autoencoder import decode, encode, load_vae

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("diffusers")
pytest_plugins = ["photos"]
CELL = 2 * SIZE + 2 * MARGIN  # images of 32 pixels are shown twice as large


def shown(out: Path) -> np.ndarray:
    """(rows, columns, SIZE, SIZE, 3): the images in verify.png, without header and margins."""
    picture = np.asarray(Image.open(out / "verify.png"))[HEADER:]
    rows, columns = picture.shape[0] // CELL, picture.shape[1] // CELL
    cells = picture.reshape(rows, CELL, columns, CELL, 3).swapaxes(1, 2)
    return cells[:, :, MARGIN:-MARGIN:2, MARGIN:-MARGIN:2]


def test_each_image_stands_beside_what_its_latent_decodes_to(
    photos: Path, vae_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With random crops, mirrored images, three shards, and an unreadable file in the middle of the order."""
    own = Path(shutil.copytree(photos, tmp_path / "photos"))
    (own / "china" / "2.png").write_text("no image")
    out = tmp_path / "out"
    assert main(command(own, vae_path, out, "--crop", "random", "--flip", "--skip-unreadable")) == 0
    capsys.readouterr()
    assert main(["prepare", "--out", str(out), "--verify", "6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("all checksums right: 13 latents")
    said = re.fullmatch(
        r"decoded 6 of them: PSNR (.+) dB on average, (.+) dB at the least \((.+)\); see (.+)", lines[1]
    )
    assert said and said[4] == str(out / "verify.png")
    cells, vae, source = shown(out), load_vae(str(vae_path)), open_data(out)
    assert cells.shape == (6, 4, SIZE, SIZE, 3)
    psnrs = []
    for index, row in zip(np.linspace(0, 12, 6).astype(int), cells, strict=True):
        for image, decoded, flipped in ((row[0], row[1], False), (row[2], row[3], True)):
            stored = torch.from_numpy(source.read_flipped(np.array([index]), np.array([flipped]))[0])
            again = encode(vae, torch.from_numpy(image.transpose(2, 0, 1).copy())[None])
            np.testing.assert_allclose(again, stored, rtol=1e-3, atol=1e-5)  # the image is that of the latent
            assert (decode(vae, stored[:, :4])[0].permute(1, 2, 0).numpy() == decoded).all()
            psnrs.append(10 * np.log10(255**2 / np.mean((image.astype(float) - decoded.astype(float)) ** 2)))
        assert (row[0] == row[2][:, ::-1]).all()
    assert (said[1], said[2]) == (f"{np.mean(psnrs):.1f}", f"{min(psnrs):.1f}") and said[3] != "china/2.png"
    before = contents(out)
    assert main(["prepare", "--out", str(out), "--verify", "100"]) == 0
    assert "decoded 13 of them" in capsys.readouterr().out and len(shown(out)) == 13
    assert {**contents(out), "verify.png": b""} == {**before, "verify.png": b""}
    assert main(command(own, vae_path, out, "--crop", "random", "--flip", "--skip-unreadable")) == 0
    assert "already complete" in capsys.readouterr().out


def test_psnr() -> None:
    grey = np.full((4, 4, 3), 100, np.uint8)
    assert Pair("a", grey, grey).psnr == float("inf")
    assert Pair("a", grey, grey + np.uint8(1)).psnr == pytest.approx(48.1308, abs=1e-4)
    assert Pair("a", np.zeros_like(grey), np.full_like(grey, 255)).psnr == 0


def test_images_and_autoencoder_elsewhere(
    photos: Path, vae_path: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    own, vae = (Path(shutil.copytree(path, tmp_path / path.name)) for path in (photos, vae_path))
    arguments = ["prepare", "--out", str(out), "--verify", "2", "--images", str(own), "--vae", str(vae)]
    assert main(arguments) == 0
    assert shown(out).shape[:2] == (2, 2)
    (out / "verify.png").unlink()
    capsys.readouterr()
    first = Path(shutil.copytree(own, tmp_path / "first"))
    for file in own.rglob("*.*"):
        file.write_bytes(file.read_bytes() + b"\0")
    refused(capsys, arguments, r"photos.*\.(png|jpg) was changed since .*index.json was written; give")
    (own / "china" / "0.png").unlink()
    refused(capsys, arguments, r"holds other images than .*out was made from; give --images with those")
    arguments[arguments.index("--images") + 1] = str(first)
    save_vae(vae, latent_channels=2)
    refused(capsys, arguments, r"--vae .* has other weights than .*out was made with; give --vae with those")
    assert not (out / "verify.png").exists()


def test_what_cannot_be_verified(
    photos: Path, vae_path: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    arguments = ["prepare", "--out", str(out), "--verify", "2"]
    refused(capsys, [*arguments[:-1], "-1"], "--verify must be 0 or more, got -1")
    plan = json.loads((out / "prepare.json").read_text())
    (out / "prepare.json").write_text(json.dumps({**plan, "batch_size": 3}))
    refused(
        capsys, arguments, r"latents-00000-of-00003.safetensors was made from other .* than prepare.json names; run"
    )
    del plan["image_size"]
    (out / "prepare.json").write_text(json.dumps(plan))
    refused(capsys, arguments, r"prepare.json is damaged \(no 'image_size'\); run the same sra2-fast prepare again")
    (out / "prepare.json").unlink()
    refused(
        capsys, arguments, "out has no prepare.json: what its latents were made from is not known; say --verify alone"
    )
    assert open_data(out).num_samples == COUNT
