"""Where the repository is. Not in conftest.py: there are several of that name, and an import finds any of them."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
