"""Which tokens of each image are aligned, where only a share of them is (`align_tokens`).

A subset is a function of one uniform an image, so it is keyed as every draw is. A hash of 32 bits spreads the uniform
over the tokens, in int64 that overflows nowhere: the same subset on every device, and nothing is read on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_UNIFORM_STEPS = 2**24  # the uniforms of `randomness` are odd multiples of 2^-24


def token_count(share: float, num_tokens: int) -> int:
    """How many of an image's tokens are aligned: max(1, round(share N))."""
    return max(1, round(share * num_tokens))


def random_tokens(uniform: Tensor, num_tokens: int, share: float) -> Tensor:
    """(B, n) int64, ascending: n = `token_count` different tokens of each image, each token as likely as any other.

    uniform: (B,) float in (0, 1). They are the n tokens of the smallest scores. Within an image no two scores are
    equal, since the hash is one-to-one, so the subset of a smaller share lies in that of a larger one.
    """
    image = _hash((uniform.detach().float() * _UNIFORM_STEPS).to(torch.int64) & _MASK)
    token = torch.arange(num_tokens, device=uniform.device)
    scores = _hash((image[:, None] + token) & _MASK)
    return scores.argsort(dim=1)[:, : token_count(share, num_tokens)].sort(dim=1).values


def take_tokens(tokens: Tensor, chosen: Tensor) -> Tensor:
    """(B, N, D) tokens, (B, n) from `random_tokens` -> (B, n, D)."""
    # Whole rows: index_select is four times as fast on a CPU as gather, and its backward waits for nothing on a GPU.
    first = torch.arange(len(tokens), device=chosen.device)[:, None] * tokens.shape[1]
    return tokens.flatten(0, 1).index_select(0, (first + chosen).flatten()).unflatten(0, chosen.shape)


def _hash(x: Tensor) -> Tensor:
    """A one-to-one map of 32-bit numbers in int64, xor-shift and multiply twice (C. Wellons, "Hash Prospector", 2018).

    Both factors are below 2^31, so no product reaches 2^63.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)
