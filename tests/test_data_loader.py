"""Digits, the endless shuffle and the loader: what a step sees depends on (seed, step) and the data alone."""

from __future__ import annotations

import pickle
import sys
import time

import numpy as np
import pytest
import torch

from sra2_fast.data import Batch, LatentSource, make_loader, open_data
from sra2_fast.data.loader import ReadAhead
from sra2_fast.data.shuffle import WINDOW_BLOCKS, EndlessShuffle
from sra2_fast.data.source import DecodeInfo
from sra2_fast.errors import InputError
from sra2_fast.randomness import Stream, normal, uniform
from sra2_fast.vae.decode import make_decoder


class Posterior(LatentSource):
    """Eleven samples whose mean is their index and whose std is 1 + index."""

    name, num_samples, num_classes, shape, has_posterior = "posterior", 11, 3, (2, 3, 3), True
    shift, scale = np.array([1.0, 2.0], np.float32), np.array([0.5, 4.0], np.float32)

    def __init__(self) -> None:
        self.poisoned = -1
        self.announced: list[np.ndarray] = []

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = np.ones((len(indices), 4, 3, 3), np.float32) * indices[:, None, None, None]
        values[:, 2:] += 1
        values[indices == self.poisoned, 0, 1, 1] = np.nan
        return values, indices % 3

    def will_need(self, indices: np.ndarray) -> None:
        self.announced.append(indices)


def batches(source: LatentSource, **options: int) -> list[Batch]:
    return list(make_loader(source, **{"batch_size": 8, "seed": 3, "num_steps": 4, **options}))  # type: ignore[arg-type]


