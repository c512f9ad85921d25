"""Every backend of attention that is there, on a GPU: against float64, compiled, and what TrainStep chooses of them."""

from __future__ import annotations

import pytest
import torch
from rehearsal import sized
from tolerance import assert_close
from torch import Tensor

from sra2_fast import backends, choices
from sra2_fast.models import attention as model_attention
from sra2_fast.ops.attention import attention, attention_unpacked, find

NAMES = backends.ATTENTION["cuda"]
SHAPE = sized((4, 256, 3, 16, 72), (2, 16, 3, 2, 24))


def in_float64(qkv: Tensor) -> Tensor:
    q, k, v = qkv.transpose(1, 3).unbind(2)
    return (torch.softmax(q @ k.mT * qkv.shape[-1] ** -0.5, -1) @ v).transpose(1, 2)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "separate"])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name: str, packed: bool, device: torch.device) -> None:
    why_not = backends.attention_backends("cuda")[name]
    if why_not:
        pytest.skip(f"{name}: {why_not}")
    backend = find(name)
    qkv = torch.randn(SHAPE, device=device).bfloat16().requires_grad_()
    dout = torch.randn(*SHAPE[:2], *SHAPE[3:], device=device).bfloat16()
    true = qkv.detach().double().requires_grad_()
    want = in_float64(true)
    got = attention(qkv, backend) if packed else attention_unpacked(*qkv.unbind(2), backend)
    assert_close(got, want, torch.bfloat16, 2, SHAPE[1])
    (dgot,), (dwant,) = torch.autograd.grad(got, qkv, dout), torch.autograd.grad(want, true, dout.double())
    assert_close(dgot, dwant, torch.bfloat16, 4, 2 * SHAPE[1])
    if packed and name.startswith("flash-attn"):
        assert dgot.is_contiguous()
    compiled = torch.compile(lambda qkv: attention(qkv, backend), fullgraph=True, dynamic=False)
    assert_close(compiled(qkv), want, torch.bfloat16, 2, SHAPE[1])


def test_what_is_there_is_measured(device: torch.device) -> None:
    names = model_attention._candidates(SHAPE, True, "cuda")
    steps = {name: model_attention._step(name, SHAPE, torch.bfloat16, device) for name in names}
    ms = choices.measure("attention", steps, device)
    print(", ".join(f"{name} {one:.3f} ms" for name, one in ms.items()))
    assert "sdpa" in ms and all(0 < one < 1e3 for one in ms.values())
