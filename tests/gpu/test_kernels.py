"""The Triton kernels on a GPU, at the sizes of training, against float64.

What only the device shows: synchronisation inside a program, real bf16 and tensor-core arithmetic, sizes beyond 2^31
elements, CUDA graphs. The same numbers at small sizes are in tests/triton/, interpreted.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from rehearsal import sized
from tolerance import assert_close

from sra2_fast.reference import adamw_ema as adamw_reference
from sra2_fast.reference import alignment_velocity_loss as loss_reference
from sra2_fast.reference import layer_norm_modulate as reference

pytest.importorskip("triton", reason="Triton does not import here")

from sra2_fast.kernels import adamw_ema, alignment_velocity_loss
from sra2_fast.kernels import gated_residual_layer_norm_modulate as gated
from sra2_fast.kernels import layer_norm_modulate as plain

F32, BF16 = torch.float32, torch.bfloat16
EPS, BETA = 1e-6, 0.05
ROUNDINGS = {F32: 10, BF16: 1}
SHAPES = {"training": (32, 256, 1152), "S": (8, 256, 384), "odd": (3, 77, 768), "L": (2, 64, 1024)}
SHAPES |= {"one_row": (5, 1, 1000), "widest": (1, 3, 8192)}
SHAPES = sized(SHAPES, {"odd": (2, 3, 96), "one_row": (2, 1, 100)})
TYPES = [(F32, F32), (F32, BF16), (BF16, BF16)]


def modulations(B: int, D: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    conditioning = torch.randn(B, 6 * D, device=device).to(dtype)
    return tuple(conditioning[:, i * D : (i + 1) * D] for i in (0, 3, 5))


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_layer_norm_modulate(device: torch.device, shape: tuple[int, int, int], types: tuple[torch.dtype, ...]) -> None:
    B, N, D = shape
    x = (2 * torch.randn(shape, device=device) + 0.5).to(types[0])
    dy = torch.randn(shape, device=device).to(types[1])
    shift, scale, _ = modulations(B, D, types[1], device)
    y, mean, rstd = plain.layer_norm_modulate_fwd(x, shift, scale, EPS, types[1])
    dx, dshift, dscale = plain.layer_norm_modulate_bwd(dy, x, scale, mean, rstd)
    want_dx, want_dshift, want_dscale = reference.backward(dy.double(), x.double(), scale.double(), EPS)
    terms = dy.double() * reference.normalize(x.double(), EPS)[0]
    assert_close(
        y, reference.forward(x.double(), shift.double(), scale.double(), EPS), types[1], ROUNDINGS[types[1]], D
    )
    assert_close(dx, want_dx, types[0], ROUNDINGS[types[0]], D, name="dx")
    assert_close(dshift, want_dshift, types[1], 1, N, dy.double().abs().sum(1), name="dshift")
    assert_close(dscale, want_dscale, types[1], ROUNDINGS[types[1]], N + D, terms.abs().sum(1), name="dscale")
    again = plain.layer_norm_modulate_bwd(dy, x, scale, mean, rstd)
    assert all(torch.equal(a, b) for a, b in zip((dx, dshift, dscale), again, strict=True))


@pytest.mark.parametrize("has_dx_new", [True, False])
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gated_residual_layer_norm_modulate(
    device: torch.device, shape: tuple[int, int, int], types: tuple[torch.dtype, ...], has_dx_new: bool
) -> None:
    B, N, D = shape
    x = (2 * torch.randn(shape, device=device) + 0.5).to(types[0])
    dx_new = torch.randn(shape, device=device).to(types[0]) if has_dx_new else None
    branch, dy = (torch.randn(shape, device=device).to(types[1]) for _ in range(2))
    shift, scale, gate = modulations(B, D, types[1], device)
    x_new, y, mean, rstd = gated.gated_residual_layer_norm_modulate_fwd(x, branch, gate, shift, scale, EPS, types[1])
    given = (dx_new, dy, x_new, branch, gate, scale, mean, rstd)
    dx, dbranch, dgate, dshift, dscale = gated.gated_residual_layer_norm_modulate_bwd(*given)
    want_x_new = x.double() + gate.double()[:, None] * branch.double()
    assert_close(x_new, want_x_new, types[0], 2 if types[0] == F32 else 1, name="x_new")
    stored = x_new.double()
    want_y = reference.forward(stored, shift.double(), scale.double(), EPS)
    assert_close(y, want_y, types[1], ROUNDINGS[types[1]], D, name="y")
    total, want_dshift, want_dscale = reference.backward(dy.double(), stored, scale.double(), EPS)
    if dx_new is not None:
        total = total + dx_new.double()
    terms = branch.double() * total
    scale_terms = dy.double() * reference.normalize(stored, EPS)[0]
    assert_close(dx, total, types[0], ROUNDINGS[types[0]], D, name="dx")
    assert_close(dbranch, gate.double()[:, None] * total, types[1], ROUNDINGS[types[1]], D, name="dbranch")
    assert_close(dgate, terms.sum(1), types[1], ROUNDINGS[types[1]], N + D, terms.abs().sum(1), name="dgate")
    assert_close(dshift, want_dshift, types[1], 1, N, dy.double().abs().sum(1), name="dshift")
    assert_close(dscale, want_dscale, types[1], ROUNDINGS[types[1]], N + D, scale_terms.abs().sum(1), name="dscale")
    again = gated.gated_residual_layer_norm_modulate_bwd(*given)
    assert all(torch.equal(a, b) for a, b in zip((dx, dbranch, dgate, dshift, dscale), again, strict=True))


def test_more_than_two_to_the_31_elements(device: torch.device) -> None:
    """Row offsets are 64-bit: the last rows of a tensor of 2.15 G elements are right."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB of free device memory")
    B, N, D = 3, 622_000, 1152
    x = torch.randn(1, N, D, device=device).to(BF16).expand(B, N, D).contiguous()
    shift, scale, _ = modulations(B, D, BF16, device)
    y, mean, rstd = plain.layer_norm_modulate_fwd(x, shift, scale, EPS, BF16)
    last = x[-1:, -64:].double()
    want = reference.forward(last, shift[-1:].double(), scale[-1:].double(), EPS)
    assert_close(y[-1:, -64:], want, BF16, 1, D)
    dx, _, _ = plain.layer_norm_modulate_bwd(y, x, scale, mean, rstd)
    want_dx, _, _ = reference.backward(y[-1:, -64:].double(), last, scale[-1:].double(), EPS)
    assert_close(dx[-1:, -64:], want_dx, BF16, 1, D)


