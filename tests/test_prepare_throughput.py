"""benchmarks/prepare_throughput.py: its table, its JSON line, its check of what was timed, its exit codes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from photos import SIZE

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import prepare_throughput

pytest.importorskip("PIL.Image")
pytest.importorskip("diffusers")
pytest.importorskip("sklearn")
pytest_plugins = ["photos"]


def arguments(vae_path: Path, *more: str) -> list[str]:
    sizes = ["--images", "9", "--batch-size", "2", "--image-size", str(SIZE), "--rounds", "1", "--num-workers", "0"]
    return ["--vae", str(vae_path), *sizes, "--device", "cpu", *more]


def test_the_table_and_the_json_line(vae_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results" / "prepare.jsonl"
    assert prepare_throughput.main(arguments(vae_path, "--json", str(file))) == 0
    out = capsys.readouterr().out
    record = json.loads(file.read_text())
    rates = {name: record[f"{name}_images_per_s"] for name in ("autoencoder", "prepare", "one_by_one", "convert")}
    assert all(rate > 0 for rate in rates.values())
    assert record["images"] == 9 and record["vae_class"] == "AutoencoderKL" and record["precision"] == "fp32"
    share = record["share_of_autoencoder"]
    assert f"{100 * share:.1f} % of it; the target is 95 %" in out
    shown = {name: float(rate) for name, rate in re.findall(r"^  (\S.*?\S) +([\d.]+) images/s \(", out, re.M)}
    assert shown == {name.replace("_", " "): pytest.approx(rates[name], abs=0.006) for name in list(rates)[:3]}
    ratio = rates["prepare"] / rates["one_by_one"]
    both = rates["prepare"] * (1 / rates["convert"] + 1 / rates["one_by_one"])
    assert f"prepare is {ratio:.1f}x as fast, with its convert before" in out and f" {both:.1f}x\n" in out


def test_latents_of_other_images_are_no_result(
    vae_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode = prepare_throughput.encode

    def mirrored(vae: object, images: object) -> np.ndarray:
        return encode(vae, images.flip(-1))

    monkeypatch.setattr(prepare_throughput, "encode", mirrored)
    assert prepare_throughput.main(arguments(vae_path)) == 1
    assert re.search(r"prepare's first latent is \S+ away from that of its image", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (("--images", "7"), "prepare_throughput: --images must be 8 or more, got 7"),
        (("--rounds", "-1"), "prepare_throughput: --rounds must be 1 or more, got -1"),
        (("--json", "/"), r"prepare_throughput: --json / cannot be written"),
        (("--image-size", "33"), "--image-size must be a multiple of 4 for this autoencoder, got 33"),
    ],
)
def test_bad_input(vae_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], match: str) -> None:
    assert prepare_throughput.main(arguments(vae_path, *more)) == 2
    assert match in capsys.readouterr().err
