"""Public checkpoints become ours: the recorded outputs of the public classes, and back to their layouts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from public_checkpoints import NAMES, checkpoint_of, write_public
from recorded.recording import Recording, assert_same
from safetensors.torch import save_file

from sra2_fast import SiT, convert_state_dict, sample_ode
from sra2_fast.checkpoints import open_model
from sra2_fast.checkpoints.conventions import turn_time_around
from sra2_fast.compat import repa

FROM_NOISE = ("sit", "sit_one_channel", "sit_patch4", "lightningdit")
HEADS = 3  # of the recorded models, which are no public size


def public_velocity(recording: Recording, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(the time at which ours is asked, what it must answer): ours(x, 1 - t) = -theirs(x, t) for SiT."""
    if name in FROM_NOISE:
        return 1 - recording["t"], -recording["velocity_eval"]
    return recording["t"], recording["velocity_eval"]


@pytest.mark.parametrize("name", NAMES)
def test_a_public_checkpoint_opens_by_itself_and_has_the_public_model_s_velocity(tmp_path: Path, name: str) -> None:
    file, recording = write_public(tmp_path, name)
    model, opened = open_model(file, num_heads=HEADS)
    t, want = public_velocity(recording, name)
    with torch.no_grad():
        assert_same(model(recording["x"], t, recording["y"]), want, "velocity")
    assert not model.training and not model.learn_sigma and opened.weights == "ema" and opened.path == "linear"
    assert opened.source == {"sit_patch4": "sit", "sit_one_channel": "sit", "repa_qk_norm": "repa"}.get(
        name, name.replace("_", "-")
    )
    assert opened.step == (0 if name in FROM_NOISE else 400)
    assert model.class_dropout_prob == recording.config.get("class_dropout_prob", 0.1)


def rename(state: dict[str, Any], name: str) -> dict[str, Any]:
    """The names that DDP and torch.compile leave in a state dict."""
    if name == "ddp":
        return {f"module.{key}": value for key, value in state.items()}
    if name == "compiled ddp":
        return {f"module._orig_mod.{key}": value for key, value in state.items()}
    return {key.replace("blocks.0.", "blocks.0._orig_mod."): value for key, value in state.items()}


@pytest.mark.parametrize("wrapper", ("ddp", "compiled ddp", "compiled blocks"))
@pytest.mark.parametrize("name", ("sit", "repa"))
def test_names_of_wrappers_are_dropped(name: str, wrapper: str) -> None:
    content, _ = checkpoint_of(name)
    plain = convert_state_dict(content["ema"])
    wrapped = convert_state_dict(rename(content["ema"], wrapper))
    assert list(plain) == list(wrapped)
    assert all(torch.equal(wrapped[key], value) for key, value in plain.items())


def test_repa_s_first_code_numbered_the_later_blocks_from_zero() -> None:
    content, recording = checkpoint_of("repa")
    first = recording.config["encoder_depth"]
    legacy = {}
    for key, value in content["ema"].items():
        parts = key.split(".")
        if parts[0] == "blocks" and int(parts[1]) >= first:
            key = ".".join(["decoder_blocks", str(int(parts[1]) - first), *parts[2:]])
        legacy[key] = value
    assert any(key.startswith("decoder_blocks.0.") for key in legacy)
    want = convert_state_dict(content)
    got = convert_state_dict(legacy)
    assert list(got) == list(want) and all(torch.equal(got[key], value) for key, value in want.items())


def test_repa_s_projector_and_sra_s_head_are_ours(tmp_path: Path) -> None:
    """The recorded projections of the public models, in training, from the converted model's projector."""
    for name, output in (("repa", "z0"), ("sra", "projection")):
        file, recording = write_public(tmp_path, name)
        model, opened = open_model(file, num_heads=HEADS)
        assert model.align_depth == (1 if name == "repa" else 2)
        inputs = recording["x"], recording["t"], recording["y"]
        _, projection = model(*inputs, force_drop_ids=recording["drop"], return_projection=True)
        assert_same(projection, recording[output], name)
        assert opened.notes == (("of 2 projectors the first is kept",) if name == "repa" else ())


def test_repa_e_s_statistics_become_the_latents_normalisation(tmp_path: Path) -> None:
    file, _ = write_public(tmp_path, "repa_e")
    model, opened = open_model(file, num_heads=HEADS)
    assert not any(key.startswith("bn.") for key in model.state_dict())
    assert opened.latents is not None
    torch.testing.assert_close(torch.tensor(opened.latents["scale"]), torch.tensor([0.5, 0.7, 1.0, 1.25]))
    torch.testing.assert_close(torch.tensor(opened.latents["shift"]), torch.tensor([0.1, -0.2, 0.0, 0.3]))


