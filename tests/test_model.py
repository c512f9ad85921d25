"""What SiT does beyond the reference: the projector, its block contract, label dropout, precision and memory."""

from __future__ import annotations

import copy
import io
from itertools import pairwise
from typing import Any

import pytest
import torch
from models import SMALL, batch_for, outputs_and_gradients, randomise, small_model
from tolerance import allowed, relative_error

from sra2_fast import SiT, SiT_models

IMPLEMENTATIONS = ("eager", "fused")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_projection_is_that_of_the_tokens_after_the_aligned_block(implementation: str) -> None:
    model = small_model(align_depth=2, implementation=implementation).eval()
    inputs = batch_for(model)
    with torch.no_grad():
        velocity, projection = model(*inputs, return_projection=True)
        hidden, alone = model(*inputs, return_hidden=2), model(*inputs)
    assert projection.shape == (3, 16, 2 * 2 * 4) and hidden.shape == (3, 16, 48)
    assert model.projector is not None
    assert torch.equal(velocity, alone)  # the tap costs nothing and changes nothing
    # Fused, the tapped tokens are closed inside the next norm's kernel, and `hidden` by PyTorch's operators.
    assert relative_error(projection, model.projector(hidden))[0] <= allowed(torch.float32, 3, summed=96)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("number", (1, 3))
def test_a_block_called_alone_keeps_the_public_contract(number: int, implementation: str) -> None:
    """block(x, c) -> x, as hooks and wrappers expect, equals the blocks chained across their edges inside forward."""
    model = small_model(implementation=implementation).eval()
    x, t, y = batch_for(model)
    tokens = model.x_embedder(x) + model.pos_embed
    c = model.t_embedder(t) + model.y_embedder(y)
    for block in model.blocks[:number]:
        tokens = block(tokens, c)
    error, _ = relative_error(model(x, t, y, return_hidden=number).detach(), tokens.detach())
    assert error <= allowed(torch.float32, 2 * number)


def test_a_block_takes_its_modulation_ready_made() -> None:
    """The six (B, D) slices may come from one product for all blocks; c is then not looked at."""
    model = small_model().eval()
    x, t, y = batch_for(model)
    tokens = model.x_embedder(x) + model.pos_embed
    c = model.t_embedder(t) + model.y_embedder(y)
    block = model.blocks[1]
    modulation = block.adaLN_modulation(c)
    assert torch.equal(block(tokens, None, modulation), block(tokens, c))


@pytest.mark.parametrize("layers", (1, 2, 3, 5))
def test_projector_keys_lie_between_blocks_and_final_layer(layers: int) -> None:
    model = SiT(**SMALL, align_depth=1, projector_layers=layers, projector_dim=40, projection_dim=7)
    keys = list(model.state_dict())
    expected = [f"projector.{2 * k}.{kind}" for k in range(layers) for kind in ("weight", "bias")]
    position = keys.index(expected[0])
    assert keys[position : position + len(expected)] == expected
    assert keys[position - 1].startswith("blocks.2.") and keys[position + len(expected)].startswith("final_layer.")
    widths = [48, *[40] * (layers - 1), 7]
    assert model.projector is not None
    shapes = [tuple(m.weight.shape) for m in model.projector if isinstance(m, torch.nn.Linear)]
    assert shapes == [(after, before) for before, after in pairwise(widths)]


def test_the_paper_s_head_at_xl_has_18_million_parameters() -> None:
    """arXiv 2601.17830: about 18 M at XL; five layers of width 2D are 18.6 M."""
    with torch.device("meta"):
        plain = SiT_models["SiT-XL/2"](learn_sigma=False)
        aligned = SiT_models["SiT-XL/2"](learn_sigma=False, align_depth=8)
    extra = sum(p.numel() for p in aligned.parameters()) - sum(p.numel() for p in plain.parameters())
    widths = [1152, 2304, 2304, 2304, 2304, 16]
    assert extra == sum((a + 1) * b for a, b in pairwise(widths))
    assert round(extra / 1e5) == 186


@pytest.mark.parametrize(("dropout", "rows"), ((0.1, 11), (0.0, 10)))
def test_the_null_label_has_a_row_only_when_labels_are_dropped(dropout: float, rows: int) -> None:
    assert SiT(**SMALL, class_dropout_prob=dropout).y_embedder.embedding_table.weight.shape == (rows, 48)


