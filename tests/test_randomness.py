"""Draws are addressed, not consumed: the same address gives the same numbers, another address unrelated ones."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sra2_fast import randomness
from sra2_fast.errors import InputError
from sra2_fast.randomness import Stream, generator, normal, sampling_noise, uniform

SHAPE = (2, 3, 5)
RECORDED_NORMALS = [1.0729602575302124, 1.1471754312515259, 0.7480323314666748]
RECORDED_UNIFORMS = [0.14883500337600708, 0.36663681268692017]


@pytest.mark.parametrize("stream", [Stream.NOISE, Stream.POSTERIOR])
def test_a_normal_depends_on_its_address_alone(stream: Stream) -> None:
    whole = normal(stream, 5, 7, range(12), SHAPE)
    assert whole.shape == (12, *SHAPE) and whole.dtype == np.float32
    share = normal(stream, 5, 7, [9, 4, 4], SHAPE)
    assert (share == whole[[9, 4, 4]]).all()
    for row, index in zip(whole, range(12), strict=True):
        assert (generator(stream, 5, 7, index).standard_normal(SHAPE, dtype=np.float32) == row).all()


def test_an_odd_number_of_draws_leaves_nothing_to_the_next_row() -> None:
    """float32 normals take half a 64-bit word each; the other half was once handed to the next row."""
    assert (normal(Stream.NOISE, 1, 1, [0, 1], (3,))[1] == normal(Stream.NOISE, 1, 1, [1], (3,))[0]).all()


@pytest.mark.parametrize("other", [(Stream.POSTERIOR, 5, 7, 3), (Stream.NOISE, 6, 7, 3), (Stream.NOISE, 5, 8, 3)])
def test_another_stream_seed_or_step_is_unrelated(other: tuple[Stream, int, int, int]) -> None:
    stream, seed, step, index = other
    first = normal(Stream.NOISE, 5, 7, [3], (4096,))[0]
    second = normal(stream, seed, step, [index], (4096,))[0]
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / 4096**0.5


def test_neighbouring_indices_are_unrelated() -> None:
    rows = normal(Stream.NOISE, 0, 0, range(16), (4096,))
    correlations = np.corrcoef(rows)[np.triu_indices(16, 1)]
    assert np.abs(correlations).max() < 5 / 4096**0.5


def test_normals_are_normal() -> None:
    draws = normal(Stream.NOISE, 11, 0, range(64), (1024,)).ravel()
    assert stats.kstest(draws, "norm").pvalue > 1e-3


@pytest.mark.parametrize("stream", [Stream.TIME, Stream.LABEL, Stream.TEACHER, Stream.TOKENS])
def test_a_uniform_depends_on_its_address_alone(stream: Stream) -> None:
    whole = uniform(stream, 5, 7, np.arange(256))
    assert whole.dtype == np.float32 and whole.shape == (256,)
    assert (uniform(stream, 5, 7, np.arange(128, 192)) == whole[128:192]).all()
    assert (uniform(stream, 5, 7, [255, 0]) == whole[[255, 0]]).all()
    assert (uniform(stream, 5, 8, np.arange(256)) != whole).mean() > 0.99
    assert uniform(stream, 5, 7, []).shape == (0,)


def test_uniforms_are_uniform_and_the_interval_is_open() -> None:
    draws = uniform(Stream.TIME, 3, 0, np.arange(200_000))
    assert stats.kstest(draws, "uniform").pvalue > 1e-3
    multiples = draws.astype(np.float64) * 2**24
    assert (multiples % 2 == 1).all()  # so neither 0 nor 1 can occur
    assert draws.min() > 0 and draws.max() < 1


def test_the_extreme_uniforms_stay_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest and the largest float32 draw, 0 and 1 - 2^-24, must not come out as 0 and 1."""

    class Extremes:
        def random(self, count: int, dtype: type) -> np.ndarray:
            return np.array([0.0, 1 - 2.0**-24], dtype=dtype)

    monkeypatch.setattr(randomness, "generator", lambda *address: Extremes())
    assert uniform(Stream.TIME, 0, 0, [0, 1]).tolist() == [2.0**-24, 1 - 2.0**-24]


def test_sampling_noise_is_the_same_at_every_step() -> None:
    first = sampling_noise(4, range(8), SHAPE)
    assert (sampling_noise(4, [2, 7], SHAPE) == first[[2, 7]]).all()
    assert (normal(Stream.NOISE, 4, 0, range(8), SHAPE) != first).any()


def test_recorded_numbers() -> None:
    """These exact numbers are what a resumed run of an earlier version relies on."""
    assert normal(Stream.NOISE, 1, 2, [3], (3,))[0].tolist() == RECORDED_NORMALS
    assert uniform(Stream.TIME, 1, 2, [0, 1]).tolist() == RECORDED_UNIFORMS


def test_large_seeds_and_wrong_ones() -> None:
    assert (normal(Stream.NOISE, 2**64 - 1, 0, [0], (8,)) != normal(Stream.NOISE, 0, 0, [0], (8,))).any()
    for seed in (-1, 2**64, 1.5, True):
        with pytest.raises(InputError, match=r"seed must be an integer from 0 to 2\^64 - 1, got"):
            normal(Stream.NOISE, seed, 0, [0], (1,))  # type: ignore[arg-type]
