"""Which attention a model runs, who says so, and that a compiled block runs every backend in one graph."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import batch_for, outputs_and_gradients, small_model
from test_attention import FLASH, install_flash_attn, on_cpu
from tolerance import allowed, relative_error

from sra2_fast import SiT, backends, choices
from sra2_fast.choices import Choice
from sra2_fast.errors import InputError
from sra2_fast.layers.attention import Attention
from sra2_fast.models import attention as model_attention
from sra2_fast.models.attention import choose_attention, set_attention
from sra2_fast.ops import attention as op

CPU, BF16 = torch.device("cpu"), torch.bfloat16
ON_CPU: dict[str, Any] = {"device": CPU, "autocast_dtype": BF16}


def names(*models: torch.nn.Module) -> set[str]:
    return {m.backend.name for model in models for m in model.modules() if isinstance(m, Attention)}


def use(model: torch.nn.Module, backend: op.Backend) -> None:
    for module in model.modules():
        if isinstance(module, Attention):
            module.backend = backend


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("name", op.BACKENDS)
def test_a_model_with_each_backend(name: str, qk_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of all weights, in bf16 autocast, against PyTorch's attention."""
    model = small_model(align_depth=1, qk_norm=qk_norm, implementation="eager").eval()
    inputs = batch_for(model)
    want = outputs_and_gradients(model, inputs, autocast=True)
    assert names(model) == {"sdpa"}
    use(model, on_cpu(name, monkeypatch))
    got = outputs_and_gradients(model, inputs, autocast=True)
    gradients = [key for key in want if key not in ("velocity", "projection")]
    for what in (
        ["velocity"],
        ["projection"],
        gradients,
    ):  # all gradients in one: some, as the keys' bias has, are zero
        error, _ = relative_error(*(torch.cat([one[key].flatten().double() for key in what]) for one in (got, want)))
        # Ten roundings a block (benchmarks/lib/step_rows.py), on both sides.
        assert error <= allowed(BF16, 2 * 10 * model.depth), f"{what[0]}: {error:.2e}"


@pytest.mark.slow
@pytest.mark.parametrize("name", op.BACKENDS)
def test_a_compiled_block_is_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    compiler = "eager" if name in ("flash-attn-3", "flash", "efficient") else "aot_eager"  # like their neighbours
    model = small_model(hidden_size=24, depth=1)
    use(model, on_cpu(name, monkeypatch))
    block, x, c = model.blocks[0], torch.randn(2, 16, 24), torch.randn(2, 24)

    def run(call: Callable[..., Any]) -> list[torch.Tensor]:
        inputs = [one.clone().requires_grad_() for one in (x, c)]
        with torch.autocast("cpu", BF16):
            out = call(*inputs)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]

    compiled = run(torch.compile(block, backend=compiler, fullgraph=True))
    for got, want in zip(compiled, run(block), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2 * float(want.abs().max()))


def test_flash_attn_is_taken_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """For loops of one's own, which measure nothing; it is asked when the model is built, not where it is traced."""
    install_flash_attn(monkeypatch, [])
    asked: list[int] = []
    monkeypatch.setattr(backends, "has_flash_attn", lambda: not asked.append(1))
    attention = Attention(48, 3)
    assert attention.backend.name == "flash-attn" and len(asked) == 1
    want = Attention(48, 3)
    want.load_state_dict(attention.state_dict())
    want.backend = op.SDPA
    x = torch.randn(2, 16, 48)
    assert torch.equal(attention(x), want(x)) and len(asked) == 2  # on a CPU, in float32


