"""`sra2-fast sample`: what it writes, that an image depends on its number alone, and that it goes on after any end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photos import save_vae
from sampled import BATCH, COUNT, DIGITS, GUIDED, arrays, command, contents, noise_of, png, sample, save_run

from sra2_fast import SiT, load_checkpoint, sample_ode, sample_sde
from sra2_fast.cli import main
from sra2_fast.randomness import Stream, normal
from sra2_fast.sample import command as sample_command
from sra2_fast.vae.autoencoder import load_vae

pytest_plugins = ["sampled"]
ROUNDED = 1  # levels by which a pixel may differ where the latent differs by a rounding


def model_of(run: Path, weights: str = "ema") -> SiT:
    checkpoint = load_checkpoint(run / "checkpoints" / "step-00000005", weights_only=True)
    model = SiT(**checkpoint.state["model"]).eval()
    model.load_state_dict(getattr(checkpoint, weights))
    return model


def grey(latents: torch.Tensor) -> np.ndarray:
    """z (n, 1, H, W) as the run's digits are shown."""
    levels = (latents / DIGITS["scale"][0] + DIGITS["shift"][0]) * 255 / DIGITS["white"]
    return levels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_it_writes_images_a_grid_and_the_arrays_of_the_adm_suite(whole_sampled: Path) -> None:
    found = arrays(whole_sampled)
    assert found["arr_0"].shape == (COUNT, 8, 8, 3) and found["arr_0"].dtype == np.uint8
    assert found["arr_1"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in (whole_sampled / "images").iterdir()) == [f"{i:06d}.png" for i in range(COUNT)]
    for index, image in enumerate(found["arr_0"]):
        assert np.array_equal(png(whole_sampled / "images" / f"{index:06d}.png"), image)
    assert len({image.tobytes() for image in found["arr_0"]}) == COUNT
    assert png(whole_sampled / "grid.png").shape == (68, 7 * 68, 3)


def test_the_images_are_the_samplers(run: Path, whole_sampled: Path) -> None:
    labels = torch.arange(COUNT)
    guided: dict[str, Any] = {"steps": 4, "cfg_scale": 2.0, "guidance_interval": (0.1, 0.8)}
    made = sample_ode(model_of(run), noise_of(list(range(COUNT))), labels, **guided)
    assert difference(grey(made), arrays(whole_sampled)["arr_0"]) <= ROUNDED


def test_the_sde_draws_by_image_and_step(run: Path, tmp_path: Path) -> None:
    indices = list(range(COUNT))
    made = sample_sde(
        model_of(run),
        noise_of(indices),
        torch.arange(COUNT),
        steps=4,
        step_noise=lambda step: torch.from_numpy(normal(Stream.SAMPLING_STEP, 0, step, indices, (1, 8, 8))),
    )
    assert difference(grey(made), sample(run, tmp_path / "a", "--method", "sde")) <= ROUNDED


@pytest.mark.parametrize("method", ["euler", "heun", "sde", "dopri5"])
def test_an_image_is_the_same_in_any_batch(run: Path, tmp_path: Path, method: str) -> None:
    """Of dopri5, which chooses its steps for a batch, at its default tolerance."""

    def made_in(size: str, *more: str) -> np.ndarray:
        words = command(run, tmp_path / "".join((size, *more)), "--method", method, "--labels", "random", *more)
        steps = words.index("--steps")
        del words[steps : steps + 2 * (method == "dopri5")]
        assert main([*words, *GUIDED, "--batch-size", size]) == 0
        return arrays(tmp_path / "".join((size, *more)))["arr_0"]

    one = made_in("1")
    assert max(difference(one, made_in(size)) for size in ("3", "16")) <= ROUNDED
    other_seed = made_in("3", "--seed", "1")
    assert difference(one, other_seed) > 50


