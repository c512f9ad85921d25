"""The Makefile: a second `make demo` repeats nothing, and what trains is left out of `make check`."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from repository import ROOT

TRAINS = {"trainer", "tiny", "around", "StepRow", "TrainStep", "TINY_RUN"}  # what a test that trains takes hold of
TRAIN = """#!/bin/sh
echo "trained" >> "$LOG"
for out; do true; done
mkdir -p "$out/samples" && touch "$out/samples/step-00000240.png" "$out/samples/step-00000480.png"
"""
PYTHON = """#!/bin/sh
echo "$@" >> "$LOG"
echo "the table"
"""


@pytest.fixture
def make_demo(tmp_path: Path):
    """Runs `make demo` with programs in place of sra2-fast and python that only say they ran."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    binaries, log = tmp_path / "venv" / "bin", tmp_path / "log"
    binaries.mkdir(parents=True)
    for name, script in (("sra2-fast", TRAIN), ("python", PYTHON)):
        (binaries / name).write_text(script)
        (binaries / name).chmod(0o755)
    for stamp in (".torch-installed", ".demo-installed"):
        (tmp_path / "venv" / stamp).touch()

    def run() -> tuple[str, list[str]]:
        """What was printed, and what ran."""
        log.write_text("")
        names = {"VENV": tmp_path / "venv", "RUNS": tmp_path / "runs"}
        command = ["make", "demo", *(f"{name}={value}" for name, value in names.items())]
        environment = {**os.environ, "LOG": str(log), "MAKEFLAGS": ""}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, log.read_text().splitlines()

    return run


def test_a_second_demo_shows_what_is_there_and_says_what_to_delete(make_demo, tmp_path: Path) -> None:
    printed, ran = make_demo()
    assert ran == ["trained", "benchmarks/step_time.py --batch-size 2 --steps 4"] and "the table" in printed
    printed, ran = make_demo()
    assert ran == [] and "the table" in printed
    runs = tmp_path / "runs"
    assert f"{runs}/digits is finished, its last sample grid is {runs}/digits/samples/step-00000480.png" in printed
    assert f"delete {runs}/digits to train again" in printed
    assert f"The table is {runs}/step_time.txt, measured 20" in printed and "delete it to measure again" in printed


def test_what_is_deleted_is_made_again_and_nothing_else(make_demo, tmp_path: Path) -> None:
    make_demo()
    (tmp_path / "runs" / "step_time.txt").unlink()
    assert make_demo()[1] == ["benchmarks/step_time.py --batch-size 2 --steps 4"]
    shutil.rmtree(tmp_path / "runs" / "digits")
    assert make_demo()[1] == ["trained"]


def test_a_table_cut_short_is_not_taken_for_one(make_demo, tmp_path: Path) -> None:
    (tmp_path / "venv" / "bin" / "python").write_text("#!/bin/sh\necho half\nexit 1\n")
    with pytest.raises(AssertionError):
        make_demo()
    assert not (tmp_path / "runs" / "step_time.txt").exists()


def marks(path: Path) -> set[str]:
    """The markers a test file gives to all its tests."""
    tree = ast.parse(path.read_text())
    named = [n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "pytestmark"]
    return {node.attr for one in named for node in ast.walk(one.value) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("test_*.py")), ids=lambda path: path.stem)
def test_what_trains_is_marked_so_that_make_check_leaves_it_out(path: Path) -> None:
    named = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    arguments = {node.arg for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.arg)}
    assert not (named | arguments) & TRAINS or "training" in marks(path), f"{path}: pytestmark = pytest.mark.training"


def test_the_quick_tier_has_the_ops_the_model_and_the_objective() -> None:
    left_out = {path.stem for path in (ROOT / "tests").glob("test_*.py") if marks(path) & {"slow", "training"}}
    kept = {path.stem for path in (ROOT / "tests").glob("test_*.py")} - left_out
    assert len(kept) > len(left_out)
    assert {"test_layer_norm_modulate", "test_model", "test_objective", "test_optim", "test_structure"} <= kept


def test_clang_format_is_the_same_version_everywhere() -> None:
    pins = [
        (ROOT / name).read_text().count("clang-format==23.1.5")
        for name in ("pyproject.toml", ".pre-commit-config.yaml")
    ]
    assert pins == [1, 1] and "clang-format 23.1.5" in (ROOT / ".clang-format").read_text()
