"""What the public repositories mean by the same weights, turned into ours and back, exactly and in the weights.

Ours, REPA's and SRA's t = 0 is data and the velocity points to the noise; SiT's and LightningDiT's t = 0 is noise and
the velocity points to the data: ours(x, t) = -theirs(x, 1 - t). For a velocity model on the linear or the GVP path that
is all, and both parts go into the weights:

    final_layer.linear is negated;
    t_embedder.mlp.0 = [Wc | Ws] acts on [cos(t w), sin(t w)], and with cos(w - t w) and sin(w - t w) written out
    it becomes Wc' = Wc cos w + Ws sin w,  Ws' = Wc sin w - Ws cos w.

Both are their own inverses. SiT's learn_sigma models have 2C output channels, of which only the first C are used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers.conditioning import FREQUENCIES, TimestepEmbedder

TIME = "t_embedder.mlp.0.weight"
OUTPUT = ("final_layer.linear.weight", "final_layer.linear.bias")
PATCHES = "x_embedder.proj.weight"
Weights = dict[str, Tensor]


def turn_time_around(state: Weights) -> Weights:
    """Weights of v(x, t) -> weights of -v(x, 1 - t); in float64, rounded once."""
    turned = dict(state)
    for name in OUTPUT:
        turned[name] = -state[name]
    weight = state[TIME].double()
    # cos(w) and sin(w) of the very w that the embedding has: its features at t = 1, on the unit circle again.
    cos, sin = TimestepEmbedder.features(torch.ones(1)).double().split(FREQUENCIES // 2, dim=1)
    radius = torch.hypot(cos, sin)
    cos, sin = cos / radius, sin / radius
    on_cos, on_sin = weight.split(FREQUENCIES // 2, dim=1)
    turned[TIME] = torch.cat([on_cos * cos + on_sin * sin, on_cos * sin - on_sin * cos], dim=1).to(state[TIME].dtype)
    return turned


def has_sigma(state: Weights) -> bool:
    """Whether the output layer has 2C channels a pixel for C input channels."""
    _, channels, patch, _ = state[PATCHES].shape
    return len(state[OUTPUT[0]]) == 2 * channels * patch * patch


def drop_sigma(state: Weights) -> Weights:
    """Without the output channels that nothing reads."""
    _, channels, patch, _ = state[PATCHES].shape
    kept = dict(state)
    for name in OUTPUT:
        pixels = state[name].unflatten(0, (patch * patch, 2 * channels))
        kept[name] = pixels[:, :channels].flatten(0, 1).contiguous()
    return kept


def add_sigma(state: Weights) -> Weights:
    """With C more output channels, zero as SiT initialises them (and as they stay: they get no gradient)."""
    _, channels, patch, _ = state[PATCHES].shape
    grown = dict(state)
    for name in OUTPUT:
        pixels = state[name].unflatten(0, (patch * patch, channels))
        grown[name] = torch.cat([pixels, torch.zeros_like(pixels)], dim=1).flatten(0, 1)
    return grown
