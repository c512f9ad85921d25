"""benchmarks/step_time.py: its table, its JSON lines, its arithmetic, its counts and its exit codes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from sra2_fast import SiT, SiT_models, backends, recipe
from sra2_fast.train.step import TrainStep

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import fused_speedup
import plot
import step_time
from lib import counting, step_rows
from lib.step_rows import ROWS, Setting, StepRow
from lib.timing import Timing

pytestmark = pytest.mark.training

TINY = ["--model", "32,2,2,8", "--batch-size", "2", "--steps", "2"]
EAGER = [*TINY, "--implementation", "eager", "--device", "cpu", "--precision", "fp32"]
KEYS = {
    "row": str,
    "model": str,
    "batch_size": int,
    "implementation": str,
    "precision": str,
    "compiled": bool,
    "attention": str,
    "captured": bool,
    "device": str,
    "ms_median": float,
    "ms_p20": float,
    "ms_p80": float,
    "images_per_s": float,
    "overhead_percent": float,
    "gflop_per_image": float,
    "params_head": int,
    "params_external": int,
    "peak_memory_bytes": int,
    "mfu": float,
    "commit": str,
    "versions": dict,
}


def setting(**changes: object) -> Setting:
    values = {
        "model": "32,2,2,8",
        "batch_size": 2,
        "precision": "fp32",
        "implementation": "eager",
        "is_compiled": False,
        "device": torch.device("cpu"),
    }
    return Setting(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def small_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """REPA's encoder two blocks deep: 86 M parameters are for the benchmark, not for its test."""
    from lib import dinov2

    monkeypatch.setattr(dinov2, "DEPTH", 2)


def test_all_rows_give_a_table_json_lines_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small_encoder: None
) -> None:
    file, picture = tmp_path / "new" / "step_time.jsonl", tmp_path / "step_time.png"
    assert step_time.main([*EAGER, "--json", str(file), "--plot", str(picture)]) == 0
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert tuple(one["row"] for one in records) == ROWS
    for one in records:
        assert {key: type(one[key]) for key in KEYS} == KEYS
        assert one["ms_p20"] <= one["ms_median"] <= one["ms_p80"]
        assert one["images_per_s"] == pytest.approx(2000 / one["ms_median"])
        rate = max(one["product_tflop_per_s"], one["best_step_tflop_per_s"]) * 1e12
        assert one["mfu"] == pytest.approx(one["gflop_per_image"] * 1e9 * one["images_per_s"] / rate)
        assert one["compiled"] is False and one["joules_per_image"] is None
    baseline, cosine, smooth_l1, sra, repa = records
    assert baseline["overhead_percent"] == 0 == baseline["params_head"] == baseline["params_external"]
    assert cosine["params_head"] == smooth_l1["params_head"] == 3 * (64 * 64 + 64) + 33 * 64 + 65 * 256
    assert sra["params_head"] == 33 * 64 + 65 * 32 and sra["params_external"] == 0
    assert repa["params_external"] > 10e6 and repa["gflop_per_image"] > 10 * baseline["gflop_per_image"]
    assert cosine["peak_memory_bytes"] > baseline["peak_memory_bytes"]
    shown = capsys.readouterr().out
    assert all(row in shown for row in ROWS) and "overhead" in shown
    assert picture.stat().st_size > 1000