@pytest.mark.parametrize("align", ["cosine", "smooth_l1", "mse", "l1"])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("B", "K", "channels", "patch"),
    sized([(32, 2304, 4, 2), (8, 768, 4, 2), (4, 1000, 3, 2), (4, 1536, 4, 4), (4, 4608, 4, 8)], [(1, 100, 3, 2)]),
)
def test_alignment_velocity_loss(
    device: torch.device, B: int, K: int, channels: int, patch: int, dtype: torch.dtype, align: str
) -> None:
    P, path = channels * patch**2, "cosine" if align in ("cosine", "mse") else "linear"
    side = sized(16, 4)
    N = side**2

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device)

    given = [
        normal(B, N, K).to(dtype),
        (normal(P, K) / K**0.5).to(dtype),
        normal(P),
        normal(B, N, P).to(dtype),
        normal(B, channels, side * patch, side * patch),
        normal(B, channels, side * patch, side * patch),
        torch.rand(B, device=device),
    ]
    velocity, aligned, dvelocity, dp = alignment_velocity_loss.alignment_velocity_loss_fwd(
        *given, patch, path, align, BETA, EPS
    )
    exact = [tensor.double() for tensor in given]
    want = loss_reference.forward(*exact, patch_size=patch, path=path, align=align, beta=BETA, eps=EPS)
    size = dvelocity.numel()
    assert_close(velocity, want[0], F32, ROUNDINGS[F32], size, name="velocity loss")
    terms = torch.ones((), device=device).double() if align == "cosine" else None
    assert_close(aligned, want[1], F32, ROUNDINGS[F32], K + size, terms, name="alignment loss")
    assert_close(dvelocity, want[2], dtype, ROUNDINGS[dtype], name="dvelocity")
    want_dp = want[3]
    if align in ("l1", "smooth_l1"):  # where the slope jumps or bends within the error of p, either side is right
        d = exact[0] @ exact[1].T + exact[2] - loss_reference.patch_tokens(exact[4], patch)
        sure = (d.abs() - (BETA if align == "smooth_l1" else 0.0)).abs() > 1e-4
        assert sure.double().mean() > 0.99
        dp, want_dp = dp.double() * sure, want_dp * sure
    # smooth_l1's slope divides the error of p by beta.
    roundings = ROUNDINGS[dtype] * ((2 / BETA) ** 2 if align == "smooth_l1" and dtype == F32 else 4)
    assert_close(dp, want_dp, dtype, roundings, K, name="dp")


