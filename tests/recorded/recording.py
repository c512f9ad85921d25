"""Reads what `record.py` wrote: the public models' weights, inputs, outputs and gradients."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tolerance import relative_error

HERE = Path(__file__).parent
SAME = 1e-5  # the relative error in float32 that "a drop-in for the public model" is defined by


@dataclass(frozen=True)
class Recording:
    """One reference model: how it was built, its keys in order, and every tensor recorded of it."""

    config: dict[str, Any]
    keys: list[tuple[str, list[int], bool]]  # name, shape, trainable
    tensors: dict[str, torch.Tensor]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def state(self) -> dict[str, torch.Tensor]:
        """The reference's state dict, float32, in its order."""
        return {name: self.tensors[f"state.{name}"].float() for name, _, _ in self.keys}

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients of the trainable parameters, and of `x`."""
        return {name[5:]: value for name, value in self.tensors.items() if name.startswith("grad.")}


def load_recording(name: str) -> Recording:
    with safe_open(HERE / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = file.metadata()
    keys = [(key, shape, trainable) for key, shape, trainable in json.loads(metadata["keys"])]
    return Recording(json.loads(metadata["config"]), keys, tensors)


def reference_facts() -> dict[str, Any]:
    """Parameter counts of the public registries, statistics of their initial weights."""
    return json.loads((HERE / "reference.json").read_text())


def assert_same(got: torch.Tensor | None, want: torch.Tensor, name: str) -> None:
    """|got - want| / |want| <= SAME. A reference gradient of exactly zero must be exactly zero here."""
    assert got is not None, f"{name}: nothing"
    whole, _ = relative_error(got.detach(), want)
    assert whole <= SAME, f"{name}: relative error {whole:.2e} against the public model"


def assert_same_gradients(model: torch.nn.Module, x: torch.Tensor, recording: Recording) -> None:
    """Every trainable parameter has the reference's gradient, and nothing else has one.

    The same vector added to every key shifts a query's scores alike, which softmax ignores: the gradient of
    `k_norm.bias` is zero but for rounding, and is held against that of `k_norm.weight`.
    """
    want = recording.gradients()
    assert_same(x.grad, want.pop("x"), "dx")
    got = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        if name.endswith("k_norm.bias"):
            weight = got[name.replace("bias", "weight")]
            assert weight is not None and got[name].norm() <= SAME * weight.norm(), name
        else:
            assert_same(got[name], gradient, name)
