"""`prepare --features`: patch tokens of a frozen encoder, of the images whose latents lie beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from photos import COUNT, SIZE, command, contents, refused

from sra2_fast.cli import main
from sra2_fast.data import open_data
from sra2_fast.errors import InputError
from sra2_fast.prepare import encoders
from sra2_fast.prepare.crop import center_crop

pytestmark = pytest.mark.slow

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest_plugins = ["photos"]

WIDTH, GRID, PATCH = 24, SIZE // 16, 14
EVERY = np.arange(COUNT)


def save_dinov2(folder: Path, image_size: int = GRID * PATCH, seed: int = 0, registers: int = 0) -> Path:
    """A DINOv2 with random weights, as transformers saves one."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": image_size}
    if registers:
        config: Any = transformers.Dinov2WithRegistersConfig(**sizes, patch_size=PATCH, num_register_tokens=registers)
        model: Any = transformers.Dinov2WithRegistersModel(config)
    else:
        config = transformers.Dinov2Config(**sizes, patch_size=PATCH)
        model = transformers.Dinov2Model(config)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dinov2(tmp_path_factory.mktemp("dinov2"))


def expected(folder: Path, images: np.ndarray) -> np.ndarray:
    """(n, N, F) of images (n, 3, SIZE, SIZE) uint8, by the model as transformers loads it."""
    model = transformers.Dinov2Model.from_pretrained(folder).eval()
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (torch.from_numpy(images.copy()).float() / 255 - mean) / std
    with torch.no_grad():
        tokens = model(F.interpolate(pixels, (GRID * PATCH,) * 2, mode="bicubic")).last_hidden_state[:, 1:]
    return tokens.numpy()


def squares(photos: Path) -> dict[str, np.ndarray]:
    files = sorted(path for path in photos.rglob("*") if path.suffix in (".png", ".jpg"))
    return {str(path): center_crop(Image.open(path).convert("RGB"), SIZE).transpose(2, 0, 1) for path in files}


def assert_features_of(values: np.ndarray, wanted: np.ndarray) -> None:
    """Every row of `values` is one of `wanted`, each once, to float16's rounding and that of the batch's products."""
    distance = np.abs(values[:, None].astype(np.float32) - wanted[None]).max(axis=(2, 3))
    assert sorted(distance.argmin(axis=1).tolist()) == list(range(len(wanted)))
    assert (distance.min(axis=1) <= 2.0**-10 * np.abs(wanted).max()).all()


@pytest.mark.parametrize("flip", [False, True])
def test_features_are_those_of_the_images_beside_them(
    photos: Path, vae_path: Path, dinov2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flip: bool
) -> None:
    out = tmp_path / "out"
    words = command(photos, vae_path, out, "--features", str(dinov2), *(["--flip"] if flip else []))
    assert main(words) == 0
    said = f"features of {GRID**2}x{WIDTH} by {dinov2}; align with them by sra2-fast train --target features"
    assert capsys.readouterr().out.splitlines()[-1] == said
    source = open_data(out, features=True)
    assert source.features is not None and source.features.has_flips == flip
    pictures = np.stack(list(squares(photos).values()))
    assert_features_of(source.features.read(EVERY), expected(dinov2, pictures))
    if flip:
        mirrored = source.features.read(EVERY, np.ones(COUNT, dtype=bool))
        assert_features_of(mirrored, expected(dinov2, pictures[..., ::-1]))
    labels = source.read(EVERY)[1]
    china = expected(dinov2, np.stack([picture for file, picture in squares(photos).items() if "china" in file]))
    assert_features_of(source.features.read(EVERY[labels == 0]), china)  # the same order as the latents
    before = contents(out)
    assert main(words) == 0 and contents(out) == before
    assert capsys.readouterr().out.splitlines()[-1] == f"already complete: {said}"