def test_dopri5_needs_no_steps_and_agrees_with_many_of_euler(run: Path, tmp_path: Path) -> None:
    words = [word for word in command(run, tmp_path / "a", "--method", "dopri5") if word not in ("--steps", "4")]
    assert main(words) == 0
    many = sample(run, tmp_path / "b", "--method", "heun", "--steps", "100")
    assert difference(arrays(tmp_path / "a")["arr_0"], many) <= 2


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.mark.parametrize("moment", range(11))
def test_killed_at_any_write_it_ends_with_the_same_bytes(
    run: Path, whole_sampled: Path, tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each rename of a file into place: the plan, seven images, the grid and the arrays; and after them."""
    left = moment
    rename = os.replace

    def replace(source: Any, target: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        rename(source, target)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        patch.setattr(Path, "rename", lambda source, target: replace(source, target))
        patch.setattr(sample_command, "PNG_THREADS", 1)
        if moment < 10:
            with pytest.raises(Killed):
                main(command(run, out, *GUIDED))
        else:
            assert main(command(run, out, *GUIDED)) == 0
    assert main(command(run, out, *GUIDED)) == 0
    assert contents(out) == contents(whole_sampled)


@pytest.mark.slow
def test_kill_9_costs_the_images_under_way(run: Path, tmp_path: Path, root: Path) -> None:
    more = (*GUIDED, "--steps", "30", "--batch-size", "1")
    whole, out = tmp_path / "whole", tmp_path / "out"
    sample(run, whole, *more)
    process = subprocess.Popen(
        [sys.executable, "-m", "sra2_fast.sample", *command(run, out, *more)[1:]], cwd=root, stderr=subprocess.PIPE
    )
    first = out / "images" / "000000.png"
    for _ in range(6000):
        if first.exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it was killed"
    kept = first.stat().st_mtime_ns
    sample(run, out, *more)
    assert contents(out) == contents(whole) and first.stat().st_mtime_ns == kept


def test_a_complete_folder_draws_nothing(
    run: Path, whole_sampled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(whole_sampled)
    monkeypatch.setattr("sra2_fast.sample.draw.sample_ode", None)
    assert main(command(run, whole_sampled, *GUIDED)) == 0
    assert "already complete" in capsys.readouterr().out and contents(whole_sampled) == before


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-20])])
def test_an_image_that_is_gone_or_cut_short_is_drawn_again(
    run: Path, whole_sampled: Path, tmp_path: Path, harm: Callable[[Path], object]
) -> None:
    out = tmp_path / "out"
    sample(run, out, *GUIDED)
    harm(out / "images" / "000004.png")
    sample(run, out, *GUIDED)
    assert contents(out) == contents(whole_sampled)


def test_more_images_are_added_to_those_that_are_there(run: Path, tmp_path: Path) -> None:
    few, many = (sample(run, tmp_path / "a", "--num-images", count) for count in ("4", "12"))
    assert np.array_equal(many[:4], few) and len(many) == 12
    assert difference(many, sample(run, tmp_path / "b", "--num-images", "12")) <= ROUNDED
    assert np.array_equal(sample(run, tmp_path / "a", "--num-images", "4"), few)


def test_labels_are_balanced_random_or_given(run: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", np.array([9, 8]))
    (tmp_path / "labels.txt").write_text("5\n5\n6\n")
    found = {}
    for given in ("balanced", "random", "3,1", str(tmp_path / "labels.npy"), str(tmp_path / "labels.txt")):
        out = tmp_path / f"of-{Path(given).name}"
        sample(run, out, "--labels", given, "--num-images", "12", "--steps", "1")
        found[Path(given).name] = arrays(out)["arr_1"].tolist()
    assert found["balanced"] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert len(set(found["random"])) > 4 and set(found["random"]) <= set(range(10))
    assert found["3,1"] == [3, 1] * 6
    assert found["labels.npy"] == [9, 8] * 6 and found["labels.txt"] == [5, 5, 6] * 4
    sample(run, tmp_path / "longer", "--labels", "random", "--num-images", "20", "--steps", "1")
    assert arrays(tmp_path / "longer")["arr_1"][:12].tolist() == found["random"]


def test_trained_weights_are_others_than_averaged_ones(run: Path, whole_sampled: Path, tmp_path: Path) -> None:
    made = sample(run, tmp_path / "a", "--weights", "model")
    labels = torch.arange(COUNT)
    expected = sample_ode(model_of(run, "model"), noise_of(list(range(COUNT))), labels, steps=4)
    assert difference(made, grey(expected)) <= ROUNDED


def test_latents_go_through_the_vae_they_were_made_with(tmp_path: Path) -> None:
    vae = save_vae(tmp_path / "vae")
    latents = {"kind": "vae", "shift": [0.1] * 4, "scale": [0.5] * 4, "vae": str(vae)}
    run = save_run(tmp_path / "run", latents, in_channels=4)
    made = sample(run, tmp_path / "out")
    z = sample_ode(model_of(run), noise_of(list(range(COUNT)), (4, 8, 8)), torch.arange(COUNT), steps=4)
    with torch.no_grad():
        pixels = load_vae(str(vae)).decode(z / 0.5 + 0.1).sample
    expected = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert made.shape == (COUNT, 32, 32, 3) and difference(made, expected) <= ROUNDED


def test_bf16_is_near_fp32_and_another_plan(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fp32 = sample(run, tmp_path / "a", *GUIDED).astype(float)
    bf16 = sample(run, tmp_path / "b", *GUIDED, "--precision", "bf16").astype(float)
    assert 0 < np.abs(bf16 - fp32).mean() < 3
    assert main(command(run, tmp_path / "a", *GUIDED, "--precision", "bf16")) == 2
    assert "holds other samples (precision fp32 -> bf16)" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_images_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and left to PyTorch's own code; the last batch of one is filled up, so that nothing compiles for it."""
    sizes = []
    compile_with = torch.compile

    def compile_quickly(part: Any, **options: Any) -> Any:
        def call(*args: Any) -> Any:
            sizes.append(len(args[0] if isinstance(args[0], torch.Tensor) else args[0][0]))
            return compiled(*args)

        compiled = compile_with(part, backend="aot_eager", fullgraph=True)
        return call

    run = save_run(tmp_path / "run", depth=1)
    plain = sample(run, tmp_path / "plain", *GUIDED)
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", compile_quickly)
    assert difference(sample(run, tmp_path / "compiled", *GUIDED, "--compile"), plain) <= ROUNDED
    assert set(sizes) == {BATCH, 2 * BATCH}


def test_the_bar_has_images_a_second(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample(run, tmp_path / "a")
    out, err = capsys.readouterr()
    assert " images/s" in err and f"{COUNT}/{COUNT}" in err
    assert out.startswith(f"{COUNT} images in {tmp_path / 'a' / 'images'} (") and " images/s)" in out


def test_ctrl_c_says_how_to_go_on(
    run: Path, whole_sampled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sra2_fast.sample.draw import ImageDrawer

    drawn = ImageDrawer.__call__

    def call(self: ImageDrawer, indices: np.ndarray) -> np.ndarray:
        if indices[0] > 0:
            raise KeyboardInterrupt
        return drawn(self, indices)

    with monkeypatch.context() as patch:
        patch.setattr(ImageDrawer, "__call__", call)
        assert main(command(run, tmp_path / "a", *GUIDED)) == 130
    assert f"interrupted with {BATCH} of {COUNT} images there; run the same command again" in capsys.readouterr().err
    sample(run, tmp_path / "a", *GUIDED)
    assert contents(tmp_path / "a") == contents(whole_sampled)
