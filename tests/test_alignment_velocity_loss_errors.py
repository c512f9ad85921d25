"""What alignment_velocity_loss refuses, from Python and from C++, in the form of every error."""

from __future__ import annotations

import pytest
import torch
from test_alignment_velocity_loss import NAMES, make, needs_cpu_kernels

from sra2_fast.errors import InputError
from sra2_fast.ops.alignment_velocity_loss import alignment_velocity_loss, eager

SHAPE = (2, 4, 4, 6, 2, 12)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden", torch.zeros(2, 12), r"hidden must be \(B, N, K\), N and K at least 1, got \(2, 12\)"),
        ("hidden", torch.zeros(2, 0, 12), r"hidden must be \(B, N, K\), N and K at least 1, got \(2, 0, 12\)"),
        ("weight", torch.zeros(16, 13), r"weight must be \(P, K\) = \(16, 12\), got \(16, 13\)"),
        ("bias", torch.zeros(15), r"bias must be \(P,\) = \(16,\), got \(15,\)"),
        ("velocity_tokens", torch.zeros(2, 6, 32), r"velocity_tokens must be \(B, N, P\) = \(2, 6, 16\), got"),
        ("latents", torch.zeros(4, 4, 6), r"latents must be \(B, C, H, W\), got \(4, 4, 6\)"),
        ("latents", torch.zeros(2, 4, 4, 8), r"latents must be \(B, C, H, W\) of N = 6 patches of 2, got"),
        ("latents", torch.zeros(2, 4, 4, 7), r"latents must be \(B, C, H, W\) of N = 6 patches of 2, got"),
        (
            "latents",
            torch.zeros(2, 65, 4, 6),
            r"patch_size must be such that P = patch_size\^2 C is from 1 to 256 .*65",
        ),
        ("noise", torch.zeros(2, 4, 4, 4), r"noise must be \(B, C, H, W\) = \(2, 4, 4, 6\), got \(2, 4, 4, 4\)"),
        ("t", torch.zeros(3), r"t must be \(B,\) = \(2,\), got \(3,\)"),
    ],
)
def test_wrong_shapes_are_refused(name: str, value: torch.Tensor, message: str) -> None:
    arguments = {**make(SHAPE)._asdict(), name: value}
    with pytest.raises(InputError, match=f"^alignment_velocity_loss: {message}"):
        alignment_velocity_loss(**arguments, patch_size=2)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_types_and_devices_are_refused(name: str) -> None:
    x = make(SHAPE)._asdict()
    expected = "float32" if name in ("latents", "noise") else "float32 or bfloat16"
    way_out = r'\(implementation="eager" takes other floats\)'
    for dtype in (torch.float16, torch.float64, torch.int64):
        with pytest.raises(TypeError, match=rf"{name} must be {expected} {way_out}, got {dtype}"):
            alignment_velocity_loss(**{**x, name: x[name].to(dtype)}, patch_size=2)
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got int"):
        alignment_velocity_loss(**{**x, name: 3}, patch_size=2)
    if name != "hidden":
        with pytest.raises(InputError, match=f"{name} must be on cpu like hidden, got meta"):
            alignment_velocity_loss(**{**x, name: x[name].to("meta")}, patch_size=2)


def test_bf16_latents_are_refused() -> None:
    x = make(SHAPE)._asdict()
    with pytest.raises(TypeError, match=r"latents must be float32 .*got torch.bfloat16"):
        alignment_velocity_loss(**{**x, "latents": x["latents"].bfloat16()}, patch_size=2)


@pytest.mark.parametrize("name", ["latents", "noise", "t"])
def test_what_gets_no_gradient_must_not_require_one(name: str) -> None:
    x = make(SHAPE)._asdict()
    x[name].requires_grad_()
    with pytest.raises(
        InputError, match=f'{name} must not require a gradient .implementation="eager" takes one that does'
    ):
        alignment_velocity_loss(**x, patch_size=2)
    with torch.no_grad():
        alignment_velocity_loss(**x, patch_size=2)
    velocity, align = eager(**x, patch_size=2, path="cosine")
    (velocity + align).backward()
    assert x[name].grad.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "sine"}, "path must be linear or cosine, got 'sine'"),
        ({"align": "dot"}, "align must be cosine or smooth_l1 or mse or l1, got 'dot'"),
        ({"beta": 0.0}, "beta must be positive, got 0.0"),
        ({"eps": -1.0}, "eps must be positive, got -1.0"),
        ({"patch_size": 0}, "patch_size must be such that P .*got 0 with C = 4"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=f"^alignment_velocity_loss: {message}"):
        alignment_velocity_loss(*make(SHAPE), **{"patch_size": 2, **settings})


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(6, 12), r"hidden must be \(B, N, K\), got \(6, 12\)"),
        (0, torch.zeros(2, 6, 0), r"hidden must be \(B, N, K\) with K at least 1, got \(2, 6, 0\)"),
        (0, torch.zeros(2, 12, 6).transpose(1, 2), "hidden must be of stride 1 in the last dimension, got 6"),
        (1, torch.zeros(16, 13), r"weight must be \(16, 12\), got \(16, 13\)"),
        (1, torch.zeros(16, 12).bfloat16(), "weight must be torch.float32, got torch.bfloat16"),
        (3, torch.zeros(2, 6, 32)[..., :16], "velocity_tokens must be contiguous, got a strided tensor"),
        (4, torch.zeros(4, 4, 6), r"latents must be \(B, C, H, W\), got \(4, 4, 6\)"),
        (4, torch.zeros(2, 4, 4, 8), r"latents must be of N = 6 patches, got \(2, 4, 4, 8\)"),
        (4, torch.zeros(2, 65, 4, 6), "P must be from 1 to 256, got 260"),
        (5, torch.zeros(2, 4, 4, 6).double(), "noise must be float32 or bfloat16, got torch.float64"),
        (8, 2, "path must be 0 or 1, got 2"),
        (9, 4, "align must be from 0 to 3, got 4"),
    ],
)
def test_the_kernels_refuse_the_same(index: int, value: object, message: str) -> None:
    arguments = [*make(SHAPE), 2, 0, 0, 0.05, 1e-6]
    arguments[index] = value
    with pytest.raises(RuntimeError, match=f"alignment_velocity_loss: {message}"):
        torch.ops.sra2_fast.alignment_velocity_loss_fwd(*arguments)


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(2), r"dalign must be \(\), got \(2,\)"),
        (1, torch.zeros(2, 6), r"dp must be \(B, N, P\), P from 1 to 256, got \(2, 6\)"),
        (1, torch.zeros(2, 6, 0), r"dp must be \(B, N, P\), P from 1 to 256, got \(2, 6, 0\)"),
        (2, torch.zeros(2, 6), r"hidden must be \(B, N, K\), got \(2, 6\)"),
        (2, torch.zeros(2, 5, 12), r"hidden must be \(2, 6, 12\), got \(2, 5, 12\)"),
        (3, torch.zeros(16), r"weight must be \(P, K\), got \(16,\)"),
    ],
)
def test_the_backward_kernels_refuse_the_same(index: int, value: torch.Tensor, message: str) -> None:
    x = make(SHAPE)
    arguments = [torch.tensor(1.0), torch.zeros(2, 6, 16), x.hidden, x.weight, True, True, True]
    arguments[index] = value
    with pytest.raises(RuntimeError, match=f"alignment_velocity_loss: {message}"):
        torch.ops.sra2_fast.alignment_velocity_loss_bwd(*arguments)
