"""What the whole-step benchmarks say while they run and when they cannot: MFU, slow steps, bars, files, memory."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sra2_fast import SiT_models, backends

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import fused_speedup
import peak
import plot
import step_time
from lib import counting, doing
from lib.step_rows import StepRow

pytestmark = pytest.mark.training

TINY = ["--model", "32,2,2,8", "--batch-size", "2", "--device", "cpu"]
BASELINE = [*TINY, "--implementation", "eager", "--precision", "fp32", "--rows", "baseline"]


def slowed(call: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slow(*arguments: Any) -> Any:
        time.sleep(seconds)
        return call(*arguments)

    return slow


def test_an_mfu_is_at_most_1_where_the_products_were_slower_than_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A machine that was busy whenever a product ran: 1.27 was printed on one.
    def slow_products(*arguments: Any) -> dict[str, peak.Product]:
        return {"product in": peak.Product(lambda: time.sleep(0.02), flops=1)}

    monkeypatch.setattr(step_time, "step_products", slow_products)
    file = tmp_path / "a.jsonl"
    assert step_time.main([*BASELINE, "--steps", "3", "--json", str(file)]) == 0
    (one,) = (json.loads(line) for line in file.read_text().splitlines())
    assert 0 < one["mfu"] <= 1 and one["product_tflop_per_s"] < one["best_step_tflop_per_s"]
    assert "the fastest step did more, so MFU is a share of its" in capsys.readouterr().out


def test_one_round_is_enough_for_an_mfu(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    arguments = ["--model", "64,2,2,4", "--batch-size", "2", "--device", "cpu", "--rows", "baseline,sra2-cosine"]
    assert step_time.main([*arguments, "--steps", "1", "--json", str(file)]) == 0
    for one in (json.loads(line) for line in file.read_text().splitlines()):
        assert 0 < one["mfu"] <= 1 and one["ms_p20"] == one["ms_p80"]


@pytest.mark.parametrize("name", ["SiT-S/2", "SiT-B/4", "SiT-XL/2"])
def test_a_round_of_products_is_less_work_than_a_blocks_forward(name: str) -> None:
    # In an emulated type a large product takes seconds: among the steps it must be a small part of them.
    with torch.device("meta"):
        config = SiT_models[name](learn_sigma=False, implementation="eager").config()
    products = peak.step_products(config, 32, torch.float32, torch.device("meta"))
    forward = 32 * counting.sit_forward_flops(config)
    assert config["depth"] * sum(product.flops for product in products.values()) < forward


def test_the_square_product_is_small_where_its_type_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for is_fast, size in ((True, 2048), (False, 512)):
        monkeypatch.setattr(peak, "is_bf16_fast", lambda device, is_fast=is_fast: is_fast)
        assert peak.product_size(cpu, torch.bfloat16) == size
        assert peak.product_size(cpu, torch.float32) == 2048
    assert peak.product_flop_per_s(cpu, torch.bfloat16, rounds=1) > 0


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notices after 0.5 s instead of a minute."""
    monkeypatch.setattr(doing, "NOTICE_SECONDS", 0.5)


def test_what_takes_long_is_told_once_with_what_would_help(impatient: None, capsys: pytest.CaptureFixture[str]) -> None:
    with doing.Doing("bench", "title", 3, "less of it") as now:
        now("short")
        now("long")
        time.sleep(1.2)
        now("long")  # the same thing again is told again
        time.sleep(0.8)
    told = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if line.startswith("bench:")]
    assert len(told) == 2 and "short" not in "".join(told)
    assert re.fullmatch(r"bench: long: \d+ s so far; faster with less of it", told[0])


