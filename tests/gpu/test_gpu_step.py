"""A whole training step on a GPU: right, without synchronisation, compiled, and in the step-time table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import step_time
import torch
from lib.step_rows import ROUNDINGS_A_BLOCK, Setting, StepRow, fill_zeros
from rehearsal import sized
from tolerance import allowed

from sra2_fast import SiT, SRA2Loss

ROWS = ["baseline", "sra2-cosine", "sra2-smooth-l1", "sra"]
THIN_XL = sized("1152,2,16,2", "64,2,2,8")


def setting(**changes: object) -> Setting:
    values = {
        "model": THIN_XL,
        "batch_size": 4,
        "precision": "bf16",
        "implementation": "fused",
        "is_compiled": False,
        "device": torch.device("cuda"),
    }
    return Setting(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("row", ROWS)
def test_fused_step_agrees_with_a_float32_eager_model(row: str, precision: str) -> None:
    step = StepRow(row, setting(precision=precision))
    step.check()
    step.remember()
    loss = step()
    step.check_after(loss)


@pytest.mark.parametrize("row", ROWS)
def test_fused_step_never_synchronises(row: str) -> None:
    step = StepRow(row, setting())
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("row", ["baseline", "sra2-cosine"])
def test_compiled_fused_step(row: str) -> None:
    step = StepRow(row, setting(is_compiled=True))
    step.check()
    step.remember()
    step.check_after(step())


@pytest.mark.parametrize("align", ["cosine", "smooth_l1"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_every_gradient_is_as_accurate_as_eagers(align: str, qk_norm: bool, device: torch.device) -> None:
    """Against float32 eager: fused bf16 may err as much as eager bf16 does, and half as much again for chance."""
    torch.backends.cuda.matmul.allow_tf32 = False
    width, heads = sized((1152, 16), (64, 2))
    sizes = dict(hidden_size=width, depth=2, num_heads=heads, num_classes=10, qk_norm=qk_norm, align_depth=1)  # noqa: C408
    models = {kind: SiT(**sizes, implementation=kind, learn_sigma=False).to(device) for kind in ("eager", "fused")}
    fill_zeros(models["eager"])
    models["fused"].load_state_dict(models["eager"].state_dict())
    latents, noise = torch.randn(2, 3, 4, 32, 32, device=device)
    given = {
        "t": torch.rand(3, device=device),
        "noise": noise,
        "label_drop": torch.zeros(3, dtype=torch.bool, device=device),
    }
    labels = torch.arange(3, device=device)
    loss_fn = SRA2Loss(align=align)

    def gradients(kind: str, enabled: bool) -> dict[str, torch.Tensor]:
        models[kind].zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            loss = loss_fn(models[kind], latents, labels, **given)
        loss.total.backward()
        return {name: p.grad.double() for name, p in models[kind].named_parameters() if p.grad is not None}

    true = gradients("eager", enabled=False)
    eager, fused = gradients("eager", enabled=True), gradients("fused", enabled=True)
    assert set(true) == set(eager) == set(fused)
    for name, want in true.items():
        error = {kind: float((got[name] - want).norm() / want.norm()) for kind, got in (("e", eager), ("f", fused))}
        assert error["f"] <= 1.5 * error["e"] + 2.0**-8, f"{name}: fused {error['f']:.2e}, eager {error['e']:.2e}"


def test_more_samples_than_a_grid_holds_in_y(device: torch.device) -> None:
    """CUDA's grids end at 65,535 in y and z: a whole forward and backward of more, each sample as in a small batch."""
    sizes = dict(input_size=4, hidden_size=32, depth=2, num_heads=2, num_classes=10, align_depth=1)  # noqa: C408
    model = SiT(**sizes, implementation="fused", learn_sigma=False).to(device)
    fill_zeros(model)
    count = sized(65_600, 6)
    x, t = torch.randn(count, 4, 4, 4, device=device), torch.rand(count, device=device)
    labels = torch.arange(count, device=device) % 10

    def velocity_and_gradient(given: torch.Tensor, samples: slice) -> tuple[torch.Tensor, torch.Tensor]:
        given = given.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            velocity = model.eval()(given, t[samples], labels[samples])
        velocity.float().square().sum().backward()
        assert given.grad is not None
        return velocity.detach(), given.grad

    last = slice(count - 3, count)
    many, few = velocity_and_gradient(x, slice(None)), velocity_and_gradient(x[last], last)
    limit = allowed(torch.bfloat16, 2 * 2 * ROUNDINGS_A_BLOCK)  # two blocks, there and back
    for got, want in zip(many, few, strict=True):
        assert float((got[last].double() - want.double()).norm() / want.double().norm()) < limit


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("row", ["sra2-cosine", "sra"])
def test_a_step_on_the_second_gpu_while_the_first_is_current(row: str) -> None:
    """A kernel is launched on the current device, whichever that is, with addresses of another."""
    assert torch.cuda.current_device() == 0
    step = StepRow(row, setting(device=torch.device("cuda:1")))
    step.check()
    step.remember()
    step.check_after(step())


def test_step_time_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_time, "ENERGY_SECONDS", 0.5)
    file = tmp_path / "step_time.jsonl"
    arguments = ["--model", sized("256,2,4,4", "64,2,2,8"), "--batch-size", "4", "--steps", "3", "--json", str(file)]
    assert step_time.main(arguments) == 0, capsys.readouterr().err
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [one["row"] for one in records] == list(step_time.ROWS)
    assert {one["implementation"] for one in records} == {"fused"} and {one["precision"] for one in records} == {"bf16"}
    assert all(one["peak_memory_bytes"] > 0 and 0 < one["mfu"] < 1 for one in records)