def same(left: list[Batch], right: list[Batch]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(
        (a is None and b is None) or torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def digits() -> LatentSource:
    return open_data("digits")


def test_digits_are_real_digits_scaled_to_one(digits: LatentSource) -> None:
    from sklearn.datasets import load_digits

    assert (digits.num_samples, digits.num_classes, digits.shape) == (1797, 10, (1, 8, 8))
    values, labels = digits.read(np.array([0, 5, 1796]))
    z = digits.latents(values)
    assert z.dtype == np.float32 and labels.tolist() == load_digits().target[[0, 5, 1796]].tolist()
    assert (z[:, 0] * 8 + 8 == load_digits().images[[0, 5, 1796]]).all()
    whole = digits.latents(digits.read(np.arange(1797))[0])
    assert (whole.min(), whole.max()) == (-1.0, 1.0)


def test_digits_decode_to_grey_images(digits: LatentSource) -> None:
    values, _ = digits.read(np.arange(4))
    images = make_decoder(digits.decode_info())(torch.from_numpy(digits.latents(values)))
    assert images.shape == (4, 8, 8, 3) and images.dtype == np.uint8
    assert (images == np.round(values[:, 0] * 255 / 16).astype(np.uint8)[..., None]).all()
    white = make_decoder(digits.decode_info())(torch.full((1, 1, 8, 8), 1.7))
    assert (white == 255).all()


def test_digits_need_no_autoencoder(digits: LatentSource) -> None:
    assert make_decoder(digits.decode_info(), "none").note is None
    with pytest.raises(InputError, match=r"the data are grayscale pixels, .* autoencoder; leave out some/vae"):
        make_decoder(digits.decode_info(), "some/vae")


def test_latents_without_their_vae_are_shown_as_colours() -> None:
    info = DecodeInfo("vae", np.zeros(4, np.float32), np.ones(4, np.float32))
    z = torch.randn(2, 4, 6, 6)
    images = make_decoder(info)(z)
    assert images.shape == (2, 6, 6, 3)
    assert (np.abs(images - np.clip((z[:, :3].permute(0, 2, 3, 1).numpy() + 3) * 42.5, 0, 255)) <= 0.5 + 1e-3).all()


def test_a_batch_is_what_its_address_says() -> None:
    source = Posterior()
    (batch,) = batches(source, start_step=5, num_steps=1)
    order = EndlessShuffle(11, 3).take(5 * 8, 8)
    eps = normal(Stream.POSTERIOR, 3, 5, range(8), source.shape)
    want = (order[:, None, None, None] + (1 + order[:, None, None, None]) * eps).astype(np.float32)
    want = (want - source.shift[:, None, None]) * source.scale[:, None, None]
    np.testing.assert_allclose(batch.latents.numpy(), want, rtol=4 * 2.0**-24, atol=1e-5)
    assert batch.labels.tolist() == (order % 3).tolist() and batch.labels.dtype == torch.int64
    assert (batch.noise.numpy() == normal(Stream.NOISE, 3, 5, range(8), source.shape)).all()
    for name, stream in (
        ("time", Stream.TIME),
        ("label", Stream.LABEL),
        ("teacher", Stream.TEACHER),
        ("token", Stream.TOKENS),
    ):
        assert (getattr(batch, f"{name}_uniform").numpy() == uniform(stream, 3, 5, np.arange(8))).all()


class Mirrored(Posterior):
    """The mirrored sample is the sample plus 1000."""

    has_flips = True

    def read_flipped(self, indices: np.ndarray, flipped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, labels = self.read(indices)
        values[flipped, :2] += 1000
        return values, labels


def test_a_flip_is_drawn_for_every_sample_and_step_where_the_data_hold_flips() -> None:
    """By the keyed draws, so by no number of workers or processes; all else of the batch is as without flips."""
    plain, mirrored = batches(Posterior(), num_steps=40), batches(Mirrored(), num_steps=40)
    drawn = []
    for step, (one, other) in enumerate(zip(plain, mirrored, strict=True)):
        want = uniform(Stream.FLIP, 3, step, np.arange(8)) < 0.5
        moved = (other.latents - one.latents)[:, 0, 0, 0] > 250  # 1000 times the scale
        assert moved.tolist() == want.tolist()
        assert all(torch.equal(a, b) for a, b in zip(one[1:7], other[1:7], strict=True))
        drawn.append(want)
    assert 0.4 < np.mean(drawn) < 0.6  # 320 draws: three standard deviations
    assert same(mirrored, batches(Mirrored(), num_steps=40, num_workers=2))
    halves = [batches(Mirrored(), num_steps=1, rank=rank, world_size=2)[0].latents for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), mirrored[0].latents)


def test_a_source_that_says_it_has_flips_must_read_them() -> None:
    source = Posterior()
    source.has_flips = True
    with pytest.raises(NotImplementedError, match="posterior says has_flips and has no read_flipped"):
        batches(source, num_steps=1)


def test_the_posterior_is_drawn_anew_every_step() -> None:
    source = Posterior()
    source.num_samples = 1
    first, second = batches(source, batch_size=1, num_steps=2)
    assert (first.latents != second.latents).all()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(digits: LatentSource, num_workers: int) -> None:
    assert same(batches(digits), batches(digits, num_workers=num_workers))


def test_processes_change_nothing() -> None:
    source = Posterior()
    whole = batches(source)
    parts = [batches(source, rank=rank, world_size=4) for rank in range(4)]
    joined = [
        Batch(*(torch.cat(tensors) for tensors in zip(*step, strict=True) if tensors[0] is not None))
        for step in zip(*parts, strict=True)
    ]
    assert same(whole, joined)


def test_a_resumed_run_sees_the_same_batches(digits: LatentSource) -> None:
    whole = batches(digits, batch_size=100, num_steps=40)  # 18 steps an epoch: the resume lies in the second
    assert same(whole[25:], batches(digits, batch_size=100, start_step=25, num_steps=15))


def test_the_loader_leaves_torch_s_generator_alone(digits: LatentSource) -> None:
    before = torch.get_rng_state()
    batches(digits)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("block_size", [None, 3])
def test_every_sample_once_an_epoch(block_size: int | None) -> None:
    shuffle = EndlessShuffle(1000, 9, block_size)
    order = np.concatenate([shuffle.take(first, 64) for first in range(0, 3008, 64)])[:3000].reshape(3, 1000)
    for epoch in order:
        assert (np.sort(epoch) == np.arange(1000)).all()
    assert (order[0] != order[1]).mean() > 0.9
    assert (EndlessShuffle(1000, 10, block_size).take(0, 1000) != order[0]).mean() > 0.9
    assert (EndlessShuffle(1000, 9, block_size).take(990, 20) == order.ravel()[990:1010]).all()


def test_a_batch_larger_than_the_data_set() -> None:
    assert (np.bincount(EndlessShuffle(5, 0).take(3, 12)) >= 2).all()


def test_the_block_shuffle_reads_a_window_at_a_time() -> None:
    block, count = 4, 10_000
    shuffle = EndlessShuffle(count, 1, block)
    order = shuffle.epoch_order(0)
    for first in range(0, count, shuffle.window_size):
        window = order[first : first + shuffle.window_size]
        assert len(np.unique(window // block)) <= WINDOW_BLOCKS + 1
        assert (np.diff(window) != 1).mean() > 0.9  # mixed inside
        end, samples = shuffle.window(first + 1)
        assert end == min(first + shuffle.window_size, count) and (samples == window).all()


def test_windows_are_announced_once_each_and_one_ahead() -> None:
    source = Posterior()
    source.num_samples, source.block_size = 1000, 2  # windows of 128
    batches(source, batch_size=50, num_steps=20)
    assert [len(samples) for samples in source.announced] == [128] * 7 + [1000 - 7 * 128, 128]
    assert (np.sort(np.concatenate(source.announced[:-1])) == np.arange(1000)).all()
    assert (source.announced[-1] == EndlessShuffle(1000, 3, 2).window(1000)[1]).all(), "of the next epoch"


def test_a_window_is_announced_before_its_samples_are_read() -> None:
    source = Posterior()
    source.num_samples, source.block_size = 1000, 2
    shuffle = EndlessShuffle(1000, 3, 2)
    read_ahead = ReadAhead(source, shuffle)
    for first in (40, 130, 300, 0, 900):  # in the next window, beyond what was announced, back, near the end
        read_ahead(first)
        end, samples = shuffle.window(first)
        known = [window.tolist() for window in source.announced]
        assert samples.tolist() in known and shuffle.window(end)[1].tolist() in known
    assert [len(window) for window in source.announced] == [128] * 6 + [1000 - 7 * 128, 128]


def test_reading_ahead_changes_no_batch() -> None:
    source = Posterior()
    source.num_samples, source.block_size = 1000, 2
    whole = batches(source, batch_size=50, num_steps=45)  # over two ends of an epoch
    assert same(whole[17:23], batches(source, batch_size=50, start_step=17, num_steps=6))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_nan_names_its_sample_also_from_a_worker(num_workers: int) -> None:
    source = Posterior()
    source.poisoned = 7
    with pytest.raises(InputError, match=r"^data: NaN or infinity in sample 7 of posterior; encode these images again"):
        batches(source, num_workers=num_workers)


def test_many_nans_are_counted() -> None:
    values = np.full((5, 4, 3, 3), np.inf, np.float32)
    with pytest.raises(InputError, match=r"in sample 0 .*, sample 1 .*, sample 2 of posterior and 2 more; "):
        Posterior().check_finite(values, np.arange(5))


def test_refused_batch_sizes_and_workers(digits: LatentSource) -> None:
    with pytest.raises(InputError, match="batch_size must be a positive multiple of the 3 processes, got 8"):
        make_loader(digits, batch_size=8, seed=0, num_steps=1, world_size=3)
    with pytest.raises(InputError, match="batch_size must be a positive multiple of the 1 processes, got 0"):
        make_loader(digits, batch_size=0, seed=0, num_steps=1)
    with pytest.raises(InputError, match="num_workers must be 0 or more, got -1"):
        make_loader(digits, batch_size=8, seed=0, num_steps=1, num_workers=-1)


def test_a_model_with_too_few_classes_is_refused() -> None:
    with pytest.raises(InputError, match="label out of range: digits has 10 classes, the model 7; set num_classes"):
        open_data("digits", num_classes=7)


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match="digits needs scikit-learn; pip install scikit-learn"):
        open_data("digits")


def test_the_steps_travel_to_a_spawned_worker(digits: LatentSource) -> None:
    dataset = make_loader(digits, batch_size=8, seed=3, num_steps=1).dataset
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[2].noise, dataset[2].noise)


def test_data_is_a_small_part_of_a_digits_step(digits: LatentSource) -> None:
    """1.2 ms of processor time a step of 128 on one busy core; ten times that would be seen in training."""
    start = time.process_time()
    batches(digits, batch_size=128, num_steps=20)
    assert (time.process_time() - start) / 20 < 12e-3
