"""Every random number of a training run, as a function of (seed, step, index in the global batch).

Nothing here has a state: a draw is addressed, not consumed. So a run gives the same numbers on one process or on
eight, with any number of loader workers, and a resumed run needs no replay. The addresses are those of Philox4x64
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), a counter-based generator:

    key     = (seed, 0)
    counter = (0, index, step, stream)      the first word is left to the draws of one address, 2^64 blocks of them

numpy's ziggurat turns them into normals, so they are the same on every machine. What is not here: the initial weights
(torch's own generator, seeded once by the trainer).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

from .errors import must_be


class Stream(IntEnum):
    """One independent stream for each use; the numbers are part of a run's reproducibility and never change."""

    NOISE = 1  # e of the path, one (C, H, W) normal a sample
    POSTERIOR = 2  # eps of z = mean + std * eps, fresh every step
    TIME = 3  # uniform that SRA2Loss.time_from_uniform maps to t
    LABEL = 4  # uniform; the label is dropped where it is below class_dropout_prob
    TEACHER = 5  # uniform, scaled to the teacher's time gap
    SHUFFLE = 6  # the order of an epoch (step = epoch)
    SAMPLING = 7  # the starting noise of sample grids, and of `sra2-fast sample`
    SAMPLING_STEP = 8  # the noise of a stochastic sampler (step = its step)
    PREPARE = 9  # the order in which images are laid out in shards
    FLIP = 10  # uniform; the mirrored image is taken where it is below 1/2, of data that hold one
    CROP = 11  # the random crop of an image by `prepare` (index = a hash of its name)
    SAMPLING_LABEL = 12  # uniform; the label of an image of `sra2-fast sample --labels random`
    TOKENS = 13  # uniform; which of an image's tokens are aligned, where not all of them are


def generator(stream: Stream, seed: int, step: int = 0, index: int = 0) -> np.random.Generator:
    """The generator that stands at the address (stream, seed, step, index)."""
    _check_seed(seed)
    counter = np.array([0, index, step, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=np.array([seed, 0], dtype=np.uint64)))


def normal(
    stream: Stream, seed: int, step: int, indices: Sequence[int] | np.ndarray, shape: Sequence[int]
) -> np.ndarray:
    """(n, *shape) float32 standard normals, row i from the address (stream, seed, step, indices[i]).

    One generator is moved from address to address: 3 us a row (a new one for each costs 12; one core, numpy 2.4).
    """
    draws = generator(stream, seed, step)
    philox = draws.bit_generator
    state = philox.state
    counter = state["state"]["counter"]
    out = np.empty((len(indices), *shape), dtype=np.float32)
    for row, index in zip(out, indices, strict=True):
        counter[1] = index
        philox.state = state  # also empties the buffers, so no draw of the last row is left over
        draws.standard_normal(out=row, dtype=np.float32)
    return out


def uniform(stream: Stream, seed: int, step: int, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """(n,) float32 uniforms in the open interval (0, 1), entry i belonging to indices[i].

    One address a step: value k of its sequence belongs to index k, so the entries before the largest index are drawn
    too (a microsecond a thousand). Values are odd multiples of 2^-24: neither 0 nor 1 occurs, and an inverse
    distribution function stays finite.
    """
    indices = np.asarray(indices, dtype=np.int64)
    if indices.size == 0:
        return np.empty(0, dtype=np.float32)
    draws = generator(stream, seed, step).random(int(indices.max()) + 1, dtype=np.float32)
    odd = (draws * np.float32(2**24)).astype(np.int32) | 1
    return (odd.astype(np.float32) * np.float32(2.0**-24))[indices]


def sampling_noise(seed: int, indices: Sequence[int] | np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """(n, *shape) float32: the starting noise of images `indices`; the same at every step, so grids can be compared."""
    return normal(Stream.SAMPLING, seed, 0, indices, shape)


def _check_seed(seed: int) -> None:
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        raise must_be("randomness", "seed", "an integer from 0 to 2^64 - 1", repr(seed))
