"""benchmarks/data_throughput.py: its table, its JSON lines, its check of what was read, its exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import data_throughput
from lib import data_sets

from sra2_fast.data import open_data

SMALL = ["--samples", "512", "--rounds", "1"]


def test_the_table_and_the_json_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results" / "data.jsonl"
    words = [*SMALL, "--layouts", "shards", "vae-sd", "--dir", str(tmp_path), "--json", str(file)]
    assert data_throughput.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("512 latents, batches of 256, ") and lines[1].split() == [
        "layout",
        "warm",
        "cold",
        "batches",
    ]
    assert [line.split()[0] for line in lines[2:4]] == ["shards", "vae-sd"]
    assert "one worker, warm shards: " in lines[4] and "target 10,000" in lines[4]
    assert "cold, shards against files of 32 KB: " in lines[5]
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["layout"] for record in records] == ["shards", "vae-sd"]
    assert all(record["latents_per_s"]["warm"]["median"] > 0 and record["commit"] for record in records)
    assert [path.name for path in tmp_path.iterdir()] == ["results"], "the data are removed"


@pytest.mark.parametrize("name", data_sets.LAYOUTS)
def test_every_layout_of_the_benchmark_holds_what_was_drawn(tmp_path: Path, name: str) -> None:
    moments, labels = data_sets.draw(8)
    source = open_data(data_sets.LAYOUTS[name](tmp_path / "data", moments, labels))
    assert data_throughput._checked(name, source, moments, labels) is source
    with pytest.raises(data_throughput.WrongStep, match=f"{name} does not give the latents that were written"):
        data_throughput._checked(name, source, moments + np.float32(0.1), labels)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--samples", "100"], "data_throughput: --samples must be 256 or more, got 100"),
        (["--rounds", "0"], "data_throughput: --rounds must be 1 or more, got 0"),
        (["--dir", "/nowhere"], "data_throughput: --dir /nowhere is no folder; name one on the disk to be measured"),
    ],
)
def test_bad_input(words: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_throughput.main(words) == 2
    assert capsys.readouterr().err.strip() == error
