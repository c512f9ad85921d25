"""The command line: one line and exit code 2 for bad input, and nothing imported that was not asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sra2_fast import __version__
from sra2_fast.cli import COMMANDS, main

pytestmark = pytest.mark.training

TINY_RUN = [
    "train",
    "--model",
    "16,2,2,4",
    "--batch-size",
    "4",
    "--sample-every",
    "0",
    "--precision",
    "fp32",
    "--device",
]
TINY_RUN += ["cpu"]


def test_the_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in COMMANDS)
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    assert f"usage: sra2-fast {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trian"], "sra2-fast: unknown command 'trian'; commands: prepare, train, "),
        (["train", "--out", "x", "--model", "SiT-Q/2"], "sra2-fast train: --model SiT-Q/2 is not known"),
        (["train"], "sra2-fast train: --out is missing"),
        (["train", "--out", "x", "--align", "dot"], "sra2-fast train: argument --align: invalid choice: 'dot'"),
        (["train", "--out", "x", "--steps", "many"], "sra2-fast train: argument --steps: invalid int value: 'many'"),
        (["train", "--step", "5"], "sra2-fast train: unrecognized arguments: --step 5; see sra2-fast train --help"),
        (["train", "--out", "/dev/null/run"], "sra2-fast train: --out /dev/null/run cannot be written"),
        (["train", "--out", "x", "--data", "/no/such/folder"], "sra2-fast train: data: /no/such/folder does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert err.startswith(line) and err.count("\n") == 1 and not out
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_diverges_leaves_with_1_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY_RUN, "--out", str(tmp_path), "--steps", "20", "--lr", "1e30"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("sra2-fast train: step 2: velocity") and "is not finite" in last


def test_a_finished_run_says_where_it_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY_RUN, "--out", str(tmp_path), "--steps", "2"]) == 0
    assert "done: step 2, loss " in capsys.readouterr().out


@pytest.mark.parametrize("given", ["-0.1,0.2", "-.5", "-1e-3"])
def test_a_list_of_numbers_may_begin_with_a_minus(tmp_path: Path, given: str, capsys: pytest.CaptureFixture) -> None:
    """argparse took all but one plain number for another option: "expected one argument"."""
    assert main(["train", "--out", str(tmp_path), "--data", "digits", "--latent-shift", given]) == 2
    assert f"digits records its own normalisation; leave out --latent-shift {given}" in capsys.readouterr().err
    assert main(["train", "--out", str(tmp_path), "--latent-shift", "--vae"]) == 2
    assert "argument --latent-shift: expected one argument" in capsys.readouterr().err


def test_help_does_not_wait_for_torch(root: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from sra2_fast import cli\ntry:\n cli.main(['train', '--help'])\n"
    )
    code += "except SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_module_is_the_command(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sra2_fast.train", "--steps", "0", "--out", "x"],
        capture_output=True,
        text=True,
        cwd=root,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "sra2-fast train: --steps must be at least 1, got 0\n"


def test_the_package_is_the_command_too(root: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "sra2_fast", "--version"], capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout) == (0, f"sra2-fast {__version__}\n"), done.stderr
