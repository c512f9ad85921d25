"""What SiT refuses, and the one line it says: the op, the argument, what it must be, what it got."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import SMALL, batch_for, small_model

from sra2_fast import SiT, SiT_models
from sra2_fast.errors import InputError
from sra2_fast.models import model_sizes


@pytest.mark.parametrize(
    ("arguments", "match"),
    (
        ({"input_size": 9}, r"SiT: input_size must be divisible by patch_size = 2, got 9"),
        ({"patch_size": 0}, r"SiT: patch_size must be a positive integer, got 0"),
        ({"hidden_size": 50}, r"SiT: hidden_size must be divisible by num_heads = 3, got 50"),
        ({"hidden_size": 54}, r"SiT: hidden_size must be divisible by 4 \(the sine-cosine positions\), got 54"),
        ({"hidden_size": 48.0}, r"SiT: hidden_size must be a positive integer, got 48\.0"),
        ({"depth": -1}, r"SiT: depth must be a positive integer, got -1"),
        ({"num_heads": 0}, r"SiT: num_heads must be a positive integer, got 0"),
        ({"in_channels": 0}, r"SiT: in_channels must be a positive integer, got 0"),
        ({"num_classes": 0}, r"SiT: num_classes must be a positive integer, got 0"),
        ({"class_dropout_prob": 1.0}, r"SiT: class_dropout_prob must be in \[0, 1\), got 1\.0"),
        ({"class_dropout_prob": -0.1}, r"SiT: class_dropout_prob must be in \[0, 1\), got -0\.1"),
        ({"implementation": "fast"}, r"SiT: implementation must be eager or fused, got 'fast'"),
        ({"align_depth": 4}, r"SiT: align_depth must be None or a block from 1 to depth = 3, got 4"),
        ({"align_depth": 0}, r"SiT: align_depth must be None or a block from 1 to depth = 3, got 0"),
        ({"encoder_depth": 8}, r"SiT: align_depth must be None or a block from 1 to depth = 3, got 8"),
        ({"align_depth": 1, "projector_layers": 0}, r"SiT: projector_layers must be at least 1, got 0"),
        ({"align_depth": 1, "projector_dim": 0}, r"SiT: projector_dim must be None or at least 1, got 0"),
        ({"align_depth": 1, "projection_dim": 0}, r"SiT: projection_dim must be None or at least 1, got 0"),
        ({"mlp_ratio": 0.0}, r"SiT: mlp_ratio must be such that the MLP has a width of at least 1, got 0\.0"),
        ({"projector_dim": 64}, r"SiT: projector_dim without align_depth has no meaning; give align_depth="),
        ({"projection_dim": 16}, r"SiT: projection_dim without align_depth has no meaning; give align_depth="),
        (
            {"z_dims": [768]},
            r"SiT: z_dims is REPA's; use projection_dim= with align_depth=, or sra2_fast\.compat\.repa",
        ),
        ({"ad": 4}, r"SiT: ad is SRA's; use align_depth=, or sra2_fast\.compat\.sra"),
        ({"decoder_hidden_size": 768}, r"SiT: decoder_hidden_size must be equal to hidden_size = 48, got 768"),
        (
            {"align_depth": 1, "encoder_depth": 2},
            r"SiT: encoder_depth must be equal to align_depth = 1, or left out, got 2",
        ),
        ({"qknorm": True}, r"SiT: keyword must be one of the documented arguments, got 'qknorm'"),
    ),
)
def test_what_the_constructor_refuses(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match) as raised:
        SiT(**{**SMALL, **arguments})
    assert "\n" not in str(raised.value)


def test_an_unknown_keyword_is_a_type_error_as_python_s_own_is() -> None:
    with pytest.raises(TypeError, match="got 'qknorm'"):
        SiT_models["SiT-S/8"](qknorm=True)


def changed(argument: str, value: Any) -> dict[str, Any]:
    x, t, y = batch_for(small_model())
    return {"x": x, "t": t, "y": y, argument: value}


@pytest.mark.parametrize(
    ("argument", "value", "kind", "match"),
    (
        ("x", torch.zeros(3, 3, 8, 8), ValueError, r"SiT: x must be \(B, 4, 8, 8\), got \(3, 3, 8, 8\)"),
        ("x", torch.zeros(3, 4, 9, 8), ValueError, r"SiT: x must be \(B, 4, 8, 8\), got \(3, 4, 9, 8\)"),
        ("x", torch.zeros(4, 8, 8), ValueError, r"SiT: x must be \(B, 4, 8, 8\), got \(4, 8, 8\)"),
        ("x", torch.zeros(3, 4, 8, 8).half(), TypeError, r"SiT: x must be float32 or bfloat16 .*, got .*float16"),
        ("x", torch.zeros(3, 4, 8, 8).long(), TypeError, r"SiT: x must be float32 or bfloat16, got torch\.int64"),
        ("t", torch.zeros(2), ValueError, r"SiT: t must be \(B,\) = \(3,\), got \(2,\)"),
        ("t", torch.tensor(0.5), ValueError, r"SiT: t must be \(B,\) = \(3,\), got \(\)"),
        ("t", torch.zeros(3, 1), ValueError, r"SiT: t must be \(B,\) = \(3,\), got \(3, 1\)"),
        ("y", torch.zeros(4).long(), ValueError, r"SiT: y must be \(B,\) = \(3,\), got \(4,\)"),
        ("y", torch.zeros(3), TypeError, r"SiT: y must be an integer tensor of labels, got torch\.float32"),
        ("y", torch.tensor([0, 11, 2]), ValueError, r"SiT: y must be labels from 0 to 10, got 11"),
        ("y", torch.tensor([0, -1, 2]), ValueError, r"SiT: y must be labels from 0 to 10, got -1"),
        ("return_hidden", 4, ValueError, r"SiT: return_hidden must be a block from 1 to 3, got 4"),
        ("return_hidden", 0, ValueError, r"SiT: return_hidden must be a block from 1 to 3, got 0"),
        ("return_projection", True, ValueError, r"SiT: there is no projector; build the model with align_depth="),
        ("force_drop_ids", torch.ones(2), ValueError, r"SiT: force_drop_ids must be \(B,\) = \(3,\), got \(2,\)"),
    ),
)
@pytest.mark.parametrize("implementation", ("eager", "fused"))
def test_what_a_call_refuses(argument: str, value: Any, kind: type[Exception], match: str, implementation: str) -> None:
    model = small_model(implementation=implementation)
    with pytest.raises(kind, match=match) as raised:
        model(**changed(argument, value))
    assert isinstance(raised.value, InputError) and "\n" not in str(raised.value)


def test_labels_cannot_be_dropped_where_there_is_no_row_for_it() -> None:
    model = small_model(class_dropout_prob=0.0)
    with pytest.raises(
        InputError, match=r"SiT: force_drop_ids must be None or all zero in a model without a null label"
    ):
        model(*batch_for(model), force_drop_ids=torch.tensor([False, True, False]))
    x, t, y = batch_for(model)
    assert torch.equal(model(x, t, y, force_drop_ids=torch.zeros(3, dtype=torch.bool)), model(x, t, y))
    with pytest.raises(InputError, match=r"SiT: y must be labels from 0 to 9, got 10"):
        model(x, t, torch.full_like(y, 10))


def test_float16_autocast_is_refused_by_its_name_not_as_a_wrong_x() -> None:
    model = small_model()
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(TypeError, match=r"SiT: the autocast dtype must be bfloat16 .*--mixed-precision bf16\), got"),
    ):
        model(*batch_for(model))


@pytest.mark.parametrize("channels", (0, 5, -1))
def test_guidance_refuses_channels_the_latent_does_not_have(channels: int) -> None:
    model = small_model()
    x, t, y = (torch.cat([value, value]) for value in batch_for(model))
    with pytest.raises(InputError, match=rf"SiT: channels must be None or from 1 to 4, got {channels}"):
        model.forward_with_cfg(x, t, y, 2.0, channels=channels)


def test_guidance_refuses_an_odd_batch() -> None:
    model = small_model()
    with pytest.raises(InputError, match=r"SiT: x must be an even batch \(labels, then null labels\), got 3"):
        model.forward_with_cfg(*batch_for(model), 2.0)


def test_a_checkpoint_of_another_model_is_not_loaded_in_part() -> None:
    wide, deep = small_model(hidden_size=96), small_model(depth=4)
    with pytest.raises(RuntimeError, match=r"size mismatch for pos_embed"):
        small_model().load_state_dict(wide.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*blocks\.3\."):
        small_model().load_state_dict(deep.state_dict())


def test_sizes_of_a_model_are_four_positive_numbers_or_a_name() -> None:
    sizes = {"hidden_size": 128, "depth": 6, "num_heads": 4, "patch_size": 2}
    assert model_sizes("128,6,4,2") == model_sizes("128, 6, 4, 2") == sizes
    for wrong in ("128,6,4", "128,6,4,2,1", "128,6,-4,2", "128,6,0,2", "128,6,4,two", "SiT-M/2", ""):
        with pytest.raises(InputError, match=rf"^train: --model {wrong} is not known.* Names are SiT-.* such as 128,"):
            model_sizes(wrong, "train")
    with pytest.raises(InputError, match=r"did you mean SiT-XL/2\? Names are"):
        model_sizes("sit-xl2")
