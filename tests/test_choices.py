"""Choosing by measurement: what is chosen, when it is measured again, and a cache file in every state of disrepair."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sra2_fast import choices, cli
from sra2_fast.choices import Choice
from sra2_fast.errors import InputError

CPU = torch.device("cpu")
CASE = {"device": "a CPU", "shape": [2, 4], "dtype": "float32"}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache" / "choices.json"
    monkeypatch.setattr(choices, "cache_file", lambda: path)
    return path


def taking(ms: float, calls: list[float]) -> Callable[[], None]:
    def run() -> None:
        calls.append(ms)
        time.sleep(ms * 1e-3)

    return run


def chosen(calls: list[float], ms: dict[str, float], case: dict[str, object] | None = None) -> Choice:
    runs = {name: taking(one, calls) for name, one in ms.items()}
    return choices.choose("op", case or CASE, list(runs), lambda: runs, CPU)


def test_the_fastest_is_measured_once_and_kept(file: Path) -> None:
    calls: list[float] = []
    first = chosen(calls, {"slow": 6, "fast": 2})
    assert (first.name, first.how) == ("fast", "measured") and 2 <= first.ms["fast"] < 6 <= first.ms["slow"]
    assert calls.count(6) >= choices.LEAST_ROUNDS and calls.count(2) >= choices.LEAST_ROUNDS
    calls.clear()
    again = chosen(calls, {"slow": 6, "fast": 2})
    assert again == Choice("fast", "measured earlier", first.ms) and not calls
    assert str(again).startswith("fast (measured earlier: slow 6.") and list(file.parent.iterdir()) == [file]
    assert choices.recorded("op") == [(CASE, again)] and choices.recorded("another op") == []


@pytest.mark.parametrize("change", [{"shape": [2, 5]}, {"device": "another"}, {"dtype": "bfloat16"}, {"versions": {}}])
def test_another_case_is_another_question(change: dict[str, object], file: Path) -> None:
    calls: list[float] = []
    chosen(calls, {"only": 0.1})
    calls.clear()
    chosen(calls, {"only": 0.1}, {**CASE, **change})
    assert calls and len(json.loads(file.read_text())["choices"]) == 2


def test_other_candidates_are_another_question(file: Path) -> None:
    calls: list[float] = []
    assert chosen(calls, {"a": 3}).name == "a"
    assert chosen(calls, {"a": 3, "installed since": 0.5}).name == "installed since"


def test_a_later_candidate_has_to_be_clearly_faster(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for ms, name in (({"a": 1.02, "b": 1.0}, "a"), ({"a": 1.04, "b": 1.0}, "b"), ({"a": 1.0, "b": 2.0}, "a")):
        monkeypatch.setattr(choices, "measure", lambda op, runs, device, ms=ms: ms)
        assert choices.choose("op", {**CASE, "ms": ms}, ["a", "b"], dict, CPU).name == name


def test_what_does_not_run_is_left_out(file: Path) -> None:
    def broken() -> None:
        raise RuntimeError("no kernel for it\nand a page of explanation")

    runs = {"broken": broken, "fine": lambda: None}
    choice = choices.choose("op", CASE, list(runs), lambda: runs, CPU)
    assert choice.name == "fine" and list(choice.ms) == ["fine"]
    with pytest.raises(InputError, match=r"op: none of broken runs on cpu \(broken: no kernel for it\)$"):
        choices.choose("op", CASE, ["broken"], lambda: {"broken": broken}, CPU)


DAMAGED = {
    "not JSON": "{",
    "no format": "{}",
    "another format": json.dumps({"format": 2, "choices": {}}),
    "a list": "[]",
    "an entry without a name": json.dumps({"format": 1, "choices": {'{"op": "op", "candidates": []}': {"ms": {}}}}),
    "a time in words": json.dumps(
        {"format": 1, "choices": {'{"op": "op", "candidates": []}': {"name": "a", "ms": {"a": "fast"}}}}
    ),
    "a key that says nothing": json.dumps({"format": 1, "choices": {"op": {"name": "a", "ms": {}}}}),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_costs_a_line(content: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.parent.mkdir()
    file.write_text(content)
    assert choices.recorded("op") == []
    assert chosen([], {"a": 0.1}).name == "a"
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"op: {file} (is damaged|cannot be read) \(.*\); measuring again", line)
    assert chosen([], {"a": 0.1}).how == "measured earlier"  # it was written anew


def test_a_folder_that_cannot_be_written_costs_a_line(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.parent.write_text("a file where the folder should be")
    assert chosen([], {"a": 0.1})[:2] == ("a", "measured")
    (cannot_write,) = capsys.readouterr().out.splitlines()
    assert cannot_write.startswith(f"op: {file} cannot be written (") and "the next run will" in cannot_write


def test_the_file_is_in_the_users_cache_folder() -> None:
    """In a process of its own: the session's fixture has put another path in its place."""
    code = "from sra2_fast import choices; print(choices.cache_file())"
    for variables, folder in (({"XDG_CACHE_HOME": "/elsewhere"}, "/elsewhere"), ({"HOME": "/h"}, "/h/.cache")):
        environment = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"} | variables
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == f"{folder}/sra2_fast/choices.json"


def test_info_says_what_was_measured(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choices.choose("attention", CASE, ["a"], lambda: {"a": lambda: None}, CPU)
    assert cli.main(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["attention of [2, 4] float32"]
    assert told.startswith("a (measured earlier: a ") and told.endswith(" ms) on a CPU")
