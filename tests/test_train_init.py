"""`--init`, `--freeze`, `--lr-scale`: starting from other weights, and training a part of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from public_checkpoints import checkpoint_of, write_public
from test_shapes import write_vae_sd
from training_runs import assert_same_checkpoint, final, tiny

from sra2_fast import SiT, convert_state_dict, load_checkpoint, open_model
from sra2_fast.cli import main
from sra2_fast.errors import InputError
from sra2_fast.layers.patch_embedding import sincos_positions
from sra2_fast.train import train

pytestmark = pytest.mark.training
MODEL = {"sit": "24,3,3,2", "repa": "24,2,3,2", "sra": "24,3,3,2", "repa_e": "24,2,3,2"}
PLAIN = ("x_embedder.", "t_embedder.", "blocks.", "final_layer.")


def options(folder: Path, name: str, shape: tuple[int, int, int] = (4, 8, 8), **changes: Any) -> dict[str, Any]:
    """Options of a run on latents of `shape` with three classes, from that public checkpoint."""
    data = folder / "x".join(map(str, shape))
    if not data.exists():
        write_vae_sd(data, shape)
    file, _ = write_public(folder, name)
    return {"data": str(data), "latent_scale": "1", "model": MODEL[name], "init": str(file), **changes}


@pytest.mark.parametrize("name", MODEL)
def test_a_run_starts_from_the_averages_of_a_public_file(
    tmp_path: Path, trainer: Callable[..., Any], name: str
) -> None:
    model = trainer(**options(tmp_path, name, num_classes=10)).model
    want = convert_state_dict(checkpoint_of(name)[0])
    own = model.state_dict()
    for key, value in want.items():
        if not key.startswith("projector."):
            assert torch.equal(own[key], value), key
    assert model.projector is not None and len(model.projector) == 9  # SRA 2's five layers, new, not theirs


def test_labels_of_another_count_are_new_and_the_null_label_is_kept(
    tmp_path: Path, trainer: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer(**options(tmp_path, "repa"))
    table = run.model.y_embedder.embedding_table.weight
    theirs = checkpoint_of("repa")[0]["ema"]["y_embedder.embedding_table.weight"]
    fresh = trainer("fresh", **{**options(tmp_path, "repa"), "init": None}).model.y_embedder.embedding_table.weight
    assert table.shape == (4, 24) and torch.equal(table[3], theirs[10]) and torch.equal(table[:3], fresh[:3])
    said = capsys.readouterr().out
    assert "starting from" in said and "repa.pt (repa, ema of step 400); new: the projector, 3 labels (not 10)" in said


def test_a_head_that_fits_is_kept(tmp_path: Path, trainer: Callable[..., Any]) -> None:
    model = trainer(**options(tmp_path, "sra", target="teacher", num_classes=10)).model
    theirs = checkpoint_of("sra")[0]["ema"]
    assert torch.equal(model.projector[2].weight, theirs["ap_head.linear2.weight"])


@pytest.mark.parametrize("positions", ("recompute", "interpolate"))
def test_another_latent_size_gets_positions_of_its_own(
    tmp_path: Path, trainer: Callable[..., Any], positions: str
) -> None:
    """A 4 x 4 grid's weights on 4 x 8 tokens: counted on, or twice as dense along the width."""
    run = trainer(**options(tmp_path, "repa", (4, 8, 16), init_positions=positions, num_classes=10))
    over = (4, 4) if positions == "interpolate" else None
    assert torch.equal(run.model.pos_embed[0], sincos_positions(24, (4, 8), over=over))
    theirs = convert_state_dict(checkpoint_of("repa")[0])
    dense = run.model.pos_embed.view(4, 8, 24)[:, ::2] if over else run.model.pos_embed.view(4, 8, 24)[:, :4]
    torch.testing.assert_close(dense, theirs["pos_embed"].view(4, 4, 24), rtol=0, atol=2.0**-23)
    assert torch.equal(run.model.state_dict()["blocks.0.attn.qkv.weight"], theirs["blocks.0.attn.qkv.weight"])


