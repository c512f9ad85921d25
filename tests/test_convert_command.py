"""`sra2-fast convert`: what it writes is a run of ours, or a file that the public scripts open."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from public_checkpoints import checkpoint_of, write_public
from recorded.recording import assert_same
from safetensors.torch import load_file
from test_shapes import write_vae_sd
from training_runs import final, tiny

from sra2_fast import SiT, convert, convert_state_dict, load_checkpoint, open_model
from sra2_fast.checkpoints import sources
from sra2_fast.cli import main
from sra2_fast.compat import repa
from sra2_fast.train import train

pytestmark = pytest.mark.training

OF_SRA = {"model": "24,3,3,2", "target": "teacher", "align_depth": 2, "label_dropout": 0.1, "num_classes": 10}


def run(*words: object) -> int:
    return main(["convert", *map(str, words), "--num-heads", "3"])


def test_the_command_and_the_library_name_the_same_repositories() -> None:
    assert {*convert.SOURCES} == {"auto", *sources.SOURCES} and {*convert.LAYOUTS} == {*sources.LAYOUTS}


@pytest.mark.parametrize("name", ("sit", "repa", "repa_e", "lightningdit"))
def test_a_converted_checkpoint_is_a_run(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file, recording = write_public(tmp_path, name)
    assert run(file, "--out", tmp_path / "run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert ": 24," in lines[0] and f"of {name.replace('_', '-')}, 10 classes" in lines[0]
    model, opened = open_model(tmp_path / "run")
    direct, of_file = open_model(file, num_heads=3)
    assert model.config() == direct.config() and opened.latents == of_file.latents
    assert (opened.step, opened.path, opened.weights) == (of_file.step, "linear", "ema")
    for key, value in model.state_dict().items():
        assert torch.equal(value, direct.state_dict()[key]), key
    checkpoint = load_checkpoint(opened.file)
    assert checkpoint.ema is not None and not torch.equal(checkpoint.ema["pos_embed"], checkpoint.model["pos_embed"])
    assert bool(checkpoint.optimizer) == (name in ("repa", "repa_e"))
    assert checkpoint.state["converted_from"] == {"file": f"{name}.pt", "source": name.replace("_", "-")}
    assert recording.config["hidden_size"] == model.hidden_size


@pytest.mark.training
def test_a_run_of_sra_goes_on_with_its_averages_and_moments(tmp_path: Path) -> None:
    """From step 400, its own count, with its betas; a fresh optimizer would have the moments of one gradient."""
    file, _ = write_public(tmp_path, "sra")
    assert run(file, "--out", tmp_path / "converted") == 0
    data = write_vae_sd(tmp_path, (4, 8, 8))
    options = {**OF_SRA, "data": str(data), "latent_scale": "1", "resume": str(tmp_path / "converted"), "lr": 1e-12}
    assert train(tiny(tmp_path / "run", steps=401, **options)).step == 401
    after = load_checkpoint(final(tmp_path / "run", 401))
    content, _ = checkpoint_of("sra")
    names = list(content["model"])
    assert after.ema is not None
    for key, public in (("projector.0.weight", "ap_head.linear1.weight"), ("blocks.2.mlp.fc2.bias",) * 2):
        moments = content["opt"]["state"][names.index(public)]
        assert float(after.optimizer[f"{key}/step"]) == 401
        # v' = 0.95 v + 0.05 g^2 with |g| at most 1 (clipped), and the weights hardly move at this rate
        kept = 0.95 * moments["exp_avg_sq"].double()
        assert ((after.optimizer[f"{key}/exp_avg_sq"] - kept).abs() <= 0.05 + 1e-6 * kept).all(), key
        torch.testing.assert_close(after.model[key], content["model"][public])
        decay = 402 / 411  # min(0.9999, (1 + step) / (10 + step)) at step 401
        want = decay * content["ema"][public] + (1 - decay) * content["model"][public]
        torch.testing.assert_close(after.ema[key], want)


def test_back_to_files_of_the_public_scripts(tmp_path: Path) -> None:
    """A run of ours as SiT's `find_model` and REPA's generate.py read it: torch.load(...)["ema"]."""
    file, recording = write_public(tmp_path, "repa")
    assert run(file, "--out", tmp_path / "run") == 0
    for layout, out in (("repa", "repa-again.pt"), ("sit", "sit.pt"), ("sit", "sit.safetensors")):
        assert run(tmp_path / "run", "--to", layout, "--out", tmp_path / out) == 0
    content = torch.load(tmp_path / "repa-again.pt", weights_only=True)
    original = checkpoint_of("repa")[0]
    for which in ("ema", "model"):
        assert content[which].keys() == {k for k in original[which] if not k.startswith("projectors.1.")}
        assert all(torch.equal(value, original[which][key]) for key, value in content[which].items())
    assert content["steps"] == 400
    repa.SiT(**{**recording.config, "z_dims": [20]}).load_state_dict(content["ema"], strict=True)
    public = SiT(8, 2, 4, 24, 2, 3, num_classes=10)  # as SiT's class is by default: with sigma channels
    public.load_state_dict(torch.load(tmp_path / "sit.pt", weights_only=True)["ema"], strict=True)
    with torch.no_grad():
        velocity = public.eval()(recording["x"], 1 - recording["t"], recording["y"])
    assert_same(-velocity, recording["velocity_eval"], "velocity")
    bare = load_file(tmp_path / "sit.safetensors")
    assert all(torch.equal(bare[key], value) for key, value in public.state_dict().items())


def test_a_converted_public_file_converts_to_the_other_public_layout(tmp_path: Path) -> None:
    file, _ = write_public(tmp_path, "sit")
    assert run(file, "--to", "repa", "--out", tmp_path / "as-repa.safetensors") == 0
    want = convert_state_dict(checkpoint_of("sit")[0], to="repa")
    got = load_file(tmp_path / "as-repa.safetensors")
    assert got.keys() == want.keys() and all(torch.equal(got[key], value) for key, value in want.items())


def complaint(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that the command says, with exit code 2."""
    assert main(["convert", *map(str, words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sra2-fast convert: ") and error.count("\n") == 1
    return error


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


class Evil:
    def __reduce__(self) -> Any:
        return (os.system, ("echo code ran",))


def test_a_pickle_with_code_is_refused_by_the_name_of_what_it_wants(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content, _ = checkpoint_of("repa")
    file = save(tmp_path / "evil.pt", {**content, "extra": Evil()})
    said = complaint(capfd, file, "--out", tmp_path / "run")
    assert "evil.pt" in said and "wants to run posix.system" in said and "save its tensors alone" in said
    other = save(tmp_path / "path.pt", {**content, "args": Path("x")})
    assert "pathlib" in complaint(capfd, other, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_code_would_run_if_it_were_opened_as_pickle(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.load(save(tmp_path / "evil.pt", Evil()), weights_only=False)
    assert capfd.readouterr().out == "code ran\n"


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    (
        ("sit", {"args": {"path_type": "VP"}}, "trained on the path VP; only the linear and the GVP (cosine) path"),
        (
            "sit",
            {"args": {"path_type": "Linear", "prediction": "noise"}},
            "predicts noise; only models of the",
        ),
        ("sit", {"args": {"path_type": "Linear", "num_classes": 7}}, "has 11 labels, which are not 7 classes"),
        ("repa", {"args": {"num_classes": 12}}, "has 11 labels, which are not 12 classes"),
        ("sit_one_channel", {"args": {}}, "look alike, and time runs the other way in one of them"),
        ("lightningdit", {"config": {}}, "look alike, and time runs the other way in one of them"),
        ("lightningdit", {"config": {"transport": {"path_type": "VP"}}}, "trained on the path VP"),
    ),
)
def test_another_convention_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, change: dict[str, Any], expected: str
) -> None:
    content, _ = checkpoint_of(name)
    file = save(tmp_path / "x.pt", {**content, **change})
    assert expected in complaint(capsys, file, "--out", tmp_path / "run", "--num-heads", 3)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("part", "option"),
    (
        ("feat_rope.freqs_cos", "use_rope"),
        ("blocks.0.mlp.w12.weight", "use_swiglu"),
        ("blocks.1.norm1.weight", "use_rmsnorm"),
    ),
)
def test_what_only_lightningdit_has_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, option: str
) -> None:
    content, _ = checkpoint_of("lightningdit")
    content["ema"][part] = content["model"][part] = torch.ones(3)
    said = complaint(capsys, save(tmp_path / "x.pt", content), "--out", tmp_path / "run")
    assert f"SiT has no {part}; of LightningDiT only models without {option} can be converted" in said


def test_lightningdit_without_shifts_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, _ = checkpoint_of("lightningdit")
    for state in (content["ema"], content["model"]):
        for key in [key for key in state if "blocks" in key and "adaLN" in key]:
            state[key] = state[key][: 4 * 24]
    said = complaint(capsys, save(tmp_path / "x.pt", content), "--out", tmp_path / "run")
    assert "blocks.0.adaLN_modulation.1.weight has 96 rows where SiT has 6 D = 144" in said and "wo_shift" in said


def spoiled(change: Any) -> Any:
    content, _ = checkpoint_of("repa")
    for state in (content["ema"], content["model"]):
        change(state)
    return content


@pytest.mark.parametrize(
    ("content", "expected"),
    (
        ([1, 2], "holds list, not weights; give a state dict"),
        ({"epoch": 3}, 'no weights under "ema", "model" or "state_dict" (it holds epoch)'),
        ({"model": {"a": 3}}, "model['a'] is no tensor"),
        ({0: torch.ones(1)}, 'no weights under "ema", "model" or "state_dict" (it holds 0)'),
        ({"ema": {0: torch.ones(1)}}, "ema[0] is no tensor"),
        (
            spoiled(lambda s: s.update(projectors=torch.ones(2), ap_head=torch.ones(2))),
            "ap_head is (2,) there and absent",
        ),
        ({"model": {"conv.weight": torch.ones(3)}}, "is no SiT, which has pos_embed"),
        (spoiled(lambda s: s.pop("blocks.1.attn.qkv.bias")), "blocks.1.attn.qkv.bias is absent there and (72,) in"),
        (spoiled(lambda s: s.update(extra=torch.ones(2))), "extra is (2,) there and absent in a SiT of these sizes"),
        (
            spoiled(lambda s: s["blocks.0.mlp.fc1.weight"].fill_(torch.nan)),
            "NaN or infinity in blocks.0.mlp.fc1",
        ),
        (spoiled(lambda s: s.update(pos_embed=torch.ones(1, 15, 24))), "15 positions are no square"),
        (spoiled(lambda s: s.update(pos_embed=torch.ones(3))), "pos_embed has 3 dimensions and not 1"),
    ),
)
def test_what_is_no_sit_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, expected: str
) -> None:
    said = complaint(capsys, save(tmp_path / "x.pt", content), "--out", tmp_path / "run", "--num-heads", 3)
    assert f"{tmp_path / 'x.pt'}: " in said and expected in said
    assert not (tmp_path / "run").exists()


def test_files_that_are_none_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", tmp_path / "run")
    (tmp_path / "empty").mkdir()
    assert "empty: is a folder that holds no checkpoint" in complaint(capsys, tmp_path / "empty", *out)
    assert "none.pt: does not exist; give a run" in complaint(capsys, tmp_path / "none.pt", *out)
    file, _ = write_public(tmp_path, "repa")
    whole = file.read_bytes()
    for name, content in (("cut.pt", whole[: len(whole) // 2]), ("zero.pt", b""), ("text.pt", b"hello\nworld\n")):
        (tmp_path / name).write_bytes(content)
        assert f"{name}: cannot be read (" in complaint(capsys, tmp_path / name, *out)
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    assert "cut.safetensors: cannot be read (" in complaint(capsys, tmp_path / "cut.safetensors", *out)
    assert not (tmp_path / "run").exists()


def test_options_that_do_not_fit_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, _ = write_public(tmp_path, "repa")
    heads = ("--num-heads", 3)
    out = ("--out", tmp_path / "run")
    told = complaint(capsys, file, *out)
    assert "2 blocks of width 24 are no public size, so say the heads (sra2-fast convert --num-heads)" in told
    for heads_given, words in (
        (5, "hidden_size must be divisible by num_heads = 5"),
        (0, "num_heads must be a positive"),
    ):
        said = complaint(capsys, file, *out, "--num-heads", heads_given)
        assert f"checkpoint {file}: SiT: " in said and words in said
    assert "has 11 labels, which are not 0 classes" in complaint(capsys, file, *out, *heads, "--num-classes", 0)
    assert "is of repa, where time runs the other way than in sit" in complaint(
        capsys, file, *out, *heads, "--source", "sit"
    )
    assert "align_depth must be None or a block from 1 to depth = 2" in complaint(
        capsys, file, *out, *heads, "--align-depth", 3
    )
    assert "--input-size must be a number" in complaint(capsys, file, *out, "--input-size", "8x8")
    assert "must end in .pt or .safetensors for --to sit" in complaint(capsys, file, *out, *heads, "--to", "sit")
    assert main(["convert", str(file), "--out", str(tmp_path / "run"), "--num-heads", "3"]) == 0
    capsys.readouterr()
    assert "is of ours already; give --to sit or --to repa" in complaint(
        capsys, tmp_path / "run", "--out", tmp_path / "other"
    )
    assert "already holds a run; choose another folder" in complaint(capsys, file, *out, *heads)
    (tmp_path / "there.pt").write_bytes(b"mine")
    said = complaint(capsys, file, "--out", tmp_path / "there.pt", *heads, "--to", "sit")
    assert "there.pt exists; choose another file" in said and (tmp_path / "there.pt").read_bytes() == b"mine"


def test_an_optimizer_that_does_not_fit_is_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, _ = checkpoint_of("repa")
    content["opt"]["param_groups"][0]["params"].pop()
    assert run(save(tmp_path / "x.pt", content), "--out", tmp_path / "run") == 0
    parameters = len(content["model"])
    said = f"without the optimizer's state (the optimizer's state has [{parameters - 1}] parameters, the model"
    assert said in capsys.readouterr().out
    state = json.loads((tmp_path / "run/checkpoints/step-00000400/state.json").read_text())
    assert "optimizer" not in state


@pytest.mark.parametrize("out", ("x.pt", "x.safetensors", "run"))
def test_a_disk_that_is_full_is_named_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    file, _ = write_public(tmp_path, "repa")
    before = {path.name for path in tmp_path.iterdir()}

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    for module in ("writing", "training"):
        monkeypatch.setattr(f"sra2_fast.checkpoints.{module}.fsync", full)
    to = () if out == "run" else ("--to", "repa")
    said = complaint(capsys, file, "--out", tmp_path / out, "--num-heads", 3, *to)
    assert "No space left on device" in said and str(tmp_path / out) in said and "choose another --out" in said
    assert not list(tmp_path.rglob("*.partial")) and {path.name for path in tmp_path.iterdir()} - {"run"} == before


def test_ctrl_c_while_writing_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = write_public(tmp_path, "repa")

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sra2_fast.checkpoints.writing.fsync", interrupted)
    assert run(file, "--to", "repa", "--out", tmp_path / "x.pt") == 130
    assert [path.name for path in tmp_path.iterdir()] == ["repa.pt"]