def test_loss_of_tokens_without_a_norm(device: torch.device) -> None:
    hidden, weight, bias = torch.zeros(1, 4, 64), torch.randn(16, 64), torch.zeros(16)
    image = torch.randn(1, 4, 4, 4)
    given = (hidden, weight, bias, torch.randn(1, 4, 16), image, torch.randn_like(image), torch.rand(1))
    on_device = [tensor.to(device) for tensor in given]
    *_, dp = alignment_velocity_loss.alignment_velocity_loss_fwd(*on_device, 2, "linear", "cosine", BETA, EPS)
    want = loss_reference.forward(*(tensor.double() for tensor in given), patch_size=2)[3]
    assert_close(dp.cpu(), want, F32, ROUNDINGS[F32])


@pytest.mark.parametrize("has_rates", [False, True])
@pytest.mark.parametrize("grad_dtype", [F32, BF16])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_adamw_ema(device: torch.device, clip: float | None, grad_dtype: torch.dtype, has_rates: bool) -> None:
    """With bf16 gradients as in a step on bf16 weights, which are written too; the rates may be on the device."""
    shapes = sized(
        [(1152, 4608), (1152,), (6 * 1152, 1152), (3,), (1,), (0,), (1001, 77)], [(65, 70), (3,), (1,), (0,)]
    )
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "emas")
    state = {name: [torch.randn(shape, device=device) for shape in shapes] for name in names}
    state["grads"] = [grad.to(grad_dtype) for grad in state["grads"]]
    for tensor in state["exp_avg_sqs"]:
        tensor.square_().add_(0.01)
    shadows = [torch.zeros(shape, device=device, dtype=BF16) for shape in shapes] if grad_dtype == BF16 else None
    before = {name: [tensor.double() for tensor in state[name]] for name in names}
    settings = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "ema_decay": 0.99}
    norm = adamw_ema.global_norm(state["grads"])
    count = sum(g.numel() for g in state["grads"])
    assert_close(norm, adamw_reference.global_norm(before["grads"]), F32, 4, count)
    steps = torch.arange(1.0, 1.0 + len(shapes), device=device)
    rates, given = None, settings
    if has_rates:  # they stand in place of the numbers, which are wrong here
        rates = torch.tensor([settings["lr"], settings["ema_decay"]], dtype=torch.float64, device=device)
        given = {**settings, "lr": 5.0, "ema_decay": 0.5}
    adamw_ema.adamw_ema_step(*state.values(), shadows, steps, norm, rates, SimpleNamespace(max_grad_norm=clip, **given))
    for index in range(len(shapes)):
        old = [before[name][index] for name in names]
        new = adamw_reference.adamw_ema(*old, index + 1, norm=norm.double(), max_grad_norm=clip, **settings)
        for name, want in zip(("params", "exp_avgs", "exp_avg_sqs", "emas"), new, strict=True):
            terms = (want - before[name][index]).abs() + before[name][index].abs()
            assert_close(state[name][index], want, F32, 16, 0, terms, name=f"{name}[{index}]")
        if shadows is not None:
            assert torch.equal(shadows[index], state["params"][index].bfloat16())


def test_launchers_replay_from_a_graph(device: torch.device) -> None:
    """Forward and backward captured once give, on new values in the same memory, what they give eagerly."""
    B, N, D = sized((4, 64, 384), (2, 3, 96))
    x, dy = torch.randn(2, B, N, D, device=device).unbind()
    shift, scale, _ = modulations(B, D, F32, device)

    def both() -> tuple[torch.Tensor, ...]:
        y, mean, rstd = plain.layer_norm_modulate_fwd(x, shift, scale, EPS, F32)
        return y, *plain.layer_norm_modulate_bwd(dy, x, scale, mean, rstd)

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, both(), strict=True))
