"""What people already have opens by itself: fast-DiT, LightningDiT, REPA-E, SR-DiT and flat folders, in public form."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from public_data import (
    COUNT,
    LABELS,
    draw,
    write_dataset_json,
    write_fast_dit,
    write_flat,
    write_latents_stats,
    write_lightningdit,
    write_repa_e,
)
from safetensors.torch import load_file, save_file
from tolerance import UNIT_ROUNDOFF

from sra2_fast.cli import main
from sra2_fast.data import LatentSource, make_loader, open_data
from sra2_fast.errors import InputError

EVERY = np.arange(COUNT)
FLOAT32 = UNIT_ROUNDOFF[torch.float32]


def lightningdit(folder: Path) -> Path:
    return write_lightningdit(folder, draw(32, spread=3), draw(32, spread=3, seed=1))


def repa_e(folder: Path) -> Path:
    return write_repa_e(folder, np.abs(draw(64)))


WRITERS: dict[str, Callable[[Path], Path]] = {
    "fast-DiT": lambda folder: write_fast_dit(folder, draw(4)),
    "LightningDiT": lightningdit,
    "REPA-E": repa_e,
    "REPA-E folder": lambda folder: write_dataset_json(folder / "e2e-sdvae", draw(8), "img-mean-std-").parent,
    "SR-DiT": lambda folder: write_dataset_json(folder / "vae-in", draw(32, spread=3), "img-latents-").parent,
    "flat": lambda folder: write_flat(folder, draw(4)),
}


@pytest.fixture(params=WRITERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return WRITERS[request.param](tmp_path / "data")


def z_of(source: LatentSource) -> np.ndarray:
    return source.latents(source.read(EVERY)[0])


def assert_close(got: np.ndarray, want: np.ndarray, roundings: int) -> None:
    """Elementwise: each of so many float32 operations rounds once, relative to the terms it works on."""
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=roundings * FLOAT32, atol=roundings * FLOAT32 * np.abs(want).max())


# Each layout: numbers, labels, order


@pytest.mark.parametrize("inside", ["", "imagenet256_features"])
def test_fast_dit(tmp_path: Path, inside: str) -> None:
    latents = draw(4)
    source = open_data(write_fast_dit(tmp_path / "data", latents) / inside)
    assert (source.num_samples, source.num_classes, source.shape) == (COUNT, 4, (4, 4, 4))
    assert not source.has_posterior and not source.has_flips and source.has_labels
    assert source.read(EVERY)[1].tolist() == LABELS, "10 comes after 9, not after 1"
    assert_close(z_of(source), latents, 2)  # divided and multiplied by the factor that decoding needs
    assert source.decode_info().scale[0] == np.float32(0.18215)
    assert any("taken to be sampled and scaled already, by Stable Diffusion's 0.18215" in note for note in source.notes)


def test_fast_dit_raw_latents_are_told(tmp_path: Path) -> None:
    latents = draw(4, spread=5.5)
    source = open_data(write_fast_dit(tmp_path / "data", latents), latent_scale=0.18215)
    assert_close(z_of(source), latents.astype(np.float64) * np.float32(0.18215), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [16, 32])
def test_lightningdit(tmp_path: Path, dtype: torch.dtype, channels: int) -> None:
    latents, flipped = draw(channels, spread=3), draw(channels, spread=3, seed=1)
    source = open_data(write_lightningdit(tmp_path / "data", latents, flipped, dtype))
    assert (source.num_samples, source.num_classes, source.shape) == (COUNT, 4, (channels, 4, 4))
    assert source.has_flips and not source.has_posterior and source.notes == []
    stats = torch.load(tmp_path / "data" / "latents_stats.pt")
    mean, std = (stats[key].double().numpy() for key in ("mean", "std"))
    rows, chosen = np.array([9, 0, 6, 7]), np.array([True, False, True, False])  # of both files, both ways
    values, labels = source.read_flipped(rows, chosen)
    stored = np.where(chosen[:, None, None, None], flipped[rows], latents[rows])
    want = (torch.from_numpy(stored).to(dtype).double().numpy() - mean) / std
    assert_close(source.latents(values), want, 3)
    assert labels.tolist() == [LABELS[row] for row in rows]


def test_lightningdit_without_statistics_is_measured(tmp_path: Path) -> None:
    folder = lightningdit(tmp_path / "data")
    known = z_of(open_data(folder))
    (folder / "latents_stats.pt").unlink()
    source = open_data(folder)
    assert any("latents_stats.pt is missing: every channel is brought to mean 0 and standard deviation 1" in note
               for note in source.notes)  # fmt: skip
    np.testing.assert_allclose(z_of(source), known, rtol=0.01, atol=0.01)  # theirs divides by n - 1
    z = z_of(source).astype(np.float64)
    np.testing.assert_allclose(z.std(axis=(0, 2, 3)), 1, rtol=1e-6)
    told = open_data(folder, latent_scale=0.5, latent_shift=1.0)
    assert_close(z_of(told), (draw(32, spread=3) - 1) * np.float64(0.5), 2)


@pytest.mark.parametrize("inside", ["", "e2e-vavae.h5"])
def test_repa_e(tmp_path: Path, inside: str) -> None:
    moments = np.abs(draw(64))
    folder = write_repa_e(tmp_path / "data", moments)
    bias, scale = np.linspace(-1, 1, 32, dtype=np.float32), np.linspace(0.5, 1, 32, dtype=np.float32)
    write_latents_stats(folder / "e2e-vavae-latents-stats.pt", bias, scale)
    source = open_data(folder / inside)
    assert (source.num_samples, source.num_classes, source.shape) == (COUNT, 4, (32, 4, 4))
    assert source.has_posterior and source.read(EVERY)[1].tolist() == LABELS and source.notes == []
    eps = draw(32, seed=3)
    want = moments[:, :32] + moments[:, 32:].astype(np.float64) * eps
    want = (want - bias.astype(np.float64)[:, None, None]) * scale[:, None, None]
    assert_close(source.latents(source.read(EVERY)[0], eps), want, 4)


def test_repa_e_without_statistics_is_measured_posterior_included(tmp_path: Path) -> None:
    source = open_data(repa_e(tmp_path / "data"))
    assert any("e2e-vavae-latents-stats.pt is missing" in note for note in source.notes)
    assert source.spread() == pytest.approx(1, rel=1e-5)
    repeated = open_data(tmp_path / "data")
    assert (source.scale == repeated.scale).all() and source.fingerprint() == repeated.fingerprint()


def test_repa_e_folders_have_its_statistics_too(tmp_path: Path) -> None:
    folder = write_dataset_json(tmp_path / "e2e-vavae", draw(64), "img-mean-std-")
    with pytest.raises(InputError, match="holds latents of 32 channels and no normalisation; give --latent-scale"):
        open_data(tmp_path)
    bias, scale = np.ones(32, np.float32), np.linspace(0.5, 1, 32, dtype=np.float32)
    for place in (tmp_path / "e2e-vavae-latents-stats.pt", folder / "e2e-vavae-latents-stats.pt"):
        write_latents_stats(place, bias, scale)
        source = open_data(tmp_path)
        assert source.scale.tolist() == scale.tolist() and source.shift.tolist() == bias.tolist()
        place.unlink()


@pytest.mark.parametrize("inside", ["", "vae-in"])
def test_sr_dit(tmp_path: Path, inside: str) -> None:
    latents = draw(32, spread=3)
    (tmp_path / "images" / "00000").mkdir(parents=True)
    write_dataset_json(tmp_path / "vae-in", latents, "img-latents-")
    source = open_data(tmp_path / inside)
    assert (source.shape, source.has_posterior, source.num_classes) == ((32, 4, 4), False, 4)
    assert_close(z_of(source), latents.astype(np.float64) * np.float32(0.3099), 1)
    assert source.read(EVERY)[1].tolist() == LABELS


def test_flat(tmp_path: Path) -> None:
    latents = draw(4)
    source = open_data(write_flat(tmp_path / "data", latents))
    assert (source.num_samples, source.num_classes, source.has_labels) == (COUNT, 1, False)
    assert_close(z_of(source), latents, 2)
    assert source.read(EVERY)[1].tolist() == [0] * COUNT
    assert any("holds no labels: trained without classes" in note for note in source.notes)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_npy_files_of_other_precisions(tmp_path: Path, dtype: Any) -> None:
    latents = draw(4).astype(dtype)
    source = open_data(write_flat(tmp_path / "data", latents))
    assert_close(z_of(source), latents, 3)


# What every layout does


def test_every_layout_trains_the_same_on_workers_ranks_and_after_a_resume(folder: Path) -> None:
    options: dict[str, Any] = {"batch_size": 8, "seed": 3, "num_steps": 5}
    whole = list(make_loader(open_data(folder), **options))
    assert whole[0].latents.dtype == torch.float32 and all(torch.isfinite(batch.latents).all() for batch in whole)
    resumed = list(make_loader(open_data(folder), **{**options, "start_step": 3, "num_steps": 2}))  # mid-epoch
    workers = list(make_loader(open_data(folder), num_workers=1, **options))
    ranks = [list(make_loader(open_data(folder), rank=rank, world_size=2, **options)) for rank in range(2)]
    for step, batch in enumerate(whole):
        halves = [torch.cat([parts[step][field] for parts in ranks]) for field in range(3)]
        for same in (workers[step], halves, *([resumed[step - 3]] if step >= 3 else [])):
            assert all(torch.equal(batch[field], same[field]) for field in range(3)), step


def test_every_layout_travels_to_a_spawned_worker(folder: Path) -> None:
    source = open_data(folder)
    source.read(EVERY)  # what is open by then stays here
    copy = pickle.loads(pickle.dumps(source))
    assert (copy.read(EVERY)[0] == source.read(EVERY)[0]).all() and copy.fingerprint() == source.fingerprint()


def test_every_layout_trains_without_its_labels(folder: Path) -> None:
    source = open_data(folder, ignore_labels=True)
    assert (source.num_classes, source.has_labels, set(source.read(EVERY)[1])) == (1, False, {0})
    assert source.fingerprint() != open_data(folder).fingerprint() or not open_data(folder).has_labels


def test_flips_are_drawn_for_half_of_the_samples(tmp_path: Path) -> None:
    latents = np.ones((COUNT, 16, 4, 4), np.float32) * draw(16)[:, :, :1, :1]
    source = open_data(write_lightningdit(tmp_path / "data", latents, -latents))
    batches = list(make_loader(source, batch_size=COUNT, seed=0, num_steps=40))
    unflipped = {(z.tobytes()) for z in z_of(source)}
    share = np.mean([z.numpy().tobytes() in unflipped for batch in batches for z in batch.latents])
    assert abs(share - 0.5) < 4 * 0.5 / (40 * COUNT) ** 0.5  # four standard deviations of a fair coin


# Bad input: one line that names the file and what to do, exit code 2


def npy(folder: Path, name: str) -> Callable[[np.ndarray], None]:
    return lambda array: np.save(folder / name, array)


def spoil_lightningdit(folder: Path, **changes: Any) -> None:
    path = folder / "latents_rank00_shard001.safetensors"
    tensors = {key: value for key, value in {**load_file(path), **changes}.items() if value is not None}
    save_file(tensors, path)


def spoil_h5(folder: Path, name: str, data: Any) -> None:
    import h5py

    with h5py.File(folder / "e2e-vavae.h5", "a") as file:
        del file[name]
        if data is not None:
            file.create_dataset(name, data=data)


FEATURE, LABEL = "imagenet256_features/5.npy", "imagenet256_labels/5.npy"
SHARD, ENTRY = "latents_rank00_shard001.safetensors", "00000/img-mean-std-00000005.npy"
NAN4, NAN32, NAN64 = (np.full((channels, 4, 4), np.nan, np.float32) for channels in (4, 32, 64))
BAD: list[tuple[str, Callable[[Path], Any], str]] = [
    ("fast-DiT", lambda at: (at / LABEL).unlink(), r"labels/5.npy is missing, .*features/5.npy is there \(1 such"),
    ("fast-DiT", lambda at: (at / FEATURE).unlink(), r"features/5.npy is missing, .*labels/5.npy is there"),
    ("fast-DiT", lambda at: npy(at, LABEL)(np.array([-1])), r"label out of range: .*labels/5.npy must be .* \[-1\]"),
    ("fast-DiT", lambda at: npy(at, LABEL)(np.array([1.5])), r"label out of range: .*labels/5.npy must be .* \[1.5\]"),
    ("fast-DiT", lambda at: npy(at, FEATURE)(draw(4)[:1, :, :2]), r"5.npy must be \(4, 4, 4\), got \(4, 2, 4\)"),
    ("fast-DiT", lambda at: npy(at, FEATURE)(draw(4)), r"features/5.npy must be one latent, .* got \(12, 4, 4, 4\)"),
    ("fast-DiT", lambda at: npy(at, FEATURE)(np.ones((1, 4, 4, 4), np.int64)), "5.npy must hold float16 or float32"),
    ("fast-DiT", lambda at: npy(at, FEATURE)(NAN4), r"NaN or infinity in .*features/5.npy; encode"),
    ("fast-DiT", lambda at: (at / FEATURE).write_bytes(b"\x93NUMPY\x01\x00"), "features/5.npy cannot be read .*;"),
    ("fast-DiT", lambda at: (at / FEATURE).write_bytes(b"GIF"), "features/5.npy cannot be read .it is no .npy file"),
    ("flat", lambda at: npy(at, "5.npy")(NAN4), r"NaN or infinity in .*data/5.npy; encode"),
    ("flat", lambda at: npy(at, "5.npy")(draw(4)[0, :, :2]), r"5.npy must be \(4, 4, 4\), got \(4, 2, 4\)"),
    ("flat", lambda at: [npy(at, f"{i}.npy")(draw(4, spread=5.5)[i]) for i in EVERY], "is 5..*give --lat"),
    ("SR-DiT", lambda at: npy(at, "vae-in/00000/img-mean-std-00000005.npy")(NAN64), "holds both img-mean-std-"),
    ("SR-DiT", lambda at: npy(at, "vae-in/00000/img-latents-00000005.npy")(NAN32), "NaN or infinity in .*0005.npy"),
    ("SR-DiT", lambda at: (at / "vae-in/dataset.json").unlink(), "vae-in/dataset.json is missing; it holds the labels"),
    ("SR-DiT", lambda at: write_dataset_json(at / "vae-sd", draw(8), "img-mean-std-"), "vae-in and .*vae-sd; "),
    ("LightningDiT", lambda at: spoil_lightningdit(at, labels=None), "d001.* no tensor `labels`.*--ignore-labels"),
    ("LightningDiT", lambda at: spoil_lightningdit(at, latents=None), "d001.* no tensor `latents`, only labels"),
    ("LightningDiT", lambda at: spoil_lightningdit(at, latents_flip=None), "d001.* holds other tensors than .*d000"),
    ("LightningDiT", lambda at: spoil_lightningdit(at, labels=-torch.ones(5).long()), "out of range: .*d001.* -1"),
    ("LightningDiT", lambda at: spoil_lightningdit(at, labels=torch.ones(4).long()), r"labels must be \[5\] in I64"),
    ("LightningDiT", lambda at: spoil_lightningdit(at, latents_flip=torch.ones(5, 4, 4, 4)), "latents_flip must be .*"),
    ("LightningDiT", lambda at: spoil_lightningdit(at, latents=torch.ones(5).double()), "latents must be .n, C, H, W."),
    ("LightningDiT", lambda at: spoil_lightningdit(at, latents=torch.ones(5, 32, 4, 4).log() / 0), "NaN .*shard001"),
    ("LightningDiT", lambda at: (at / SHARD).write_bytes(b"abc"), "shard001.safetensors cannot be read .*; run"),
    ("LightningDiT", lambda at: torch.save({"mean": 1}, at / "latents_stats.pt"), "stats.pt cannot be read as mean"),
    ("LightningDiT", lambda at: torch.save({"mean": torch.ones(3), "std": torch.ones(3)}, at / "latents_stats.pt"),
     "latents_stats.pt is of 3 channels, the latents have 32"),
    ("LightningDiT", lambda at: torch.save({"mean": torch.ones(32), "std": torch.zeros(32)}, at / "latents_stats.pt"),
     "latents_stats.pt must hold finite numbers, std above 0"),
    ("REPA-E", lambda at: spoil_h5(at, ENTRY, None), "e2e-vavae.h5, 00000/img-mean-std-00000005.npy cannot be read"),
    ("REPA-E", lambda at: spoil_h5(at, ENTRY, draw(64)[0, :, :2]), r"0005.npy must be \(64, 4, 4\), got \(64, 2, 4\)"),
    ("REPA-E", lambda at: spoil_h5(at, ENTRY, NAN64), "NaN or infinity in .*e2e-vavae.h5, 00000/img-mean-std-00000005"),
    ("REPA-E", lambda at: spoil_h5(at, "dataset.json", None), "e2e-vavae.h5 has no dataset.json that can be read"),
    ("REPA-E", lambda at: spoil_h5(at, "dataset.json", np.array(b'{"labels": [["a.npy", -1]]}', "S")), "out of range"),
    ("REPA-E", lambda at: write_repa_e(at, draw(64), "other"), "holds e2e-vavae.h5 and other.h5; give the file"),
    ("REPA-E", lambda at: (at / "e2e-vavae.h5").write_bytes(b"abc"), "e2e-vavae.h5 cannot be opened .*; run REPA-E's"),
    ("REPA-E", lambda at: write_fast_dit(at, draw(4)), "two layouts .fast-DiT .* and REPA-E HDF5.; give"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: int) -> None:
    layout, spoil, message = BAD[case]
    folder = WRITERS[layout](tmp_path / "data")
    spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        list(make_loader(open_data(folder), batch_size=COUNT, seed=0, num_steps=4))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("layout", WRITERS)
def test_a_label_beyond_the_model_s_classes_ends_training_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    folder = WRITERS[layout](tmp_path / "data")
    classes = open_data(folder).num_classes
    if classes == 1:
        (folder / "5.npy").write_bytes(b"")
    words = ["train", "--data", str(folder), "--out", str(tmp_path / "run"), "--num-classes", "2", "--steps", "1"]
    assert main(words) == 2
    error = capsys.readouterr().err.splitlines()
    wanted = "5.npy cannot be read" if classes == 1 else f"has {classes} classes, the model 2; set num_classes to 4"
    assert len(error) == 1 and wanted in error[0] and not (tmp_path / "run").exists()


def test_a_normalisation_that_is_recorded_cannot_be_given_too(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"latents_stats.pt records the normalisation; leave out --latent-scale"):
        open_data(lightningdit(tmp_path / "a"), latent_scale=1.0)
    folder = repa_e(tmp_path / "b")
    write_latents_stats(folder / "e2e-vavae-latents-stats.pt", np.zeros(32, np.float32), np.ones(32, np.float32))
    with pytest.raises(InputError, match=r"latents-stats.pt records the normalisation; leave out --latent-scale"):
        open_data(folder, latent_shift=1.0)


def test_a_channel_that_is_the_same_everywhere_has_no_scale(tmp_path: Path) -> None:
    latents = draw(16)
    latents[:, 3] = 2.0
    folder = write_lightningdit(tmp_path / "data", latents, None)
    (folder / "latents_stats.pt").unlink()
    with pytest.raises(InputError, match="has a channel that is the same everywhere, so its scale cannot be measured"):
        open_data(folder)


def test_hdf5_without_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = repa_e(tmp_path / "data")
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(InputError, match="needs h5py; pip install h5py"):
        open_data(folder)