def test_a_stopped_or_damaged_run_goes_on_and_ends_with_the_same_bytes(
    photos: Path, vae_path: Path, dinov2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, words = tmp_path / "out", command(photos, vae_path, tmp_path / "out")
    assert main(words) == 0  # the latents alone; features can be added later
    latents = contents(out)
    words += ["--features", str(dinov2)]
    calls = []

    def interrupted(self: encoders.FeatureEncoder, images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) == 6:  # one for the width, three for the first shard
            raise KeyboardInterrupt
        return encode(self, images)

    encode = encoders.FeatureEncoder.__call__
    monkeypatch.setattr(encoders.FeatureEncoder, "__call__", interrupted)
    assert main(words) == 130
    assert "interrupted; run the same command again for the rest of the features" in capsys.readouterr().err
    monkeypatch.undo()
    assert {path.name for path in out.glob("features*")} == {"features-00000-of-00003.safetensors"}
    kept = (out / "features-00000-of-00003.safetensors").stat().st_mtime_ns
    assert main(words) == 0
    whole = contents(out)
    assert (out / "features-00000-of-00003.safetensors").stat().st_mtime_ns == kept
    assert {name: whole[name] for name in latents} == latents, "the latents stay as they are"
    damaged = out / "features-00001-of-00003.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    assert main(words) == 0 and contents(out) == whole


@pytest.mark.training
def test_from_photos_to_repa(photos: Path, vae_path: Path, dinov2: Path, tmp_path: Path) -> None:
    """Latents of 8 x 8 and patches of 4: as many tokens as the encoder has."""
    out = tmp_path / "out"
    assert main(command(photos, vae_path, out, "--features", str(dinov2))) == 0
    words = ["train", "--data", str(out), "--out", str(tmp_path / "run"), "--target", "features", "--model", "16,2,2,4"]
    assert main([*words, "--batch-size", "4", "--steps", "2", "--sample-every", "0", "--device", "cpu"]) == 0


def test_another_encoder_makes_other_features(photos: Path, vae_path: Path, dinov2: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(command(photos, vae_path, out, "--features", str(dinov2))) == 0
    before = open_data(out, features=True).features
    assert before is not None
    other = save_dinov2(tmp_path / "other", seed=1, registers=2)
    assert main(command(photos, vae_path, out, "--features", str(other))) == 0
    after = open_data(out, features=True).features
    assert after is not None and after.fingerprint() != before.fingerprint()
    assert after.num_tokens == GRID**2, "neither class nor register tokens"
    assert json.loads((out / "features.json").read_text())["encoder"] == str(other)


def test_positions_are_resampled_once_to_the_grid(tmp_path: Path) -> None:
    """DINOv2's are of 37 x 37 patches, the grid is 16 x 16: resampled with antialiasing, as timm does for REPA."""
    folder = save_dinov2(tmp_path / "large", image_size=8 * PATCH)
    before = transformers.Dinov2Model.from_pretrained(folder).embeddings.position_embeddings.data
    encoder = encoders.load_encoder(str(folder), grid=4)
    after = encoder._network.embeddings.position_embeddings.data  # type: ignore[union-attr]
    assert after.shape == (1, 1 + 16, WIDTH) and torch.equal(after[:, 0], before[:, 0])
    # A plane stays a plane away from the border: the resampling keeps its scale and its corners' order.
    ramp = torch.arange(64.0).view(8, 8) % 8
    network = transformers.Dinov2Model.from_pretrained(folder)
    network.embeddings.position_embeddings.data[0, 1:] = ramp.reshape(64, 1)
    encoders._resample_positions(network.embeddings, 4)
    got = network.embeddings.position_embeddings.data[0, 1:, 0].view(4, 4)
    assert torch.allclose(got[:, 1:3], torch.tensor([2.5, 4.5]).expand(4, 2), atol=0.1)
    assert encoder(torch.zeros(3, 3, 64, 64, dtype=torch.uint8)).shape == (3, 16, WIDTH)


def test_a_model_of_timm(photos: Path, vae_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm does not import here: {error}")
    from timm.models import save_for_hf

    torch.manual_seed(0)
    sizes = {"embed_dim": WIDTH, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
    save_for_hf(model, tmp_path / "vit", model_args=sizes)
    out = tmp_path / "out"
    assert main(command(photos, vae_path, out, "--features", str(tmp_path / "vit"))) == 0
    features = open_data(out, features=True).features
    assert features is not None and (features.num_tokens, features.width) == (GRID**2, WIDTH)
    pictures = torch.from_numpy(np.stack(list(squares(photos).values())))
    pixels = (pictures.float() / 255 - 0.5) / 0.5  # its own mean and std; 16 pixels a patch, so nothing is resized
    direct = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=SIZE, **sizes).eval()
    weights = model.state_dict()
    positions = weights.pop("pos_embed")
    weights["pos_embed"] = timm.layers.resample_abs_pos_embed(positions, [GRID, GRID])
    direct.load_state_dict(weights)
    with torch.no_grad():
        assert_features_of(features.read(EVERY), direct.forward_features(pixels)[:, 1:].numpy())
    words = command(photos, vae_path, out, "--features", "timm:no_such_model")
    refused(capsys, words, "--features timm:no_such_model cannot be loaded .*; check the name")


def test_bad_input(
    photos: Path, vae_path: Path, dinov2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def refuse(encoder: object, match: str, *more: str) -> None:
        refused(capsys, command(photos, vae_path, tmp_path / "out", "--features", str(encoder), *more), match)

    refuse("dino", "--features dino is no encoder that is known; give dinov2-vits14")
    refuse(photos, "has no config.json of an encoder; give")
    refuse(vae_path, "holds None, neither DINOv2 nor a model of timm")
    refuse(dinov2, "--features needs --image-size to be a multiple of 16, got 24", "--image-size", "24")
    weightless = tmp_path / "weightless"
    weightless.mkdir()
    (weightless / "config.json").write_bytes((dinov2 / "config.json").read_bytes())
    refuse(weightless, "weightless cannot be loaded .*; save the model there again")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuse("dinov2-vitb14", "--features dinov2-vitb14 cannot be loaded .*; check the name and the network, or give the")
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    refuse("timm:vit_tiny_patch16_224", "needs timm .*; pip install timm, with the torchvision of this torch")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    refuse(dinov2, "needs transformers; pip install transformers")
    assert not (tmp_path / "out").exists()


def test_tokens_that_are_no_grid_are_refused() -> None:
    network = torch.nn.Conv2d(3, 4, 1)
    with pytest.raises(InputError, match=r"--features conv gives \(4, 8, 8\) instead of 4 tokens; choose a vision"):
        encoders.FeatureEncoder("conv", network, network, side=8, grid=2, mean=(0.5,) * 3, std=(0.5,) * 3)
