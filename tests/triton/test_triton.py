"""Runs the checks of the Triton kernels that need no GPU, each file in a process of its own.

`check_<op>.py` run interpreted: TRITON_INTERPRET=1 must be set before Triton is first imported and changes every
kernel of the process. `check_ahead_of_time.py` compiles for GPUs through a fake driver that stays in place. Neither
fits a process that other tests share.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
INTERPRETED = (
    "check_adapters",
    "check_layer_norm_modulate",
    "check_alignment_velocity_loss",
    "check_adamw_ema",
    "check_launch_config",
)
COMPILED = ("check_ahead_of_time",)


def run_checks(name: str, **environment: str) -> None:
    pytest.importorskip("triton", reason="Triton does not import here, so its kernels cannot be checked")
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON_", "PYTEST_"))}
    environ |= {"OMP_NUM_THREADS": "1", **environment}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-o", "addopts="]
    finished = subprocess.run(
        [*command, str(HERE / f"{name}.py")], cwd=HERE.parents[1], env=environ, capture_output=True, text=True
    )
    if finished.returncode != 0:
        pytest.fail(finished.stdout[-6000:] + finished.stderr[-2000:], pytrace=False)


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted(name: str) -> None:
    run_checks(name, TRITON_INTERPRET="1")


@pytest.mark.parametrize("arch", ["80", "90"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name: str, arch: str, tmp_path: Path) -> None:
    run_checks(name, SRA2_FAST_ARCH=arch, TRITON_CACHE_DIR=str(tmp_path))


def test_every_check_is_run() -> None:
    assert {path.stem for path in HERE.glob("check_*.py")} == {*INTERPRETED, *COMPILED}