def test_positions_that_are_no_table_are_kept_at_their_size_and_refused_at_another(
    tmp_path: Path, trainer: Callable[..., Any]
) -> None:
    content, _ = checkpoint_of("repa")
    content["ema"]["pos_embed"] = torch.randn(1, 16, 24)
    torch.save(content, tmp_path / "own.pt")
    given = {**options(tmp_path, "repa"), "init": str(tmp_path / "own.pt")}
    assert torch.equal(trainer(**given).model.pos_embed, content["ema"]["pos_embed"])
    other = {**options(tmp_path, "repa", (4, 8, 16), init_positions="interpolate"), "init": given["init"]}
    with pytest.raises(InputError, match=r"own\.pt has positions that are not the sine-cosine table of 4x4 tokens"):
        trainer("other", **other)


def test_a_run_of_ours_is_fine_tuned_and_goes_on_bitwise(tmp_path: Path) -> None:
    """From its averages at step 0 with fresh moments; cut in two it is the run in one piece."""
    train(tiny(tmp_path / "base", steps=3))
    changes = {"init": str(tmp_path / "base"), "freeze": "blocks.0.*,x_embedder.*", "lr_scale": "blocks.*=0.5"}
    train(tiny(tmp_path / "whole", steps=4, **changes))
    train(tiny(tmp_path / "cut", steps=2, **changes))
    train(tiny(tmp_path / "cut", steps=4, **changes))
    assert_same_checkpoint(final(tmp_path / "whole", 4), final(tmp_path / "cut", 4))
    base, tuned = load_checkpoint(final(tmp_path / "base", 3)), load_checkpoint(final(tmp_path / "whole", 4))
    assert base.ema is not None and tuned.ema is not None
    for key, value in tuned.model.items():
        is_frozen = key.startswith(("blocks.0.", "x_embedder.", "pos_embed"))
        assert torch.equal(value, base.ema[key]) == is_frozen, key
        assert torch.equal(tuned.ema[key], value) or not is_frozen, key
        assert (f"{key}/exp_avg" in tuned.optimizer) == (not is_frozen), key


def test_factors_of_the_rate_are_those_of_the_pattern(tmp_path: Path, trainer: Callable[..., Any]) -> None:
    """AdamW's first update is lr times the sign of the gradient: factor 0 stands still, 0.5 goes half as far."""
    scale = "blocks.0.*=0,blocks.1.*=0.5,blocks.1.mlp.*=2"
    runs = [trainer(name, lr_scale=given, steps=1) for name, given in (("plain", None), ("scaled", scale))]
    moved = []
    for run in runs:
        before = {key: value.clone() for key, value in run.model.state_dict().items()}
        run.train()
        moved.append({key: value - before[key] for key, value in run.model.state_dict().items()})
    plain, scaled = moved
    for key, factor in {
        "blocks.0.mlp.fc1.weight": 0.0,
        "blocks.1.attn.qkv.weight": 0.5,
        "blocks.1.mlp.fc1.weight": 2.0,
        "x_embedder.proj.weight": 1.0,
    }.items():
        torch.testing.assert_close(scaled[key], factor * plain[key], rtol=1e-3, atol=1e-9)
    assert plain["x_embedder.proj.weight"].any()


def test_a_run_that_goes_on_may_take_other_factors_on_purpose(tmp_path: Path, trainer: Callable[..., Any]) -> None:
    train(tiny(tmp_path / "a", steps=2, lr_scale="blocks.0.*=0.5"))
    run = trainer("b", steps=3, lr_scale="blocks.*=0.25,projector.*=3", resume=str(tmp_path / "a"))
    assert [group.get("lr_scale", 1.0) for group in run.optimizer.param_groups] == [1.0, 0.25, 3.0]
    moments = load_checkpoint(final(tmp_path / "a", 2)).optimizer
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(run.optimizer.state[parameter]["exp_avg"], moments[f"{name}/exp_avg"]), name
    run.train()


