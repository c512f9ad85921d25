"""Which attention runs where; flash-attn is played by a stand-in, since it needs a GPU."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import pytest
import torch
from models import batch_for, outputs_and_gradients, small_model
from torch import Tensor

from sra2_fast import backends
from sra2_fast.layers.attention import Attention

Call = tuple[torch.dtype, tuple[int, ...]]


@pytest.fixture
def flash_attn_calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """A `flash_attn` that can be imported, and what its function was called with."""
    calls: list[Call] = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(head_dim)) v over (B, N, H, head_dim), as flash-attn has it."""
        calls.append((q.dtype, tuple(q.shape)))
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16 and q.shape == k.shape == v.shape
        return torch.nn.functional.scaled_dot_product_attention(*(m.transpose(1, 2) for m in (q, k, v))).transpose(1, 2)

    module: Any = types.ModuleType("flash_attn")
    module.__spec__ = importlib.util.spec_from_loader("flash_attn", loader=None)
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(backends, "has_flash_attn", lambda: True)
    return calls


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors say that they are on a GPU; where they are computed stays as it is."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)


@pytest.mark.parametrize("qk_norm", (False, True))
def test_flash_attn_gets_bf16_tokens_in_its_layout(
    qk_norm: bool, flash_attn_calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(align_depth=1, qk_norm=qk_norm, implementation="eager").eval()
    inputs = batch_for(model)
    want = outputs_and_gradients(model, inputs, autocast=True)
    assert not flash_attn_calls  # on a CPU
    on_a_gpu(monkeypatch)
    got = outputs_and_gradients(model, inputs, autocast=True)
    assert flash_attn_calls == [(torch.bfloat16, (3, 16, 3, 16))] * 3
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_float32_is_not_for_flash_attn(flash_attn_calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    attention = Attention(48, 3)
    on_a_gpu(monkeypatch)
    attention(torch.randn(2, 16, 48))
    assert not flash_attn_calls


def test_what_there_is_is_asked_when_the_model_is_built(
    flash_attn_calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question was asked at every call, inside what torch.compile traces."""
    attention = Attention(48, 3).bfloat16()
    asked: list[int] = []
    monkeypatch.setattr(backends, "has_flash_attn", lambda: bool(asked.append(1)))
    on_a_gpu(monkeypatch)
    attention(torch.randn(2, 16, 48, dtype=torch.bfloat16))
    assert len(flash_attn_calls) == 1 and not asked
    without = Attention(48, 3).bfloat16()
    assert asked
    without(torch.randn(2, 16, 48, dtype=torch.bfloat16))
    assert len(flash_attn_calls) == 1
