"""Shared by all tests: a fixed seed, where the repository is, and one thread to each of several test processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: two processes of two threads fight for two cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import pytest
import torch
from repository import ROOT


@pytest.fixture(autouse=True)
def _same_draws_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _measured_anew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What this machine's user has measured is neither read nor written."""
    file = tmp_path_factory.mktemp("cache") / "choices.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sra2_fast.choices.cache_file", lambda: file)
        yield


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """A trainer whose pieces a test can reach into, before or after it runs."""
    from training_runs import tiny

    from sra2_fast.data import open_data
    from sra2_fast.train import build
    from sra2_fast.train.loop import Trainer
    from sra2_fast.train.run_directory import RunDirectory

    directories = []

    def make(name: str = "run", **changes: Any) -> Any:
        options = build.resolve(tiny(tmp_path / name, **changes))
        directories.append(RunDirectory(options.out))
        return Trainer(options, open_data(options.data), directories[-1])

    yield make
    for directory in directories:
        directory.close()