def test_the_public_format_of_save_pretrained_and_a_single_file_of_a_run_start_one_too(
    tmp_path: Path, trainer: Callable[..., Any]
) -> None:
    train(tiny(tmp_path / "base", steps=1))
    folder = final(tmp_path / "base", 1)
    trained, averaged = folder / "model.safetensors", folder / "ema.safetensors"
    weights = load_checkpoint(folder)
    for file, want in ((trained, weights.model), (averaged, weights.ema), (folder, weights.ema)):
        assert want is not None
        model = trainer(file.name, init=str(file)).model
        assert all(torch.equal(value, want[key]) for key, value in model.state_dict().items())
    assert isinstance(open_model(folder)[0], SiT)


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"model": "24,3,3,2"}, "repa.pt has depth 2, this run 3; give --model 24,2,3,2"),
        ({"model": "24,2,3,4"}, "repa.pt has patch_size 2, this run 4; give --model 24,2,3,2"),
        ({"model": "48,2,3,2"}, "repa.pt has hidden_size 24, this run 48; give --model 24,2,3,2"),
        ({"qk_norm": True}, "repa.pt has qk_norm False, this run True; give --qk-norm as it was trained"),
        ({"init": "nowhere.pt"}, "checkpoint nowhere.pt: does not exist; give a run"),
        ({"init": "16ch"}, "has in_channels 4, this run 16; give latents with that many channels"),
        ({"freeze": "head.*"}, "--freeze head.* matches no parameter; names are as blocks.0.attn.qkv.bias"),
        ({"freeze": "*"}, "--freeze * leaves nothing to train; give narrower patterns"),
        ({"lr_scale": "blocks.*"}, "--lr-scale must be PATTERN=FACTOR,... with factors of 0 or more, got blocks.*"),
        ({"lr_scale": "blocks.*=-1"}, "with factors of 0 or more, got blocks.*=-1"),
        ({"lr_scale": "head.*=2"}, "--lr-scale head.* matches no parameter"),
        ({"resume": "runs/x"}, "--init starts a run and --resume goes on with one; give one of them"),
    ),
)
def test_what_does_not_fit_is_one_line_and_leaves_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    if changes.get("init") == "16ch":
        given = options(tmp_path, "repa", (16, 8, 8))
    else:
        given = {**options(tmp_path, "repa"), **changes}
    words = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in given.items()]
    code = main(["train", "--out", str(tmp_path / "run"), "--device", "cpu", "--precision", "fp32", *words])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and message in error, error
    assert not (tmp_path / "run").exists()


def test_what_has_no_optimizer_s_state_cannot_go_on_and_is_for_init(tmp_path: Path) -> None:
    file, _ = write_public(tmp_path, "sit")
    assert main(["convert", str(file), "--out", str(tmp_path / "sit"), "--num-heads", "3"]) == 0
    given = {**options(tmp_path, "sit", num_classes=10), "init": None, "resume": str(tmp_path / "sit")}
    with pytest.raises(InputError, match=r"choose another --resume, or start from its weights with --init"):
        train(tiny(tmp_path / "run", steps=1, **given))
    again = {**given, "init": str(tmp_path / "sit"), "resume": "auto"}
    assert train(tiny(tmp_path / "run", steps=1, **again)).step == 1


def test_latents_of_another_scale_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """REPA's are SD-VAE's, scaled by 0.18215; these are told to be scaled by 1, and then as REPA's."""
    words = "was trained on latents with another shift or scale ([0.0, 0.0, 0.0, 0.0], [0.18215, 0.18215, 0.18215"
    train(tiny(tmp_path / "other", steps=1, **options(tmp_path, "repa")))
    assert words in capsys.readouterr().out
    train(tiny(tmp_path / "same", steps=1, **options(tmp_path, "repa", latent_scale="0.18215")))
    assert "another shift or scale" not in capsys.readouterr().out