@pytest.mark.parametrize("name", ("sit", "sit_patch4", "repa", "sra"))
def test_the_images_of_a_converted_model_are_those_of_the_original_in_its_own_time(tmp_path: Path, name: str) -> None:
    """Euler from noise to data, the public way: SiT from t = 0 up with its own velocity, the others from t = 1 down."""
    file, recording = write_public(tmp_path, name)
    plain = {k: v for k, v in recording.config.items() if k not in ("z_dims", "projector_dim", "encoder_depth")}
    original = SiT(**{"learn_sigma": False, **plain} if not name.startswith("sit") else plain)
    head = ("projectors.", "ap_head.")
    original.load_state_dict({k: v for k, v in recording.state().items() if not k.startswith(head)})
    ours, _ = open_model(file, num_heads=HEADS)
    x, labels, steps = torch.randn(3, *recording["x"].shape[1:]), recording["y"], 8
    with torch.no_grad():
        z, times = x.double(), torch.linspace(0, 1, steps + 1)
        for start, end in itertools.pairwise(times):
            t = start if name.startswith("sit") else 1 - start
            velocity = original.eval()(z.float(), t.expand(3), labels).double()
            z = z + (end - start).double() * (velocity if name.startswith("sit") else -velocity)
    assert_same(sample_ode(ours, x, labels, steps=steps), z, "samples")


@pytest.mark.parametrize("name", ("sit", "sit_patch4"))
def test_back_to_sit_s_layout_is_where_it_came_from(name: str) -> None:
    """Names, order and shapes are the public ones; the first C output channels are equal, and the outputs too."""
    content, recording = checkpoint_of(name)
    back = convert_state_dict(convert_state_dict(content), "sra2_fast", to="sit")
    assert [[key, list(value.shape)] for key, value in back.items()] == [[k, shape] for k, shape, _ in recording.keys]
    model = SiT(**recording.config).eval()
    model.load_state_dict(back, strict=True)
    with torch.no_grad():
        assert_same(model(recording["x"], recording["t"], recording["y"]), recording["velocity_eval"], "velocity")
    for key, value in content["ema"].items():
        if not key.startswith(("final_layer.linear", "t_embedder.mlp.0.weight")):
            assert torch.equal(back[key], value), key


def test_back_to_repa_s_layout_loads_into_repa_s_class() -> None:
    content, recording = checkpoint_of("repa")
    back = convert_state_dict(convert_state_dict(content), to="repa")
    model = repa.SiT(**{**recording.config, "z_dims": recording.config["z_dims"][:1]})
    model.load_state_dict(back, strict=True)
    assert list(back) == list(model.state_dict())
    assert all(torch.equal(value, content["ema"][key]) for key, value in back.items())
    ours = SiT(8, 2, 4, 24, 2, 3, num_classes=10, learn_sigma=False, align_depth=1)  # five layers: REPA has no place
    assert not any("projector" in key for key in convert_state_dict(ours.state_dict(), to="repa"))


def test_sit_to_repa_s_layout_turns_time_around_once() -> None:
    content, recording = checkpoint_of("sit")
    sizes = {key: value for key, value in recording.config.items() if key != "learn_sigma"}
    model = repa.SiT(**sizes, z_dims=[], encoder_depth=1)
    model.load_state_dict(convert_state_dict(content, to="repa"), strict=True)
    with torch.no_grad():
        velocity, _ = model.eval()(recording["x"], 1 - recording["t"], recording["y"])
    assert_same(-velocity, recording["velocity_eval"], "velocity")


def test_turning_time_around_twice_changes_nothing_but_a_rounding() -> None:
    content, _ = checkpoint_of("sit")
    twice = turn_time_around(turn_time_around(content["ema"]))
    for key, value in content["ema"].items():
        if key == "t_embedder.mlp.0.weight":
            assert_same(twice[key], value.double(), key)
            assert not torch.equal(turn_time_around(content["ema"])[key], value)
        else:
            assert torch.equal(twice[key], value), key


def test_the_given_state_is_left_alone_and_half_precision_becomes_float32() -> None:
    content, _ = checkpoint_of("sit")
    half = {key: value.half() for key, value in content["ema"].items()}
    before = {key: value.clone() for key, value in half.items()}
    converted = convert_state_dict(half)
    assert all(torch.equal(half[key], value) for key, value in before.items())
    assert {value.dtype for value in converted.values()} == {torch.float32}


def test_model_asks_for_the_weights_as_trained(tmp_path: Path) -> None:
    file, _ = write_public(tmp_path, "sra")
    averaged, _ = open_model(file, num_heads=HEADS)
    trained, opened = open_model(file, weights="model", num_heads=HEADS)
    assert opened.weights == "model"
    bias = "blocks.0.mlp.fc1.bias"
    assert torch.equal(trained.state_dict()[bias], averaged.state_dict()[bias] * 1.125)


@pytest.mark.parametrize("name", NAMES)
def test_a_bare_state_dict_opens_too(tmp_path: Path, name: str) -> None:
    """As .safetensors, and as the downloads of SiT and REPA are: without options, so a look-alike has to be named."""
    content, recording = checkpoint_of(name)
    file = tmp_path / "weights.safetensors"
    save_file({key: value.contiguous() for key, value in content["ema"].items()}, file)
    is_told = name in ("sit_one_channel", "lightningdit")
    source = "sit" if is_told else "auto"
    told = {"num_classes": 10} if name == "sit_patch4" else {}
    model, opened = open_model(file, source=source, num_heads=HEADS, **told)
    t, want = public_velocity(recording, name)
    with torch.no_grad():
        assert_same(model(recording["x"], t, recording["y"]), want, "velocity")
    assert opened.weights == "model" and opened.path is None
