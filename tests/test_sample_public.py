"""The samplers against REPA's and SiT's own, recorded on their own models (tests/recorded/record_samplers.py)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from recorded.recording import HERE, assert_same, load_recording
from safetensors import safe_open
from torch import Tensor

from sra2_fast import SiT, compat, sample_ode, sample_sde
from sra2_fast.checkpoints import convert_state_dict

with safe_open(HERE / "samplers.safetensors", "pt") as _file:
    CASES: dict[str, dict[str, Any]] = json.loads(_file.metadata()["cases"])
    STEPS = int(_file.metadata()["steps"])
    RECORDED: dict[str, Tensor] = {key: _file.get_tensor(key) for key in _file.keys()}  # noqa: SIM118 (not a dict)


def models_of(name: str) -> tuple[Any, ...]:
    """With the recorded weights: REPA's class and a plain SiT; or the SiT repository's, time turned around by hand, and
    converted.

    A plain SiT goes another way through the sampler.
    """
    if name.startswith("repa"):
        recording = load_recording("repa")
        repa = compat.repa.SiT(**recording.config)
        repa.load_state_dict(recording.state())
        keys = {key: value for key, value in recording.state().items() if not key.startswith("projectors.")}
        sizes = {key: recording.config[key] for key in ("input_size", "hidden_size", "num_heads", "num_classes")}
        plain = SiT(**sizes, depth=recording.config["depth"], learn_sigma=False)
        plain.load_state_dict(keys)
        return repa.eval(), plain.eval()
    recording = load_recording("sit")
    sit = SiT(**recording.config).eval()
    sit.load_state_dict(recording.state())

    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return -sit(x, 1 - t, y)

    velocity.num_classes = sit.num_classes  # type: ignore[attr-defined]
    converted = SiT(**{**recording.config, "learn_sigma": False}).eval()
    converted.load_state_dict(convert_state_dict(recording.state(), source="sit"))
    return velocity, converted


@pytest.mark.parametrize("name", list(CASES))
def test_the_numbers_are_the_public_samplers(name: str) -> None:
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in CASES[name].items()}
    noise, labels = RECORDED["noise"], RECORDED["labels"]
    for model in models_of(name):
        if "path" in arguments:
            draws = RECORDED[f"{name}.draws"]
            got = sample_sde(model, noise, labels, steps=STEPS, step_noise=lambda step, d=draws: d[step], **arguments)
        else:
            got = sample_ode(model, noise, labels, steps=STEPS, **arguments)
        assert_same(got, RECORDED[name], name)


def test_the_recordings_tell_the_cases_apart() -> None:
    """No two of them agree, so that no argument of a case can be ignored unseen."""
    for number, name in enumerate(CASES):
        for other in list(CASES)[number + 1 :]:
            difference = (RECORDED[name] - RECORDED[other]).norm() / RECORDED[name].norm()
            assert difference > 1e-3, f"{name} and {other}"
