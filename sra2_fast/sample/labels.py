"""Which label image i has: a function of i alone, so that a folder of samples can be gone on with, or made larger."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import InputError, must_be
from ..randomness import Stream, uniform

Labels = Callable[[np.ndarray], np.ndarray]
FILES = (".npy", ".txt")
EXPECTED = "balanced, random, labels such as 207,360, or a .npy or .txt file of them"


def make_labels(given: str, num_classes: int, seed: int) -> tuple[Labels, object]:
    """(indices (n,) int64 -> labels (n,) int64, what stands for it in the plan).

    given: "balanced": image i has label i mod num_classes. "random": uniform, keyed by (seed, i). A list, or a file of
        whole numbers: image i has the i-th of them, from the start again after the last.
    Raises InputError for anything else, and for labels that the model does not have.
    """
    if given == "balanced":
        return lambda indices: indices % num_classes, given
    if given == "random":

        def random(indices: np.ndarray) -> np.ndarray:
            share = uniform(Stream.SAMPLING_LABEL, seed, 0, indices).astype(np.float64)
            return np.minimum((share * num_classes).astype(np.int64), num_classes - 1)

        return random, given
    listed = _read_file(Path(given)) if given.endswith(FILES) else _read_list(given)
    low, high = int(listed.min()), int(listed.max())
    if low < 0 or high >= num_classes:
        expected = f"0 to {num_classes - 1} for this model"
        raise must_be("sample", f"the labels of --labels {given}", expected, low if low < 0 else high)
    return lambda indices: listed[indices % len(listed)], listed.tolist()


def _read_list(given: str) -> np.ndarray:
    try:
        return np.array([int(label) for label in given.split(",")], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise must_be("sample", "--labels", EXPECTED, repr(given)) from error


def _read_file(path: Path) -> np.ndarray:
    try:
        values = np.load(path) if path.suffix == ".npy" else np.array(path.read_text().split(), dtype=np.int64)
    except OSError as error:
        raise InputError(f"sample: --labels {path} cannot be read ({error.strerror or error}); give another") from error
    except (ValueError, EOFError, OverflowError) as error:
        raise InputError(f"sample: --labels {path} holds no whole numbers; give one label for each image") from error
    values = np.asarray(values)
    if values.ndim != 1 or not values.size or not np.issubdtype(values.dtype, np.integer):
        got = f"{values.dtype} {values.shape}"
        raise must_be("sample", f"the labels of --labels {path}", "whole numbers (n,), one for each image", got)
    return values.astype(np.int64)
