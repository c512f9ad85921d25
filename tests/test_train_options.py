"""Options: declared once, read from TOML and the command line, and refused in one line."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from sra2_fast.errors import InputError
from sra2_fast.train.options import TrainOptions, add_arguments, read_config, read_options


def parse(*words: str) -> TrainOptions:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return read_options(parser.parse_args(words))


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return str(path)


def test_defaults_are_the_papers() -> None:
    options = parse("--out", "runs/a")
    assert (options.batch_size, options.lr, options.weight_decay) == (256, 1e-4, 0.0)
    assert (options.ema_decay, options.max_grad_norm, options.label_dropout) == (0.9999, 1.0, 0.1)
    assert (options.align, options.target, options.path, options.time) == ("cosine", "vae", "linear", "uniform")
    assert (options.resume, options.precision, options.compile) == ("auto", "auto", None)


def test_the_command_line_beats_the_file_and_the_file_beats_the_default(tmp_path: Path) -> None:
    config = write(tmp_path, 'lr = 1\nbatch-size = 7\nout = "runs/b"\ncompile = true\nalign_depth = 3\n')
    options = parse("--config", config, "--batch-size", "9", "--no-compile")
    assert (options.lr, options.batch_size, options.compile, options.align_depth) == (1.0, 9, False, 3)
    assert isinstance(options.lr, float) and options.out == "runs/b" and options.steps == 400_000


@pytest.mark.parametrize("name", ["digits", "sit-b2", "sit-l2", "sit-xl2"])
def test_every_shipped_configuration_is_valid(root: Path, name: str) -> None:
    options = parse("--config", str(root / "configs" / f"{name}.toml"), "--out", "runs/x")
    assert options.align == "cosine"
    if name != "digits":
        assert (options.batch_size, options.lr, options.ema_decay) == (256, 1e-4, 0.9999)
        assert options.model.lower().replace("/", "") == name
        assert options.align_weight is None  # or --align smooth_l1 would run with the cosine's 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate = 1", r"run\.toml: unknown option 'learning_rate'"),
        ("batchsize = 1", r"unknown option 'batchsize'; did you mean batch_size\?"),
        ("steps = 1.5", r"steps must be a whole number, got 1\.5"),
        ("steps = true", r"steps must be a whole number, got True"),
        ('lr = "fast"', r"lr must be a number, got 'fast'"),
        ("compile = 1", r"compile must be true or false, got 1"),
        ('align = "dot"', r"align must be one of cosine, smooth_l1, mse, l1, none, got 'dot'"),
        ("lr = ", r"not valid TOML"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_config(write(tmp_path, text))
    assert str(caught.value).startswith(f"train: --config {tmp_path}")


@pytest.mark.parametrize(("written", "text"), [("0.5", "0.5"), ("[0.1, -2]", "0.1,-2"), ('"0.1,-2"', "0.1,-2")])
def test_a_file_may_give_numbers_of_channels_as_numbers(tmp_path: Path, written: str, text: str) -> None:
    """latent_scale = 0.5 was refused: "must be text"."""
    assert read_config(write(tmp_path, f"latent_scale = {written}")) == {"latent_scale": text}


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"run\.toml: not valid TOML"):
        read_config(tmp_path / "run.toml")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(InputError, match=r"--config absent\.toml: No such file"):
        parse("--config", "absent.toml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], r"--steps must be at least 1, got 0"),
        (["--batch-size", "-1"], r"--batch-size must be from 1 to 1,000,000, got -1"),
        (["--lr-warmup", "-1"], r"--lr-warmup must be 0 or more, got -1"),
        (["--workers", "-1"], r"--workers must be 0 or more, got -1"),
        (["--label-dropout", "1"], r"--label-dropout must be at least 0 and below 1, got 1\.0"),
        (["--lr", "nan"], r"--lr must be above 0, got nan"),
        (["--align-weight", "nan"], r"--align-weight must be a finite number, got nan"),
        (["--align-tokens", "0"], r"--align-tokens must be above 0 and at most 1, got 0\.0"),
        (["--align-tokens", "1.1"], r"--align-tokens must be above 0 and at most 1, got 1\.1"),
        (["--align-tokens", "nan"], r"--align-tokens must be above 0 and at most 1, got nan"),
        (["--beta", "inf"], r"--beta must be a finite number, got inf"),
        (["--seed", str(2**64)], r"--seed must be from 0 to 2\^64 - 1, got 18446744073709551616"),
        (["--align-depth", "0"], r"--align-depth must be at least 1, got 0"),
        (["--align-schedule-steps", "0"], r"--align-schedule-steps must be at least 1, got 0"),
        (["--align-schedule", "stop"], r"--align-schedule stop needs --align-schedule-steps"),
        (
            ["--align-schedule-steps", "5"],
            r"--align-schedule-steps is for --align-schedule linear or stop",
        ),
        (["--teacher-depth", "2"], r"--teacher-depth is for --target teacher, not vae"),
    ],
)
def test_a_value_out_of_range_names_its_option(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse("--out", "runs/a", *words)


def test_without_a_folder_nothing_runs() -> None:
    with pytest.raises(InputError, match=r"--out is missing"):
        parse()


def test_python_callers_get_the_same_checks() -> None:
    with pytest.raises(ValueError, match=r"--batch-size must be a whole number, got '8'"):
        TrainOptions(out="runs/a", batch_size="8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"--align must be one of cosine"):
        TrainOptions(out="runs/a", align="dot")  # type: ignore[arg-type]
