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
    write_labels(repa, None)
    refused(repa, "dataset.json holds no labels; training needs a class for every sample")
    (repa / "vae-sd" / "dataset.json").write_text("[1")
    refused(repa, "dataset.json cannot be read")
    (repa / "vae-sd" / "dataset.json").unlink()
    refused(repa, "dataset.json is missing; it holds the labels of the samples beside it")


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
    refused(repa, r"img-mean-std-00000000.npy must be \(2C, H, W\), got \(16, 16\)")


def test_a_nan_names_its_file(repa: Path) -> None:
    broken = moments(repa, 2)
    broken[0, 0, 0] = np.nan
    np.save(repa / "vae-sd" / name(2), broken)
    refused(repa, "NaN or infinity in .*vae-sd/00000/img-mean-std-00000002.npy; encode these images again")


def test_a_folder_without_samples(tmp_path: Path) -> None:
    (tmp_path / "vae-sd").mkdir()
    refused(tmp_path, r"vae-sd holds no img-mean-std-\*.npy; give the vae-sd folder or its parent")