@pytest.mark.parametrize(
    ("slow", "phase"),
    [
        ("check", "row baseline, eager, checking against the float32 model"),
        ("persistent_bytes", "row baseline, eager, memory"),
        ("__call__", "timing round 2 of 2, baseline"),
    ],
)
def test_a_slow_step_says_which_row_and_which_phase(
    slow: str, phase: str, impatient: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(StepRow, slow, slowed(getattr(StepRow, slow), 0.9))
    assert step_time.main([*BASELINE, "--steps", "2"]) == 0
    told = capsys.readouterr().err
    assert re.search(rf"step_time: {phase}: \d+ s so far; faster with a smaller --batch-size or --model", told), told


def test_emulated_bf16_is_named_as_what_is_slow(
    impatient: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "is_bf16_fast", lambda device: False)
    monkeypatch.setattr(StepRow, "check", slowed(StepRow.check, 0.9))
    assert step_time.main([*BASELINE, "--steps", "1", "--precision", "bf16"]) == 0
    assert "faster with --precision fp32 (this machine emulates bf16), " in capsys.readouterr().err


def test_the_bar_writes_few_lines_where_no_terminal_reads_it(capsys: pytest.CaptureFixture[str]) -> None:
    # Each call of a variant redrew it: hundreds of lines in a log file.
    assert step_time.main([*BASELINE, "--steps", "40"]) == 0
    assert capsys.readouterr().err.count("\r") < 10


def never(*arguments: object) -> None:
    raise AssertionError("measured before its files were tried")


@pytest.mark.parametrize(
    ("plot_file", "words"),
    [
        ("a.bmp", r"step_time: --plot must be a file ending in \.png, \.svg, \.pdf, got .*a\.bmp"),
        ("taken/a.png", r"step_time: --plot .*taken/a\.png cannot be written \(.*\); name another file"),
        ("folder.png", r"step_time: --plot .*folder\.png cannot be written \(Is a directory\); name another file"),
    ],
)
def test_a_plot_that_cannot_be_drawn_is_told_before_measuring(
    plot_file: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_time, "measure", never)
    (tmp_path / "taken").write_text("a file, not a folder")
    (tmp_path / "folder.png").mkdir()
    arguments = ["--json", str(tmp_path / "a.jsonl"), "--plot", str(tmp_path / plot_file)]
    assert step_time.main([*BASELINE, *arguments]) == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert re.fullmatch(words, told)


def test_a_plot_without_matplotlib_is_told_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_time, "measure", never)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ["--json", str(tmp_path / "a.jsonl"), "--plot", str(tmp_path / "a.png")]
    assert step_time.main([*BASELINE, *arguments]) == 2
    assert capsys.readouterr().err == "step_time: a plot needs matplotlib: pip install matplotlib\n"


def test_trying_a_file_leaves_it_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records, picture = tmp_path / "new" / "a.jsonl", tmp_path / "a.png"
    picture.write_bytes(b"older")
    monkeypatch.setattr(step_time, "measure", lambda *arguments: torch.empty(1 << 50))
    assert step_time.main([*BASELINE, "--json", str(records), "--plot", str(picture)]) == 2
    assert picture.read_bytes() == b"older" and not records.exists()


def test_fused_speedup_tries_its_file_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fused_speedup, "prepared", never)
    monkeypatch.setattr(backends, "choose", lambda op, device_type: backends.Choice("c++", ""))
    assert fused_speedup.main([*TINY, "--json", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert re.fullmatch(r"fused_speedup: --json .* cannot be written \(Is a directory\); name another file\n", told)


def test_panels_share_one_axis_so_that_their_bars_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    limits: list[tuple[float, float]] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: limits.extend(x.get_xlim() for x in self.axes))
    figures = {"eager": 100.0, "fused": 50.0}
    file = tmp_path / "a.jsonl"
    for implementation, ms in figures.items():
        line = {"row": "baseline", "model": "m", "ms_median": ms, "ms_p20": ms, "ms_p80": ms}
        with file.open("a") as out:
            out.write(json.dumps({**line, "implementation": implementation}) + "\n")
    assert plot.main(["step_time", str(file), str(tmp_path / "a.png")]) == 0
    assert len(limits) == 2 and limits[0] == limits[1] and limits[0][0] == 0 and limits[0][1] > 100


def fails_with(error: BaseException) -> Callable[..., None]:
    def fail(*arguments: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("measure", "what"),
    [
        (lambda *arguments: torch.empty(1 << 50), r".*DefaultCPUAllocator: can't allocate memory.*"),
        (fails_with(MemoryError()), "MemoryError"),
        (
            fails_with(torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nGPU 0")),
            r"CUDA out of memory\. Tried 2 GiB",
        ),
    ],
)
def test_out_of_memory_is_one_line_with_what_to_lower(
    measure: Callable[..., object], what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A CPU's allocator raises a RuntimeError, which was a page of traceback.
    monkeypatch.setattr(step_time, "measure", measure)
    assert step_time.main(BASELINE) == 2
    told = capsys.readouterr().err
    assert re.fullmatch(rf"step_time: out of memory \({what}\); lower --batch-size, or have fewer --rows\n", told), told


def test_another_error_of_torch_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_time, "measure", fails_with(RuntimeError("shapes cannot be multiplied")))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        step_time.main(BASELINE)


def test_a_graph_is_for_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert step_time.main([*BASELINE, "--graph"]) == 2
    assert capsys.readouterr().err == "step_time: --graph captures a CUDA graph, a CPU has none; leave it out\n"
