"""REPA's and SRA's vae-sd/ folder, read as it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sra2_fast.data import make_loader, open_data
from sra2_fast.errors import InputError

COUNT = 6
LABELS = [4, 0, 7, 0, 1, 4]


def name(index: int) -> str:
    return f"{index // 4:05d}/img-mean-std-{index:08d}.npy"


@pytest.fixture
def repa(tmp_path: Path) -> Path:
    """A REPA data folder: vae-sd/ beside images/; half of the samples with a leading dimension of 1."""
    draws = np.random.default_rng(0)
    for index in range(COUNT):
        path = tmp_path / "vae-sd" / name(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        moments = draws.standard_normal((8, 32, 32)).astype(np.float32)
        np.save(path, moments[None] if index % 2 else moments)
    (tmp_path / "images" / "00000").mkdir(parents=True)
    write_labels(tmp_path, [[name(index), label] for index, label in enumerate(LABELS)][::-1])
    return tmp_path


def write_labels(repa: Path, labels: object) -> None:
    (repa / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))


def moments(repa: Path, index: int) -> np.ndarray:
    return np.load(repa / "vae-sd" / name(index)).reshape(8, 32, 32)


@pytest.mark.parametrize("inside", [False, True])
def test_the_folder_and_its_parent_are_both_accepted(repa: Path, inside: bool) -> None:
    source = open_data(repa / "vae-sd" if inside else repa)
    assert (source.num_samples, source.num_classes, source.shape) == (COUNT, 8, (4, 32, 32))
    assert source.has_posterior and source.block_size is None
    values, labels = source.read(np.array([5, 0, 3]))
    assert labels.tolist() == [LABELS[5], LABELS[0], LABELS[3]]
    for value, index in zip(values, (5, 0, 3), strict=True):
        assert (value == moments(repa, index)).all()


def test_z_is_scaled_as_stable_diffusion_s(repa: Path) -> None:
    source = open_data(repa)
    values, _ = source.read(np.arange(2))
    eps = np.random.default_rng(1).standard_normal((2, 4, 32, 32)).astype(np.float32)
    want = (values[:, :4].astype(np.float64) + values[:, 4:].astype(np.float64) * eps) * 0.18215
    np.testing.assert_allclose(source.latents(values, eps), want, rtol=1e-5, atol=1e-6)
    assert source.decode_info().kind == "vae" and source.decode_info().scale[0] == np.float32(0.18215)


def test_it_trains_from_a_worker(repa: Path) -> None:
    (batch,) = make_loader(open_data(repa), batch_size=6, seed=0, num_steps=1, num_workers=1)
    assert batch.latents.shape == (6, 4, 32, 32) and sorted(batch.labels.tolist()) == sorted(LABELS)


def refused(repa: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        list(make_loader(open_data(repa), batch_size=6, seed=0, num_steps=1))
    assert "\n" not in str(caught.value)


def test_no_labels(repa: Path) -> None:
    write_labels(repa, [])
    refused(repa, r"dataset.json: labels must be null or a list of \[file, label\]; --ignore-labels does without them")
    (repa / "vae-sd" / "dataset.json").write_text("[1")
    refused(repa, "dataset.json cannot be read")
    (repa / "vae-sd" / "dataset.json").unlink()
    refused(repa, "dataset.json is missing; it holds the labels of the samples beside it .--ignore-labels does without")
    assert open_data(repa, ignore_labels=True).num_samples == COUNT


def test_null_labels_are_one_class(repa: Path) -> None:
    """REPA's dataset_tools writes "labels": null for pictures without classes; that was refused."""
    write_labels(repa, None)
    source = open_data(repa)
    assert (source.num_samples, source.num_classes) == (COUNT, 1)
    assert source.read(np.arange(COUNT))[1].tolist() == [0] * COUNT
    assert any("dataset.json has no labels: all samples are of one class, label 0" in note for note in source.notes)


def test_labels_can_be_ignored(repa: Path) -> None:
    labelled, source = open_data(repa), open_data(repa, num_classes=1, ignore_labels=True)
    values, labels = source.read(np.arange(COUNT))
    assert source.num_classes == 1 and labels.tolist() == [0] * COUNT and labels.dtype == np.int64
    assert (values == labelled.read(np.arange(COUNT))[0]).all()
    assert not any("no labels" in note for note in source.notes)


# Normalisation


def write_channels(folder: Path, channels: int, spread: float) -> Path:
    draws = np.random.default_rng(0)
    for index in range(COUNT):
        values = draws.standard_normal((2 * channels, 8, 8)).astype(np.float32) * np.float32(spread)
        path = folder / "vae-sd" / name(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, values)
    write_labels(folder, [[name(index), label] for index, label in enumerate(LABELS)])
    return folder


def test_stable_diffusion_s_scale_is_assumed_for_four_channels_only(tmp_path: Path) -> None:
    """Latents of 16 channels (SD3, FLUX) were multiplied by 0.18215, without a word."""
    four = open_data(write_channels(tmp_path / "four", 4, 4.0))
    assert [note for note in four.notes if "taken to be Stable Diffusion's, z = value * 0.18215; for" in note]
    write_channels(tmp_path / "sixteen", 16, 0.5)
    refused(
        tmp_path / "sixteen", r"holds latents of 16 channels and no normalisation; give --latent-scale \(and --late"
    )
    with pytest.raises(InputError, match="give --latent-scale"):
        open_data(tmp_path / "sixteen", latent_shift=0.5)