def test_labels_are_dropped_by_chance_in_training_only() -> None:
    model = small_model(class_dropout_prob=0.3)
    labels = torch.full((10000,), 4)
    dropped = (model.train().y_embedder.drop(labels) == 10).double().mean()
    assert abs(float(dropped) - 0.3) <= 5 * (0.3 * 0.7 / 10000) ** 0.5
    assert torch.equal(model.eval().y_embedder.drop(labels), labels)


@pytest.mark.parametrize("kind", (torch.bool, torch.int64))
@pytest.mark.parametrize("training", (True, False))
def test_forced_drops_are_the_null_label_and_nothing_else(training: bool, kind: torch.dtype) -> None:
    model = small_model(class_dropout_prob=0.9)
    x, t, y = batch_for(model)
    drop = torch.tensor([0, 1, 0]).to(kind)
    forced = model.train(training)(x, t, y, force_drop_ids=drop)
    assert torch.equal(forced, model.eval()(x, t, torch.where(drop.bool(), 10, y)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_recomputed_blocks_give_the_same_bits(implementation: str) -> None:
    """Checkpointing a block calls it with a closed stream, so it is held against the same calls without it."""
    model = small_model(align_depth=1, checkpoint_blocks=True, class_dropout_prob=0.0, implementation=implementation)
    inputs = batch_for(model)
    recomputed = outputs_and_gradients(model.train(), inputs)
    kept = outputs_and_gradients(model.eval(), inputs)  # evaluation keeps activations and drops no label
    assert recomputed.keys() == kept.keys()
    for name, value in kept.items():
        assert torch.equal(recomputed[name], value), name


def test_recomputed_blocks_keep_less() -> None:
    """Bytes autograd saves: with recomputation a block keeps its input and little else."""
    kept: dict[bool, int] = {}
    for checkpoint_blocks in (True, False):
        model = small_model(depth=6, checkpoint_blocks=checkpoint_blocks).train()
        inputs = batch_for(model)
        saved: dict[int, int] = {}

        def note(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            velocity = model(*inputs)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept[checkpoint_blocks] = sum(size for pointer, size in saved.items() if pointer not in weights)
        velocity.sum().backward()
    assert kept[True] < kept[False] / 4


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_keeps_residual_and_gradients_in_float32(implementation: str) -> None:
    model = small_model(align_depth=2, qk_norm=True, implementation=implementation).eval()
    inputs = batch_for(model)
    entered: list[torch.dtype] = []
    for block in model.blocks:
        block.attn.proj.register_forward_pre_hook(lambda _, args: entered.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(*inputs)
        assert model(*inputs, return_hidden=2).dtype == torch.float32
        assert model(*inputs, return_hidden=3).dtype == torch.float32
    velocity.float().sum().backward()
    assert set(entered) == {torch.bfloat16}
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    assert model.blocks[0].attn.qkv.weight.grad is not None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_model_in_bfloat16_runs_and_trains(implementation: str) -> None:
    model = small_model(align_depth=1, qk_norm=True, implementation=implementation).bfloat16().eval()
    x, t, y = batch_for(model)
    values = outputs_and_gradients(model, (x.bfloat16(), t.bfloat16(), y))
    assert {value.dtype for value in values.values()} == {torch.bfloat16}
    assert all(torch.isfinite(value).all() and value.any() for value in values.values())


def test_positions_are_kept_but_never_trained() -> None:
    model = small_model()
    model(*batch_for(model)).sum().backward()
    assert not model.pos_embed.requires_grad and model.pos_embed.grad is None
    assert next(iter(model.state_dict())) == "pos_embed"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_samples_do_not_mix_and_layout_does_not_matter(implementation: str) -> None:
    model = small_model(implementation=implementation).eval()
    x, t, y = batch_for(model, batch=4)
    together = model(x, t, y)
    alone = torch.cat([model(x[k : k + 1], t[k : k + 1], y[k : k + 1]) for k in range(4)])
    assert relative_error(alone, together)[0] <= allowed(torch.float32, 8, summed=48)
    channels_last = model(x.to(memory_format=torch.channels_last), t, y)
    assert relative_error(channels_last, together)[0] <= allowed(torch.float32, 8, summed=48)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("input_size", "batch"), ((2, 3), (6, 1), (8, 0)))
def test_one_token_an_odd_grid_and_an_empty_batch(input_size: int, batch: int, implementation: str) -> None:
    model = small_model(input_size=input_size, align_depth=1, implementation=implementation).eval()
    inputs = batch_for(model, batch=batch)
    values = outputs_and_gradients(model, inputs)
    assert values["velocity"].shape == inputs[0].shape
    assert values["projection"].shape == (batch, (input_size // 2) ** 2, 16)
    assert all(torch.isfinite(value).all() for value in values.values())


def test_sigma_channels_are_computed_and_ignored() -> None:
    model = small_model(learn_sigma=True).eval()
    assert model.out_channels == 8 and model.final_layer.linear.out_features == 2 * 2 * 8
    inputs = batch_for(model)
    before = model(*inputs)
    sigma_rows = torch.arange(32).view(4, 8)[:, 4:].flatten()
    with torch.no_grad():
        model.final_layer.linear.weight[sigma_rows] += 1
    assert torch.equal(model(*inputs), before)


def test_config_rebuilds_it_and_it_copies_and_travels() -> None:
    model = small_model(align_depth=2, projector_layers=3, projection_dim=6, qk_norm=True, mlp_ratio=2.0).eval()
    inputs = batch_for(model)
    want = model(*inputs)
    rebuilt = SiT(**model.config()).eval()
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = SiT(**model.config()).eval()
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for other in (rebuilt, loaded, copy.deepcopy(model)):
        assert torch.equal(other(*inputs), want)
    assert rebuilt.config() == model.config()


def test_built_on_meta_it_fills_in_later() -> None:
    with torch.device("meta"):
        model = SiT(**SMALL, align_depth=1)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    model.initialize_weights()
    randomise(model)
    velocity = model.eval()(*batch_for(model))
    assert torch.isfinite(velocity).all()
    assert torch.equal(model.pos_embed, SiT(**SMALL).pos_embed)


@pytest.mark.parametrize(
    "given",
    (
        {"use_cfg": True, "fused_attn": False, "path_type": "linear"},
        {"decoder_hidden_size": 48},
        {"encoder_depth": 2},
        {"encoder_depth": 2, "align_depth": 2},
    ),
)
def test_keywords_of_the_repa_family_are_accepted(given: dict[str, Any]) -> None:
    model = SiT(**SMALL, **given)
    assert model.align_depth == given.get("encoder_depth")
    plain = SiT(**SMALL, align_depth=given.get("encoder_depth"))
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert model.config() == plain.config()


class Int8Linear(torch.nn.Module):
    """Quantised layers in short: whole numbers for weights, and for torch's own a method of that name."""

    def __init__(self, linear: torch.nn.Linear, *, is_packed: bool) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        self.whole = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = (lambda: self.whole) if is_packed else self.whole
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.whole * self.scale, self.bias)


@pytest.mark.parametrize("is_packed", [False, True])
def test_the_time_is_not_rounded_to_a_quantised_layer_s_type(is_packed: bool) -> None:
    """Its cosines became 0 and 1 where the weights are whole numbers."""
    model = small_model().eval()
    x, t, y = batch_for(model)
    velocity, linear = model(x, t, y), model.t_embedder.mlp[0]
    quantised = model.t_embedder.mlp[0] = Int8Linear(linear, is_packed=is_packed)
    rounding, _ = relative_error(quantised.whole * quantised.scale, linear.weight)
    assert 0 < relative_error(model(x, t, y), velocity)[0] < 2 * rounding


def test_the_configuration_is_a_mapping_and_a_call() -> None:
    """peft saves and merges with `model.config.get(...)`; a method has no such thing."""
    model = small_model(align_depth=1)
    assert model.config.get("depth") == SMALL["depth"] and "tie_word_embeddings" not in model.config
    model.config["depth"] = 0  # a copy: the model keeps its own
    assert model.config() == dict(model.config) and model.config()["depth"] == SMALL["depth"]
    assert type(model)(**model.config()).config() == model.config()
