"""benchmarks/step_budget.py: what a step is made of, that its counts are right, and that it does not grow unnoticed."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from repository import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

from sra2_fast import SiT, backends
from sra2_fast.models.products import set_products
from sra2_fast.ops import adamw_ema

sys.path.insert(0, str(ROOT / "benchmarks"))

import plot
import step_budget
from lib import budget, counting, ledger, step_parts
from lib.ledger import Ledger, Operator
from lib.step_rows import Setting, StepRow

pytestmark = pytest.mark.training

TINY = "32,2,2,8"  # hidden size, depth, heads, patch size
DIM, DEPTH, PATCH, TOKENS, BATCH = 32, 2, 8, 16, 3
ROWS = ("baseline", "sra2-cosine", "sra2-smooth-l1", "sra")
SETTING = Setting(TINY, BATCH, "bf16", "fused", False, torch.device("cpu"), "sdpa")


@functools.cache
def traced(row: str) -> tuple[StepRow, list[Operator]]:
    return ledger.trace(row, SETTING)


def packed(row: str) -> list[Operator]:
    """The operators of the step with flash-attn."""
    return ledger.trace(row, dataclasses.replace(SETTING, attention="flash-attn"))[1]


@functools.cache
def predicted(row: str) -> dict[str, Any]:
    return step_budget.predict(step_budget.parse_arguments(["--row", row, "--predict", "h200"]))


def flops_by_part(operators: list[Operator]) -> dict[str, int]:
    found: collections.Counter[str] = collections.Counter()
    for one in operators:
        found[one.part] += one.flops
    return dict(found)


# What a step is made of


def flops_without_gradient(config: dict[str, Any]) -> int:
    """The two products of an image that no backward needs: the gradients of the latent and of the time's features."""
    patch_elements = config["patch_size"] ** 2 * config["in_channels"]
    tokens = (config["input_size"] // config["patch_size"]) ** 2
    of_time = counting.linear_flops(1, counting.TIME_FEATURES, config["hidden_size"])
    return counting.linear_flops(tokens, patch_elements, config["hidden_size"]) + of_time


@pytest.mark.parametrize("row", ROWS)
def test_flops_are_those_that_counting_has(row: str) -> None:
    step, operators = traced(row)
    want = BATCH * (step.flops_per_image - flops_without_gradient(step.sit.config()))
    assert sum(one.flops for one in operators) == want


def test_flops_of_sit_xl_are_those_that_counting_has() -> None:
    with torch.device("meta"):
        config = SiT(learn_sigma=False).config()
    for row in ("baseline", "sra2-cosine"):
        record = predicted(row)
        assert record["model_flops"] - record["flops"] == 32 * flops_without_gradient(config), row


def test_a_product_belongs_to_the_layer_whose_weight_it_multiplies_by() -> None:
    # Shapes would not tell: fc1's backward is fc2's forward, and the head is as wide as the final adaLN.
    _, operators = traced("sra2-cosine")
    rows = BATCH * TOKENS
    linear, elements = counting.linear_flops, PATCH * PATCH * 4
    all_three = {
        "qkv product": 3 * DEPTH * linear(rows, DIM, 3 * DIM),
        "proj product": 3 * DEPTH * linear(rows, DIM, DIM),
        "fc1 product": 3 * DEPTH * linear(rows, DIM, 4 * DIM),
        "fc2 product": 3 * DEPTH * linear(rows, 4 * DIM, DIM),
        "adaLN product": 3 * linear(BATCH, DIM, (6 * DEPTH + 2) * DIM),
        "output product": 3 * linear(rows, DIM, elements),
        "head products": 3 * (linear(rows, DIM, 2 * DIM) + 3 * linear(rows, 2 * DIM, 2 * DIM)),
        "loss and head": 3 * linear(rows, 2 * DIM, elements),
        "embedder products": 2 * linear(rows, elements, DIM)
        + 2 * linear(BATCH, counting.TIME_FEATURES, DIM)
        + 3 * linear(BATCH, DIM, DIM),
        "attention forward": 2 * DEPTH * BATCH * linear(TOKENS, DIM, TOKENS),
        "attention backward": 4 * DEPTH * BATCH * linear(TOKENS, DIM, TOKENS),
    }
    assert {part: count for part, count in flops_by_part(operators).items() if count} == all_three


def test_the_rest_belongs_where_it_is_called() -> None:
    _, operators = traced("sra2-cosine")
    names: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for one in operators:
        names[one.part][one.name.split("::")[1]] += 1
    norms = names["norms and gates"]
    # The tapped tokens come out of the next block's norm: one plain norm, the first block's.
    assert norms["layer_norm_modulate_fwd"] == norms["layer_norm_modulate_bwd"] == 1
    assert norms["gated_residual_layer_norm_modulate_fwd"] == norms["gated_residual_layer_norm_modulate_bwd"] == 4
    assert names["GELU"] == {"linear_gelu_fwd": DEPTH, "linear_gelu_bwd": DEPTH}  # its input, beside the products
    assert names["attention forward"] == {"_scaled_dot_product_flash_attention_for_cpu": DEPTH}
    assert names["attention backward"] == {"_scaled_dot_product_flash_attention_for_cpu_backward": DEPTH}
    assert names["stacking dq, dk, dv"] == {"stack": DEPTH}
    # No weight is cast: c, the time's features and its gradient, the tokens and their gradients, K3's small weights.
    assert names["dtype casts"]["_to_copy"] <= 12 and set(names["dtype casts"]) == {"_to_copy"}
    assert names["bias-gradient sums"] == {"sum": 1 + 3}  # of the final layer, patches and time; the rest are epilogues
    loss = names["loss and head"]
    assert loss["alignment_velocity_loss_fwd"] == loss["alignment_velocity_loss_bwd"] == 1
    assert loss["silu"] == loss["silu_backward"] == 4
    silus = names["conditioning and embeddings"]
    assert silus["silu"] == silus["silu_backward"] == 2  # of the time, and of the conditioning once for all blocks
    # Two steps: of bf16 gradients with their shadows, and of float32 ones.
    assert {names["optimizer and EMA"][f"adamw_ema_{part}"] for part in ("norm", "step")} == {1, 2}
    assert not {"convolution", "clone"} & set(norms) and "convolution" not in names["embedder products"]


def test_flash_attn_leaves_nothing_to_stack() -> None:
    """It reads q, k, v in the projection and writes dq, dk, dv into its gradient, whose views cost nothing."""
    _, before = traced("sra2-cosine")
    after = packed("sra2-cosine")
    difference = collections.Counter(one.name for one in after)
    difference.subtract(one.name for one in before)
    sdpa, ours = "aten::_scaled_dot_product_flash_attention_for_cpu", "flash_attn_stand_in::_flash_attn"
    assert {name: count for name, count in difference.items() if count} == {
        "aten::stack": -DEPTH,
        sdpa: -DEPTH,
        f"{sdpa}_backward": -DEPTH,
        f"{ours}_forward": DEPTH,
        f"{ours}_backward": DEPTH,
    }
    assert not [one for one in after if one.part == step_parts.STACKING]
    tokens, heads = BATCH * TOKENS * DIM * 2, BATCH * 2  # bytes of one of q, k, v, out; logsumexps are float32
    of = {one.name: one for one in after}
    assert of[f"{ours}_forward"].bytes == 4 * tokens + 4 * heads * TOKENS + 16
    # out, dout, q, k, v, the logsumexps and the generator's state; dq, dk, dv, and 128 sums of rows a head.
    assert of[f"{ours}_backward"].bytes == 5 * tokens + 4 * heads * TOKENS + 16 + 3 * tokens + 4 * heads * 128
    for name in ("forward", "backward"):
        (want,) = {one[:1] + one[2:4] for one in before if one.part == f"attention {name}"}
        assert of[f"{ours}_{name}"][:1] + of[f"{ours}_{name}"][2:4] == want


@pytest.mark.parametrize("row", ROWS)
def test_nothing_is_left_over(row: str) -> None:
    operators = [*traced(row)[1], *packed(row)]
    assert not [one for one in operators if one.part in (step_parts.OTHER, step_parts.NAMELESS_PRODUCTS)]


def test_frozen_products_are_the_teachers() -> None:
    step, operators = traced("sra")
    config = step.sit.config()
    teacher = counting.sit_forward_flops(config, stop_at_block=2)
    attention = 2 * 2 * counting.linear_flops(TOKENS, DIM, TOKENS)
    assert flops_by_part(operators)["frozen network's products"] == BATCH * (teacher - attention)


needs_extension = pytest.mark.skipif(not backends.has_extension("cpu"), reason="the extension is not built")


@needs_extension
@pytest.mark.parametrize("row", ["baseline", "sra2-cosine"])
def test_a_fake_step_runs_what_a_real_one_does(row: str) -> None:
    _, fake = traced(row)
    step = StepRow(row, SETTING)
    set_products(step.sit, "epilogues")
    real = Ledger(step)
    with real:
        step()
        real.operators.clear()
        step()
    difference = collections.Counter(real.operators)
    difference.subtract(fake)
    left = {one.name: count for one, count in difference.items() if count}
    assert left == {"aten::min": 1, "aten::max": 1}  # labels are looked at where that costs nothing: on a real CPU


def test_a_step_without_the_extension_is_traced_as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in ("layer_norm_modulate", "gated_residual_layer_norm_modulate", "alignment_velocity_loss", "adamw_ema"):
        monkeypatch.setattr(sys.modules[f"sra2_fast.ops.{op}"], "_FUSED_ON", frozenset())
    assert ledger.trace("sra2-cosine", SETTING)[1] == traced("sra2-cosine")[1]


def test_fake_labels_are_not_read() -> None:
    # check_inputs read the labels of every CPU tensor, and a fake one has none to read.
    with FakeTensorMode(), ledger.as_on_cuda():
        model = SiT(hidden_size=DIM, depth=1, num_heads=2, patch_size=PATCH, num_classes=3, class_dropout_prob=0)
        x, t, y = torch.randn(2, 4, 32, 32), torch.rand(2), torch.zeros(2, dtype=torch.int64)
        assert model(x, t, y, force_drop_ids=torch.zeros(2)).shape == x.shape


def test_an_empty_list_of_averages_reads_no_flag() -> None:
    # On the CPU eager_ema read its flag for nothing where no parameter was idle, which a fake step cannot.
    with FakeTensorMode():
        adamw_ema.eager_ema([], [], 0.9, torch.ones((), dtype=torch.bool))


def call(func: Any, *args: Any, **kwargs: Any) -> int:
    return step_parts.bytes_of(func, args, kwargs, func(*args, **kwargs))


def test_bytes_are_those_of_arguments_and_results() -> None:
    aten = torch.ops.aten
    a, b = torch.randn(3, 5), torch.randn(3, 5)
    assert call(aten.add.Tensor, a, b) == 3 * 60
    assert call(aten.add_.Tensor, a, b) == 2 * 60 + 60  # read, written, and read
    assert call(aten.copy_.default, a, b) == 60 + 60  # what it overwrites is not read
    assert call(aten.add.out, a, b, out=torch.empty(3, 5)) == 3 * 60
    assert call(aten.sum.default, torch.randn(3, 1).expand(3, 5)) == 12 + 4  # three elements, however often repeated
    assert call(aten.stack.default, [a, b]) == 4 * 60
    assert call(aten.embedding_dense_backward.default, a, torch.arange(3), 7, -1, False) == 60 + 24 + 7 * 20


def test_views_and_empty_tensors_cost_nothing() -> None:
    aten = torch.ops.aten
    views = (aten.view.default, aten.t.default, aten.detach.default, aten.split.Tensor, aten._unsafe_view.default)
    for func in (*views, aten.empty_like.default, aten.new_empty_strided.default):
        assert step_parts.costs_nothing(func), func
    for func in (aten.clone.default, aten.copy_.default, aten.zeros_like.default, aten._to_copy.default):
        assert not step_parts.costs_nothing(func), func


# Floors and predictions


def test_a_floor_is_the_longer_of_flops_and_bytes() -> None:
    peaks = budget.Peaks("gpu", 1e12, 1e9, attention_forward_flop_per_s=5e11, attention_backward_flop_per_s=1e11)
    products, copies = Operator("fc1 product", "mm", 4 * 10**9, 4 * 10**9, 10**6), Operator("GELU", "gelu", 0, 0, 10**7)
    assert peaks.floor_ms(products) == pytest.approx(4) and peaks.floor_ms(copies) == pytest.approx(10)
    forward = Operator("attention forward", "sdpa", 10**9, 2 * 10**9, 10**3)
    backward = Operator("attention backward", "sdpa_backward", 2 * 10**9, 5 * 10**9, 10**3)
    assert peaks.floor_ms(forward) == pytest.approx(1) and peaks.predicted_ms(forward) == pytest.approx(4)
    assert peaks.floor_ms(backward) == pytest.approx(2) and peaks.predicted_ms(backward) == pytest.approx(50)
    parts = budget.parts_of([products, copies, copies, forward, backward], peaks)
    assert parts["GELU"] == {"flops": 0, "bytes": 2 * 10**7, "operators": 2, "floor_ms": pytest.approx(20)}
    assert list(parts) == ["fc1 product", "attention forward", "attention backward", "GELU"]
    sums = budget.totals(parts)
    assert (sums["bytes_outside_products"], sums["operators"], sums["flops"]) == (2 * 10**7, 5, 7 * 10**9)
    assert sums["other_share"] == 0 and sums["floor_ms"] == pytest.approx(4 + 20 + 1 + 2)
    left_over = Operator("other", "mul", 0, 0, 10**7)
    assert budget.totals(budget.parts_of([copies, left_over], peaks))["other_share"] == pytest.approx(0.5)


def test_attention_executes_padded_heads_and_a_second_product() -> None:
    q = torch.empty(2, 16, 256, 72, device="meta")
    func = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counted, executed = step_parts.flops_of(func.default, (q, q, q), {}, None)
    assert counted == 4 * 2 * 16 * 256 * 256 * 72 and executed == counted * 96 // 72
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    assert step_parts.flops_of(backward, (q, q, q, q), {}, None) == (2 * counted, 5 * executed // 2)


@pytest.mark.parametrize("gpu", step_budget.GPUS)
def test_every_peak_has_its_source(gpu: str) -> None:
    for attention in ("flash", "flash-attn", "flash-attn-3"):
        peaks, sources = budget.read_peaks(gpu, "bf16", attention)
        assert len(sources) == 4 and all(len(source) > 20 for source in sources.values())
        assert 7e14 < peaks.flop_per_s < 9e14 and 2e12 < peaks.bytes_per_s < 5e12
        assert peaks.attention_backward_flop_per_s < peaks.attention_forward_flop_per_s < peaks.flop_per_s


def test_a_prediction_can_be_derived_from_its_parts() -> None:
    record = predicted("sra2-cosine")
    parts = record["parts"].values()
    assert record["floor_ms"] == pytest.approx(sum(one["floor_ms"] for one in parts))
    launches_ms = 0.9e-3 * record["operators"]
    assert record["ms"] == pytest.approx(sum(one["ms"] for one in parts) + launches_ms)
    assert record["mfu"] == pytest.approx(record["model_flops"] / (record["ms"] * 1e-3) / 788e12)
    assert record["parts"]["fc1 product"]["ms"] == pytest.approx(record["parts"]["fc1 product"]["flops"] / 788e9)
    assert record["parts"]["GELU"]["ms"] == pytest.approx(record["parts"]["GELU"]["bytes"] / 4.3e9)
    assert record["other_share"] < 0.01


# The command


def test_a_prediction_is_a_table_a_line_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "new" / "budget.jsonl", tmp_path / "budget.png"
    arguments = ["--model", TINY, "--batch-size", "3", "--row", "sra2-smooth-l1", "--predict", "h100"]
    assert step_budget.main([*arguments, "--json", str(file), "--plot", str(picture)]) == 0
    (record,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert (record["bench"], record["row"], record["is_measured"]) == ("step_budget", "sra2-smooth-l1", False)
    assert {"commit", "device", "versions", "sources", "mfu", "ms", "floor_ms"} <= set(record)
    shown = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"MFU \d+\.\d % \(predicted for H100 80 GB: \S+ TFLOP in \S+ ms at 798 TFLOP/s\)", shown[-1])
    for part, one in record["parts"].items():
        (line,) = [line for line in shown if line.startswith(f"  {part} ")]
        assert f"{one['bytes'] * 1e-9:.2f}" in line and f" {one['operators']} " in line
    told = "\n".join(shown)
    assert "attention: flash (what runs where flash-attn is not installed" in told and record["attention"] == "flash"
    assert "other: 0.00 % of the bytes" in told and "source of copy_bytes_per_s: measured on an H100" in told
    assert f"launches: {record['operators']} operators, 0.9 us each that overlaps nothing" in told
    assert picture.stat().st_size > 1000
    assert plot.main(["step_budget", str(file), str(tmp_path / "again.svg")]) == 0


def test_a_prediction_with_flash_attn(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("auto", "flash-attn", "flash-attn-3"):
        assert step_budget.main(["--model", TINY, "--batch-size", "3", "--attention", name]) == 0
        told = capsys.readouterr().out
        assert (f"attention: {name} (--attention)" in told) == (name != "auto")
        assert ("stacking dq, dk, dv" in told) == (name == "auto")


@needs_extension
def test_a_measured_step_says_which_attention(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", TINY, "--batch-size", "2", "--device", "cpu", "--precision", "bf16", "--steps", "1"]
    assert step_budget.main([*arguments, "--attention", "matmul"]) == 0
    told = capsys.readouterr().out
    assert "attention matmul (as asked)" in told and "attention backward" in told


@needs_extension
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_measured_step_has_a_time_for_every_part(
    precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "budget.jsonl"
    arguments = ["--model", TINY, "--batch-size", "3", "--device", "cpu", "--row", "sra2-cosine", "--steps", "3"]
    picture = str(tmp_path / "budget.png")
    assert step_budget.main([*arguments, "--precision", precision, "--json", str(file), "--plot", picture]) == 0
    (record,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert record["is_measured"] and record["ms"] == record["ms_median"] and record["precision"] == precision
    assert all(one["ms"] > 0 for one in record["parts"].values())
    assert record["ms"] == pytest.approx(sum(one["ms"] for one in record["parts"].values()) + record["beside_ms"])
    rate = record["product_flop_per_s"]
    assert record["mfu"] == pytest.approx(record["model_flops"] / record["ms"] * 1e3 / rate)
    told = capsys.readouterr()
    assert re.match(r"MFU \d+\.\d % \(measured on .* threads: ", told.out.splitlines()[-1]) and told.err == ""


def test_a_gpus_time_is_that_of_the_kernels_under_a_mark() -> None:
    def event(name: str, kind: str, cpu_us: float, gpu_us: float) -> SimpleNamespace:
        where = getattr(torch.autograd.DeviceType, kind)
        return SimpleNamespace(name=name, device_type=where, cpu_time_total=cpu_us, device_time_total=gpu_us)

    events = [
        event(ledger.MARK + "GELU", "CPU", 5, 2000),
        event(ledger.MARK + "GELU", "CUDA", 0, 2500),  # the mark again, as a range on the GPU
        event(ledger.MARK + "GELU", "CPU", 7, 3000),
        event("aten::gelu", "CPU", 4, 2000),
        event("gelu_kernel", "CUDA", 0, 2000),
    ]
    assert step_budget.marked_ms(events, on_gpu=True) == {"GELU": 5}
    assert step_budget.marked_ms(events, on_gpu=False) == {"GELU": pytest.approx(0.012)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--row", "dino"], "--row must be one of baseline, .*got dino"),
        (["--predict", "a100"], "--predict must be h100 or h200, got a100"),
        (["--device", "mps"], "--device must be cpu or cuda, got mps"),
        (["--batch-size", "0"], "--batch-size must be 1 or more, got 0"),
        (
            ["--precision", "fp32"],
            "--precision fp32 has no product rate for h200 in .*peaks.json; use bf16, or measure",
        ),
        (
            ["--attention", "cudnn"],
            "--attention cudnn has no published rate for h200 in .*; use one of flash, flash-attn,",
        ),
        (["--attention", "flash", "--device", "cpu"], r"--attention must be one of auto, .* got flash \(not for cpu\)"),
        (["--model", "SiT-M/3"], "--model SiT-M/3 is not known"),
        (["--plot", "x.png"], "--plot draws what --json FILE holds; give both"),
        (["--json", "."], r"step_budget: --json \. cannot be written \(Is a directory\); name another file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert step_budget.main(arguments) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and re.search(words, told[0]), told


@needs_extension
def test_a_wrong_step_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(StepRow, "reference", lambda self: (1e9, 1e9))
    arguments = ["--model", TINY, "--batch-size", "2", "--device", "cpu", "--precision", "fp32", "--steps", "1"]
    assert step_budget.main(arguments) == 1
    assert "row baseline: loss is" in capsys.readouterr().err