@pytest.mark.parametrize(
    ("scale", "shift"), [(1.5305, 0.0609), ("1.5305", "0.0609"), (np.linspace(1, 2, 16), ",".join(["-0.25"] * 16))]
)
def test_a_normalisation_that_is_told_is_used(tmp_path: Path, scale: object, shift: object) -> None:
    source = open_data(write_channels(tmp_path, 16, 0.5), latent_scale=scale, latent_shift=shift)  # type: ignore[arg-type]
    assert source.notes == [] and source.scale.shape == source.shift.shape == (16,)
    values, _ = source.read(np.arange(COUNT))
    numbers = [np.float64(part.split(",")) if isinstance(part, str) else np.float64(part) for part in (scale, shift)]
    scales, shifts = (np.broadcast_to(part, 16)[:, None, None] for part in numbers)
    np.testing.assert_allclose(source.latents(values), (values[:, :16] - shifts) * scales, rtol=1e-5, atol=1e-6)
    assert source.decode_info().scale.tolist() == source.scale.tolist()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"latent_scale": "a"}, "--latent-scale must be a finite number, or 16 of them .*, one a channel, got a"),
        ({"latent_scale": [1.0, 2.0]}, r"--latent-scale must be a finite .*, got \[1.0, 2.0\]"),
        ({"latent_scale": float("inf")}, "--latent-scale must be a finite .*, got inf"),
        ({"latent_scale": 0.0}, "--latent-scale must be above 0, got 0.0"),
        ({"latent_scale": 1.0, "latent_shift": "1,,2"}, "--latent-shift must be a finite .*, got 1,,2"),
    ],
)
def test_a_normalisation_that_cannot_be(tmp_path: Path, options: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        open_data(write_channels(tmp_path, 16, 0.5), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("spread", "warned"), [(0.05, True), (1.0, False), (40.0, True)])
def test_a_spread_far_from_the_noise_s_is_said(tmp_path: Path, spread: float, warned: bool) -> None:
    write_channels(tmp_path, 4, 1.0)
    source = open_data(tmp_path, latent_scale=spread / 2**0.5)  # mean and std both add a variance of 1
    warnings = [note for note in source.notes if "standard deviation of the normalised latents is" in note]
    assert len(warnings) == warned
    assert source.spread() == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize("label", [-1, 1.5, "3", True, None])
def test_a_label_out_of_range(repa: Path, label: object) -> None:
    write_labels(repa, [[name(0), label]])
    refused(repa, r"dataset.json: label out of range: \['00000/img-mean-std-00000000.npy', .*\] must be \[file, int")


def test_more_classes_than_the_model(repa: Path) -> None:
    assert open_data(repa, num_classes=8).num_classes == 8
    with pytest.raises(InputError, match=r"label out of range: .*vae-sd has 8 classes, the model 5; set num_cl"):
        open_data(repa, num_classes=5)


def test_a_missing_and_an_unlabelled_file(repa: Path) -> None:
    labels = [[name(index), label] for index, label in enumerate(LABELS)]
    write_labels(repa, labels[:-1])
    refused(repa, r"00001/img-mean-std-00000005.npy has no label in dataset.json \(1 such files\)")
    write_labels(repa, [*labels, ["00001/img-mean-std-00000006.npy", 1]])
    refused(repa, r"00001/img-mean-std-00000006.npy is missing \(1 of the 7 files in dataset.json\)")


def test_a_truncated_sample(repa: Path) -> None:
    path = repa / "vae-sd" / name(3)
    path.write_bytes(path.read_bytes()[:1000])
    refused(repa, "img-mean-std-00000003.npy cannot be read .*; encode this image again")


def test_a_pickle_is_never_run(repa: Path) -> None:
    np.save(repa / "vae-sd" / name(3), np.array([{"a": 1}], dtype=object), allow_pickle=True)
    refused(repa, "img-mean-std-00000003.npy cannot be read .*pickle")


def test_a_sample_of_another_shape(repa: Path) -> None:
    np.save(repa / "vae-sd" / name(3), np.ones((8, 16, 16), np.float32))
    refused(repa, r"img-mean-std-00000003.npy must be \(8, 32, 32\), got \(8, 16, 16\)")
    np.save(repa / "vae-sd" / name(0), np.ones((3, 16, 16), np.float32))
    refused(repa, r"img-mean-std-00000000.npy must hold \[mean, std\], got 3 channels")
    np.save(repa / "vae-sd" / name(0), np.ones((16, 16), np.float32))
    refused(repa, r"img-mean-std-00000000.npy must be one latent, \(C, H, W\) or \(1, C, H, W\), got \(16, 16\)")


def test_a_nan_names_its_file(repa: Path) -> None:
    broken = moments(repa, 2)
    broken[0, 0, 0] = np.nan
    np.save(repa / "vae-sd" / name(2), broken)
    refused(repa, "NaN or infinity in .*vae-sd/00000/img-mean-std-00000002.npy; encode these images again")


def test_a_folder_without_samples(tmp_path: Path) -> None:
    (tmp_path / "vae-sd").mkdir()
    refused(tmp_path, r"vae-sd holds no img-mean-std-\*.npy; give the vae-sd folder or its parent")
