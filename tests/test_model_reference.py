"""SiT against the public SiT, REPA and SRA models: same weights in, same outputs and gradients out.

The public models were run once (tests/recorded/record.py); their weights are random, none left at zero.
"""

from __future__ import annotations

import math

import pytest
import torch
from recorded.recording import Recording, assert_same, assert_same_gradients, load_recording, reference_facts

from sra2_fast import SiT, SiT_models
from sra2_fast.models import model_sizes

SIT = ("sit", "sit_one_channel", "sit_patch4")
FAMILY = ("repa", "repa_qk_norm", "sra")
IMPLEMENTATIONS = ("eager", "fused")


def build(recording: Recording, **changes: object) -> SiT:
    """Ours with the recorded constructor arguments and weights; a head the plain model has no place for is left out."""
    config = {"learn_sigma": False} if "decoder_hidden_size" in recording.config else {}
    config |= {k: v for k, v in recording.config.items() if k not in ("z_dims", "projector_dim", "encoder_depth")}
    model = SiT(**{**config, **changes})  # type: ignore[arg-type]
    state = {k: v for k, v in recording.state().items() if not k.startswith(("projectors.", "ap_head."))}
    if model.projector is None:
        model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize("name", SIT)
def test_keys_shapes_and_what_is_trained_are_the_reference_s_in_its_order(name: str) -> None:
    recording = load_recording(name)
    model = SiT(**recording.config)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    keys = [(key, list(value.shape), trainable[key]) for key, value in model.state_dict().items()]
    assert keys == recording.keys


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SIT + FAMILY)
def test_velocity_in_evaluation(name: str, implementation: str) -> None:
    recording = load_recording(name)
    model = build(recording, implementation=implementation).eval()
    with torch.no_grad():
        got = model(recording["x"], recording["t"], recording["y"])
    assert_same(got, recording["velocity_eval"], "velocity")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SIT)
def test_velocity_and_every_gradient_in_training(name: str, implementation: str) -> None:
    recording = load_recording(name)
    model = build(recording, implementation=implementation).train()
    x = recording["x"].requires_grad_()
    velocity = model(x, recording["t"], recording["y"], force_drop_ids=recording.tensors.get("drop"))
    velocity.backward(recording["dvelocity"])
    assert_same(velocity, recording["velocity"], "velocity")
    assert_same_gradients(model, x, recording)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ("repa", "repa_qk_norm"))
def test_a_projector_built_like_repa_s_gives_its_projection_and_gradients(name: str, implementation: str) -> None:
    recording = load_recording(name)
    config, (first_dim, _) = recording.config, recording.config["z_dims"]
    model = build(
        recording,
        implementation=implementation,
        align_depth=config["encoder_depth"],
        projector_layers=3,
        projector_dim=config["projector_dim"],
        projection_dim=first_dim,
    )
    state = {k.replace("projectors.0.", "projector."): v for k, v in recording.state().items()}
    model.load_state_dict({k: v for k, v in state.items() if not k.startswith("projectors.")}, strict=True)
    model.train()
    velocity, projection = model(
        recording["x"], recording["t"], recording["y"], force_drop_ids=recording["drop"], return_projection=True
    )
    assert_same(velocity, recording["velocity"], "velocity")
    assert_same(projection, recording["z0"], "projection")
    # Only the second projector is missing here, so what lies after the tap has the recorded gradients.
    torch.autograd.backward((velocity, projection), (recording["dvelocity"], recording["dz0"]))
    assert model.projector is not None
    for number in (0, 2, 4):
        want = recording[f"grad.projectors.0.{number}.weight"]
        assert_same(model.projector[number].weight.grad, want, f"projector.{number}")
    assert_same(model.final_layer.linear.weight.grad, recording["grad.final_layer.linear.weight"], "final_layer")


@pytest.mark.parametrize("name", SIT)
def test_guidance_of_the_first_three_channels(name: str) -> None:
    recording = load_recording(name)
    model = build(recording).eval()
    inputs = recording["cfg_x"], recording["cfg_t"], recording["cfg_y"]
    if recording.config.get("class_dropout_prob") == 0:
        assert model.y_embedder.embedding_table.num_embeddings == recording.config["num_classes"]
    with torch.no_grad():
        assert_same(model.forward_with_cfg(*inputs, 3.5), recording["cfg_velocity"], "guided velocity")
        assert_same(model.forward_with_cfg(*inputs, 3.5, channels=3), recording["cfg_velocity"], "guided velocity")