def test_rows_can_be_chosen_and_without_a_baseline_there_is_no_overhead(tmp_path: Path) -> None:
    file = tmp_path / "step_time.jsonl"
    assert step_time.main([*EAGER, "--rows", "sra2-cosine", "--json", str(file)]) == 0
    (one,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert one["row"] == "sra2-cosine" and one["overhead_percent"] is None and one["gflop_extra_percent"] is None


def test_overhead_is_paired_by_round() -> None:
    # The machine is twice as slow in the second half; the row costs 10 % in every round but one.
    baseline = Timing((10.0, 10.0, 20.0, 20.0, 20.0))
    row = Timing((11.0, 11.0, 22.0, 22.0, 44.0))
    assert step_time.overhead_percent(row, baseline) == pytest.approx(10)
    assert step_time.overhead_percent(baseline, baseline) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "SiT-M/3"], "--model SiT-M/3 is not known; did you mean .*'hidden_size,depth,heads,patch'"),
        (["--model", "32,2,3,8"], "hidden_size must be divisible by num_heads = 3, got 32"),
        (["--rows", "baseline,dino"], "--rows must be some of baseline,.*got dino"),
        (["--rows", ","], "--rows must be some of baseline"),
        (["--batch-size", "0"], "--batch-size must be 1 or more, got 0"),
        (["--steps", "0"], "--steps must be 1 or more, got 0"),
        (["--device", "mps"], "--device must be cpu or cuda, got mps"),
        (["--device", "banana"], "--device must be cpu or cuda, got banana"),  # torch.device raises RuntimeError
        (["--json", "."], r"--json \. cannot be written \(Is a directory\); name another file"),
        (["--precision", "tf32"], "--precision tf32 is for a GPU"),
        (["--plot", "x.png"], "--plot draws what --json FILE holds; give both"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert step_time.main([*EAGER, *arguments]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and re.search(words, told[0]), told


def test_fused_where_its_kernels_are_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = backends.Choice("pytorch", "c++: not built")
    monkeypatch.setattr(backends, "choose", lambda op, device_type: missing)
    cpu = [*TINY, "--device", "cpu", "--precision", "fp32", "--rows", "baseline"]
    assert step_time.main([*cpu, "--implementation", "fused"]) == 2
    line = r"--implementation fused: on cpu there are no kernels \(c\+\+: not built\); use eager"
    assert re.search(line, capsys.readouterr().err)
    assert step_time.main(cpu) == 0
    told = capsys.readouterr()
    assert "measuring --implementation eager" in told.err and "eager, fp32" in told.out


needs_extension = pytest.mark.skipif(not backends.has_extension("cpu"), reason="the extension is not built")


@needs_extension
def test_fused_is_the_default_and_passes_its_check(tmp_path: Path) -> None:
    file = tmp_path / "step_time.jsonl"
    arguments = [*TINY, "--device", "cpu", "--rows", "baseline,sra2-cosine,sra2-smooth-l1,sra", "--json", str(file)]
    assert step_time.main(arguments) == 0
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert {one["implementation"] for one in records} == {"fused"}


@needs_extension
def test_fused_speedup_times_both_on_the_same_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "speedup.jsonl"
    arguments = ["--model", "32,2,2,8", "--batch-size", "2", "--steps", "3", "--precision", "fp32"]
    assert fused_speedup.main([*arguments, "--json", str(file)]) == 0
    eager, fused = (json.loads(line) for line in file.read_text().splitlines())
    assert (eager["implementation"], fused["implementation"]) == ("eager", "fused") and eager["speedup_over_eager"] == 1
    assert eager["loss"] == pytest.approx(fused["loss"], rel=1e-4)  # after the same steps on the same batches
    assert f"{fused['speedup_over_eager']:5.2f}x" in capsys.readouterr().out
    assert fused_speedup.main([*arguments, "--steps", "0"]) == 2
    assert "--steps must be 1 or more, got 0" in capsys.readouterr().err


@needs_extension
def test_the_fused_teacher_is_the_optimizers_average() -> None:
    step = StepRow("sra", setting(implementation="fused"))
    step()
    step()
    averages = step.optimizer.ema_state_dict()
    teacher = dict(step.step.teacher.named_parameters())  # type: ignore[union-attr]
    assert len(averages) > 20
    for name, average in averages.items():
        assert torch.equal(teacher[name], average), name
    moved = [name for name, p in step.sit.named_parameters() if not torch.equal(p, teacher[name])]
    assert len(moved) > 20  # the average lags behind the weights


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_asking_for_an_absent_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert step_time.main([*TINY, "--device", "cuda"]) == 2
    assert "--device cuda: torch sees no GPU here" in capsys.readouterr().err


def test_a_wrong_step_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    assert step_time.main([*EAGER, "--rows", "baseline"]) == 1
    assert "row baseline: the timed steps did not train the model" in capsys.readouterr().err


def test_a_nan_in_a_timed_step_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = TrainStep.losses
    nan = float("nan")
    monkeypatch.setattr(TrainStep, "losses", lambda *a: (one := losses(*a))._replace(total=one.total * nan))
    assert step_time.main([*EAGER, "--rows", "baseline"]) == 1
    assert "row baseline: the loss became nan" in capsys.readouterr().err


@pytest.mark.parametrize("row", ["baseline", "sra2-cosine", "sra2-smooth-l1", "sra"])
def test_the_check_holds_bf16_to_a_float32_eager_model(row: str) -> None:
    step = StepRow(row, setting(precision="bf16", batch_size=3))
    step.check()
    step.step.loss_fn.align_weight += 0.5  # now the timed step computes something else than what it is held to
    reference = step.reference()
    step.step.loss_fn.align_weight -= 0.5
    step.reference = lambda: reference  # type: ignore[method-assign]
    if row != "baseline":
        with pytest.raises(RuntimeError, match=f"row {row}: .*a float32 eager model says"):
            step.check()


def test_the_check_sees_a_wrong_gradient() -> None:
    step = StepRow("sra2-cosine", setting(precision="bf16"))
    step.sit.final_layer.linear.weight.register_hook(lambda grad: 2 * grad)
    with pytest.raises(RuntimeError, match=r"gradient norm is .* a float32 eager model says"):
        step.check()


def test_the_eager_step_is_clip_adamw_and_ema() -> None:
    step = StepRow("sra2-cosine", setting())
    other = StepRow("sra2-cosine", setting())
    assert all(torch.equal(a, b) for a, b in zip(step.sit.parameters(), other.sit.parameters(), strict=True))
    before = {name: p.detach().clone() for name, p in step.sit.named_parameters()}
    step()
    other.step.losses(other.sit, other.batches[0], 0).total.backward()
    norm = step_rows.grad_norm(other.sit)
    averages = dict(step.average.named_parameters())
    for (name, after), twin in zip(step.sit.named_parameters(), other.sit.parameters(), strict=True):
        if twin.grad is None:
            continue
        grad = twin.grad * min(1.0, 1.0 / (norm + 1e-6))
        # The first AdamW step, where both bias-corrected moments are the gradient itself.
        want = before[name] - recipe.LR * grad / (grad.abs() + 1e-8)
        torch.testing.assert_close(after, want, rtol=0, atol=1e-3 * recipe.LR)
        average = before[name] + (1 - 2 / 11) * (after - before[name])  # the decay of the first update
        torch.testing.assert_close(averages[name], average, rtol=1e-6, atol=1e-9)
    assert all(p.grad is None for p in step.sit.parameters())


def test_rows_use_the_blocks_of_their_papers() -> None:
    def blocks(target: str) -> list[int]:
        return [recipe.align_depth(f"SiT-{size}/2", 0, target) for size in ("S", "B", "L", "XL")]

    assert (blocks("vae"), blocks("teacher"), blocks("features")) == ([2, 2, 8, 8], [4, 4, 4, 8], [4, 4, 8, 8])
    assert recipe.align_depth("64,12,2,2", 12, "features") == 3 and recipe.align_depth("64,2,2,2", 2, "teacher") == 1
    assert [recipe.teacher_depth(depth, 8) for depth in (28, 24, 12)] == [20, 16, 12]


def test_persistent_bytes_count_each_tensor_once() -> None:
    step = StepRow("baseline", setting())
    step()
    weights = sum(p.numel() for p in step.sit.parameters())
    trained = sum(p.numel() for p in step.sit.parameters() if p.requires_grad)
    trained_tensors = sum(p.requires_grad for p in step.sit.parameters())
    batches = sum(t.numel() * t.element_size() for b in step.batches for t in b if t is not None)
    # weights and averages, two moments and a step count a trained parameter; storages of a batch are shared slices
    least = 4 * (2 * weights + 2 * trained) + batches
    assert least <= step.persistent_bytes() <= least + 16 * trained_tensors + 3 * batches


@pytest.mark.parametrize("qkv", [(48, 2, 3, 4), (32, 3, 2, 8)])
def test_flops_are_those_of_torchs_own_counter(qkv: tuple[int, int, int, int]) -> None:
    hidden_size, depth, num_heads, patch_size = qkv
    model = SiT(
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        patch_size=patch_size,
        num_classes=10,
        align_depth=1,
        implementation="eager",
    )
    step_rows.fill_zeros(model)
    tokens, batch = (32 // patch_size) ** 2, 3
    x, t, y = torch.randn(batch, 4, 32, 32), torch.rand(batch), torch.randint(0, 10, (batch,))
    forward = counting.sit_forward_flops(model.config()) + counting.projector_forward_flops(model.projector, tokens)
    out: list[torch.Tensor] = []
    assert counting.counted_flops(lambda: out.extend(model(x, t, y, return_projection=True))) == batch * forward
    # Nothing needs the gradient of the latent or of the time features, the only products that a backward leaves out.
    unneeded = counting.linear_flops(tokens, patch_size**2 * 4, hidden_size)
    unneeded += counting.linear_flops(1, counting.TIME_FEATURES, hidden_size)
    backward = counting.counted_flops(lambda: (out[0].square().sum() + out[1].square().sum()).backward())
    # learn_sigma: the sigma half of the output enters the backward like the rest
    assert backward == batch * (2 * forward - unneeded)
    assert counting.training_flops(forward, 7) == 3 * forward + 7
    stopped = counting.counted_flops(lambda: model(x, t, y, return_hidden=1))
    assert stopped == batch * counting.sit_forward_flops(model.config(), stop_at_block=1)


def test_flops_of_the_encoder_are_those_of_torchs_own_counter(small_encoder: None) -> None:
    from lib.dinov2 import DINOv2Encoder

    encoder = DINOv2Encoder(grid=3)
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    out: list[torch.Tensor] = []
    assert counting.counted_flops(lambda: out.append(encoder(images))) == 2 * encoder.forward_flops()
    assert out[0].shape == (2, 9, 768) and not out[0].requires_grad


def test_sit_xl_has_the_papers_count() -> None:
    with torch.device("meta"):
        model = SiT_models["SiT-XL/2"](learn_sigma=False, align_depth=8, implementation="eager")
    forward = counting.sit_forward_flops(model.config())
    head = counting.projector_forward_flops(model.projector, 256)
    assert forward / 2e9 == pytest.approx(118.6, abs=0.05) and head / 2e9 == pytest.approx(4.77, abs=0.005)
    assert counting.count_parameters(model.projector) == 18_625_552


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "does not exist"), ("{}\n", "has no line with row"), ("{", "line 1: not JSON")],
)
def test_plot_names_what_it_cannot_draw(
    content: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.jsonl"
    if content is not None:
        file.write_text(content)
    assert plot.main(["step_time", str(file), str(tmp_path / "a.png")]) == 2
    assert words in capsys.readouterr().err


def test_plot_draws_the_newest_line_of_each_case_and_names_an_unwritable_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {"op": "o", "shape": [2], "dtype": "float32", "direction": "both", "ms_median": 1.0}
    records = [{**line, "variant": v} for v in ("eager", "fused")] + [{**line, "variant": "eager", "ms_median": 2.0}]
    newest = plot.newest_of_each(records, ("op", "variant"))
    assert [one["ms_median"] for one in newest] == [2.0, 1.0]
    file = tmp_path / "ops.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    assert plot.main(["ops", str(file), str(tmp_path / "ops.svg")]) == 0 and (tmp_path / "ops.svg").exists()
    assert plot.main(["ops", str(file), str(tmp_path / "none" / "ops.png")]) == 2
    assert "cannot write" in capsys.readouterr().err
