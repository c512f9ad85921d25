"""Shared by all tests: a fixed seed, one thread a test process, and where the repository is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(autouse=True)
def _same_draws_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture
def root() -> Path:
    return ROOT