def test_guidance_of_all_channels_guides_the_fourth_as_the_first_three() -> None:
    recording = load_recording("sit")
    model = build(recording).eval()
    x, t, y = recording["cfg_x"], recording["cfg_t"], recording["cfg_y"]
    with torch.no_grad():
        with_label, without = model(x, t, y).chunk(2)
        guided = model.forward_with_cfg(x, t, y, 3.5, channels=None)
    want = without + 3.5 * (with_label - without)
    assert_same(guided, torch.cat([want, want]), "guided velocity")
    assert_same(guided[:, :3], recording["cfg_velocity"][:, :3], "the three channels both guide")
    assert not torch.allclose(guided[:, 3], recording["cfg_velocity"][:, 3])


def test_positions_are_the_reference_s() -> None:
    """Width first, sine before cosine; float32 of a float64 table, so at most one rounding apart."""
    for name in SIT:
        recording = load_recording(name)
        got, want = SiT(**recording.config).pos_embed, recording["state.pos_embed"]
        assert (got - want).abs().max() <= 2.0**-24, name


@pytest.mark.parametrize("qk_norm", (False, True))
def test_qk_norm_adds_the_reference_s_four_keys_a_block(qk_norm: bool) -> None:
    recording = load_recording("repa_qk_norm" if qk_norm else "repa")
    ours = [key for key, _ in build(recording).named_parameters()]
    assert ours == [key for key, _, _ in recording.keys if not key.startswith("projectors.")]
    norms = [key for key in ours if "_norm." in key]
    depth = recording.config["depth"]
    wanted = [f"blocks.{k}.attn.{m}_norm.{p}" for k in range(depth) for m in ("q", "k") for p in ("weight", "bias")]
    assert norms == (wanted if qk_norm else [])


@pytest.mark.parametrize("repository", ("sit", "repa"))
def test_initial_weights_have_the_reference_s_statistics(repository: str) -> None:
    """Mean, spread and range of every parameter; exact where the reference's initial value is a constant.

    The spread of n uniform draws is known to sqrt(0.2 / n), of normal draws to sqrt(0.5 / n); four times that, for the
    two samples together, is allowed. The largest of n draws is bounded for a uniform and compared loosely for a normal.
    """
    facts = reference_facts()["init"]
    config = facts["config"] | ({} if repository == "sit" else {"learn_sigma": False, "qk_norm": True})
    parameters = dict(SiT(**config).named_parameters())
    recorded = {k: v for k, v in facts[repository].items() if not k.startswith("projectors.")}
    assert parameters.keys() == recorded.keys()
    for name, (mean, spread, largest) in recorded.items():
        values = parameters[name].detach().double()
        count = values.numel()
        if spread == 0:
            assert torch.equal(values, torch.full_like(values, mean)), f"{name}: all {mean} in the reference"
            continue
        samples = 1 + 1 / facts["seeds"]
        is_normal = largest > 3 * spread
        error = abs(float(values.std()) / spread - 1)
        assert error <= 4 * math.sqrt((0.5 if is_normal else 0.2) / count * samples), f"{name}: spread"
        assert abs(float(values.mean()) - mean) <= 4 * spread * math.sqrt(samples / count), f"{name}: mean"
        bound = 1.3 * largest if is_normal else largest * (1 + 20 / count)
        assert float(values.abs().max()) <= bound, f"{name}: range"


def test_the_layers_that_start_at_zero_are_exactly_zero_and_no_others() -> None:
    model = SiT(16, 2, 4, 48, 2, 3, num_classes=10, align_depth=1, qk_norm=True)
    zero = {name for name, parameter in model.named_parameters() if not parameter.any()}
    wanted = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    adaln = [f"blocks.{k}.adaLN_modulation.1.weight" for k in range(2)]
    wanted |= {*adaln, "final_layer.adaLN_modulation.1.weight", "final_layer.linear.weight"}
    assert zero == wanted


def test_the_registry_has_sixteen_names_with_the_published_sizes() -> None:
    """Counts of the public code; SiT-XL/2 675 M, L/2 458 M, B/2 130 M, S/2 33 M in arXiv 2401.08740, Table 1."""
    assert list(SiT_models) == [f"SiT-{size}/{patch}" for size in ("XL", "L", "B", "S") for patch in (1, 2, 4, 8)]
    sizes = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6)}
    names = ("depth", "hidden_size", "num_heads", "patch_size")
    counted = reference_facts()["registry"]["sit"]
    for name, build_model in SiT_models.items():
        with torch.device("meta"):
            model = build_model()
        size, patch = name.removeprefix("SiT-").split("/")
        assert (model.depth, model.hidden_size, model.num_heads) == sizes[size], name
        assert model.patch_size == int(patch) and len(model.blocks) == model.depth, name
        assert model_sizes(name) == {key: model.config()[key] for key in names}, name
        count = sum(parameter.numel() for parameter in model.parameters())
        if name in counted:
            assert count == counted[name], name
    assert round(counted["SiT-XL/2"] / 1e6) == 675 and round(counted["SiT-S/2"] / 1e6) == 33
