"""`sra2-fast prepare`: which square of an image is encoded, and its mirror image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import COUNT, SHARD_SIZE, SIZE, command, contents, refused

from sra2_fast.cli import main
from sra2_fast.data import make_loader, open_data
from sra2_fast.prepare import encode as encode_module
from sra2_fast.prepare.crop import MAX_ASPECT, center_crop, crop_of
from sra2_fast.prepare.encode import EncodeOptions, shard_jobs
from sra2_fast.prepare.listing import list_images
from sra2_fast.vae.autoencoder import encode, load_vae, start_encoding

pytestmark = pytest.mark.training

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("diffusers")
pytest_plugins = ["photos"]


@pytest.fixture(scope="module")
def random_and_flipped(photos: Path, vae_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("crops") / "latents"
    assert main(command(photos, vae_path, out, "--crop", "random", "--flip")) == 0
    return out


def test_random_crops_lie_inside_and_differ() -> None:
    """Of a picture that says where each pixel is: the square's place and size can be read from it."""
    ramp = np.zeros((90, 120, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(120)[None], np.arange(90)[:, None]
    squares = [crop_of("random", f"{number}.png")(Image.fromarray(ramp), SIZE) for number in range(200)]
    sides = np.array([np.ptp(square[..., 0].astype(int)) + 90 / SIZE for square in squares])
    assert all(square.shape == (SIZE, SIZE, 3) for square in squares)
    assert 0.8 * 90 - 6 < sides.min() < 0.85 * 90 and 0.95 * 90 < sides.max() < 90 + 6
    lefts = np.array([square[:, 0, 0].mean() for square in squares])
    tops = np.array([square[0, :, 1].mean() for square in squares])
    assert lefts.min() < 6 and lefts.max() > 0.75 * (120 - 0.8 * 90) and tops.min() < 4 and tops.max() > 10
    assert len({square.tobytes() for square in squares}) > 140  # with a shorter side of 32 there are 12 places only
    again = crop_of("random", "7.png")(Image.fromarray(ramp), SIZE)
    assert (again == squares[7]).all(), "the name decides, not what was cut before"


def test_a_random_crop_of_the_least_and_of_too_long_a_picture() -> None:
    tiny = crop_of("random", "tiny")(Image.new("RGB", (1, 1), (1, 2, 3)), SIZE)
    assert tiny.shape == (SIZE, SIZE, 3) and (tiny == (1, 2, 3)).all()
    pixels = np.zeros((4, 401, 3), np.uint8)
    pixels[:, 200 - 2 * MAX_ASPECT : 201 + 2 * MAX_ASPECT] = 255
    for number in range(20):
        assert (crop_of("random", str(number))(Image.fromarray(pixels), 4) == 255).all()


def test_what_is_stored_is_the_crop_and_its_mirror_image(
    photos: Path, vae_path: Path, whole: Path, random_and_flipped: Path
) -> None:
    source = open_data(random_and_flipped)
    assert source.has_flips and not open_data(whole).has_flips
    images = list_images(photos)
    options = EncodeOptions(str(photos), str(vae_path), "weights", SIZE, 2, "fp32", SHARD_SIZE, "random", True)
    order = np.concatenate([job.positions for job in shard_jobs(images, options)])
    both = [np.full(COUNT, flipped) for flipped in (False, True)]
    values, mirrored = (source.read_flipped(np.arange(COUNT), flipped)[0] for flipped in both)
    vae = load_vae(str(vae_path))
    for row, position in list(enumerate(order))[:4]:
        file = images.files[position]
        picture = Image.open(photos / file).convert("RGB")
        square = crop_of("random", file)(picture, SIZE)
        assert (square != center_crop(picture, SIZE)).any()
        for got, pixels in ((values[row], square), (mirrored[row], square[:, ::-1])):
            want = encode(vae, torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None])[0]
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)  # other batches, the same float32
    (batch,) = make_loader(source, batch_size=COUNT, seed=0, num_steps=1)
    assert torch.isfinite(batch.latents).all()
    index = json.loads((random_and_flipped / "index.json").read_text())
    assert index["prepared_from"]["crop"] == "random" and index["version"] == 2


def test_an_interruption_changes_neither_crops_nor_flips(
    photos: Path,
    vae_path: Path,
    random_and_flipped: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the middle of a batch, too: its images are encoded and their mirror images are not."""
    out, calls = tmp_path / "out", []

    def interrupted(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return start_encoding(*arguments)  # type: ignore[arg-type]

    arguments = command(photos, vae_path, out, "--crop", "random", "--flip")
    with monkeypatch.context() as patch:
        patch.setattr(encode_module, "start_encoding", interrupted)
        assert main(arguments) == 130
    assert "interrupted with 7 of 14 images encoded" in capsys.readouterr().err
    assert main(arguments) == 0
    assert contents(out) == contents(random_and_flipped)
    capsys.readouterr()
    refused(capsys, command(photos, vae_path, out, "--flip"), "out was begun with --crop random, not center; give")
    refused(capsys, command(photos, vae_path, out, "--crop", "random"), "was begun with --flip True, not False; give")


def test_a_folder_from_before_there_was_a_choice_goes_on(
    photos: Path, vae_path: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its plan names neither crop nor flip: they were the middle, and none. And its shards have the keys of then."""
    out = tmp_path / "out"
    out.mkdir()
    for name, data in contents(whole).items():
        (out / name).write_bytes(data)
    plan = json.loads((out / "prepare.json").read_text())
    assert (plan.pop("crop"), plan.pop("flip")) == ("center", False)
    (out / "prepare.json").write_text(json.dumps(plan))
    assert main(command(photos, vae_path, out)) == 0
    assert "already complete, all checksums right: 14 latents of 4x8x8, 2 classes" in capsys.readouterr().out
    options = EncodeOptions("", "", "weights", SIZE, 2, "fp32", SHARD_SIZE)
    key = shard_jobs(list_images(photos), options)[0].key
    assert key == "0c683ff0b65daecbfae5be311a1251a4060754c5e4ee9ec885c5f45812691a46"