def test_the_fastest_is_set_in_every_network(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = small_model(), copy.deepcopy(small_model())
    measured: list[dict[str, Any]] = []

    def measure(op: str, runs: dict[str, Any], device: torch.device) -> dict[str, float]:
        measured.append(runs)
        return {name: float(len(runs) - index) for index, name in enumerate(runs)}

    monkeypatch.setattr(choices, "measure", measure)
    monkeypatch.setattr(choices, "_read", lambda: ({}, ""))
    choice = choose_attention([student, None, teacher], 4, **ON_CPU)
    assert choice is not None and choice[:2] == ("matmul", "measured") and names(student, teacher) == {"matmul"}
    (runs,) = measured
    (gradient,) = runs["matmul"]()
    assert list(runs) == ["sdpa", "matmul"] and gradient.shape == (4, 16, 3, 3, 16) and gradient.dtype == BF16
    assert names(pickle.loads(pickle.dumps(student)), copy.deepcopy(student)) == {"matmul"}


def test_measuring_takes_no_random_number() -> None:
    torch.manual_seed(3)
    want = torch.randn(4)
    torch.manual_seed(3)
    choose_attention([small_model()], 3, **ON_CPU)
    torch.manual_seed(3)
    assert choose_attention([SiT(hidden_size=32, depth=1, num_heads=2, input_size=8)], 5, **ON_CPU) is not None
    torch.manual_seed(3)
    for name in ("sdpa", "matmul"):
        model_attention._step(name, (2, 16, 3, 2, 16), BF16, CPU)()
    assert torch.equal(torch.randn(4), want)


@pytest.mark.parametrize(
    ("changes", "settings", "want"),
    [
        ({}, {"autocast_dtype": None}, Choice("sdpa", "the only one")),  # float32 on a CPU is what it was
        ({"implementation": "eager"}, {}, Choice("sdpa", "PyTorch's own, for eager")),
        ({}, {"kept": "matmul"}, Choice("matmul", "as before")),
        ({}, {"wanted": "matmul", "kept": "sdpa"}, Choice("matmul", "as asked")),
        ({"implementation": "eager"}, {"wanted": "matmul"}, Choice("matmul", "as asked")),
    ],
)
def test_what_is_not_measured(changes: dict[str, Any], settings: dict[str, Any], want: Choice) -> None:
    model = small_model(**changes)
    assert choose_attention([model], 3, **{**ON_CPU, **settings}) == want and names(model) == {want.name}


def test_long_sequences_do_not_keep_their_weights() -> None:
    """P of N^2 numbers: at N = 1024 it would be more than all else that a block keeps."""
    assert model_attention._candidates((8, 256, 3, 6, 64), True, "cpu") == ["sdpa", "matmul"]
    assert model_attention._candidates((8, 257, 3, 6, 64), True, "cpu") == ["sdpa"]


def test_a_kept_one_that_is_not_here_is_measured_anew_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    choice = choose_attention([small_model()], 3, device=CPU, autocast_dtype=None, kept="flash-attn")
    assert choice == Choice("sdpa", "the only one")
    assert capsys.readouterr().out == (
        "attention: flash-attn, which the checkpoint was trained with, cannot run here; results agree to rounding\n"
    )


def test_on_a_gpu_everything_that_is_there_is_a_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(backends, "_why_not_importable", lambda name: "" if name == "triton" else "not installed")
    shape = (32, 256, 3, 16, 72)
    assert model_attention._candidates(shape, True, "cuda") == ["cudnn", "flash", "efficient", "sdpa"]
    assert model_attention._candidates(shape, False, "cuda") == ["efficient", "sdpa"]
    monkeypatch.setattr(backends, "_why_not_importable", lambda name: None)
    assert model_attention._candidates(shape, True, "cuda")[:2] == [*reversed(FLASH)]


def test_networks_that_are_no_sit_have_nothing_to_choose() -> None:
    assert choose_attention([torch.nn.Linear(3, 3), None], 4, **ON_CPU) is None


def test_an_attention_that_cannot_run_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    line = r"attention: backend must be one of auto, sdpa, matmul here, got cudnn \(not for cpu\)"
    with pytest.raises(InputError, match=line):
        choose_attention([model], 3, **ON_CPU, wanted="cudnn")
    with pytest.raises(InputError, match=r"must be one of auto, sdpa here, got matmul \(needs bf16\)"):
        choose_attention([model], 3, device=CPU, autocast_dtype=None, wanted="matmul")
    with pytest.raises(InputError, match=r"set_attention: name must be one of .*, got flash-attn \(not for cpu\)"):
        set_attention(model, "flash-attn")
    with pytest.raises(InputError, match=r"set_attention: name must be .*, got auto"):
        set_attention(model, "auto")

    def broken(*tensors: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("head_dim must be below 8")

    monkeypatch.setitem(op.BACKENDS, "matmul", lambda: op.Backend("matmul", broken, broken, "cpu"))
    with pytest.raises(InputError, match=r"none of matmul runs on cpu \(matmul: head_dim must be below 8\)"):
        choose_attention([model], 3, **ON_CPU, wanted="matmul")
    assert names(model) == {"sdpa"}
    set_attention(model, "matmul")
    assert names(model) == {"matmul"}
