"""What overlaps in `sra2-fast prepare`: encoding, fetching, adding and writing, and Ctrl-C at each of their seams."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import command, contents

from sra2_fast.cli import main
from sra2_fast.prepare import encode as encode_module
from sra2_fast.prepare.shard_work import ShardWork
from sra2_fast.vae.autoencoder import encode

pytest.importorskip("PIL.Image")
pytest.importorskip("diffusers")
pytest_plugins = ["photos"]
BATCHES = 8  # of 2, in shards of 5, 5 and 4


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """late(stop_at, error): batches are encoded when they are fetched, as if by a GPU; a log of what happened when."""

    def install(stop_at: int = 0, error: type[BaseException] = KeyboardInterrupt) -> list[str]:
        log: list[str] = []
        started = 0

        def start(vae: torch.nn.Module, pixels: torch.Tensor, precision: str) -> Callable[[], np.ndarray]:
            nonlocal started
            started += 1
            number = started
            log.append(f"start {number}")

            def results() -> np.ndarray:
                log.append(f"fetch {number}")
                if number == stop_at:
                    raise error
                return encode(vae, pixels, precision)

            return results

        monkeypatch.setattr(encode_module, "start_encoding", start)
        return log

    return install


def test_a_batch_is_started_before_the_last_one_is_fetched(
    photos: Path, vae_path: Path, whole: Path, tmp_path: Path, late: Callable[..., list[str]]
) -> None:
    log = late()
    assert main(command(photos, vae_path, tmp_path / "out")) == 0
    assert contents(tmp_path / "out") == contents(whole)
    assert log.index("start 2") < log.index("fetch 1") < log.index("start 3") < log.index("fetch 2")
    assert [entry for entry in log if "fetch" in entry] == [f"fetch {number}" for number in range(1, BATCHES + 1)]


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5, BATCHES])
def test_ctrl_c_while_waiting_for_a_batch(
    photos: Path,
    vae_path: Path,
    whole: Path,
    tmp_path: Path,
    late: Callable[..., list[str]],
    stop_at: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The batch after it was started too; added in its place, it would shift all latents behind it to other images."""
    late(stop_at)
    assert main(command(photos, vae_path, tmp_path / "out")) == 130
    said = re.search(r"interrupted with (\d+) of 14 images encoded", capsys.readouterr().err)
    assert said and int(said[1]) == sum((2, 2, 1, 2, 2, 1, 2, 2)[: stop_at - 1])
    late()
    assert main(command(photos, vae_path, tmp_path / "out")) == 0
    assert contents(tmp_path / "out") == contents(whole)


def test_ctrl_c_right_after_a_batch_was_added(
    photos: Path,
    vae_path: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is not added twice, and the one that was started is not lost."""
    add, calls = ShardWork.add, []

    def interrupted(work: ShardWork, piece: object) -> None:
        add(work, piece)  # type: ignore[arg-type]
        calls.append(piece)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardWork, "add", interrupted)
        assert main(command(photos, vae_path, tmp_path / "out")) == 130
    assert "interrupted with 9 of 14 images encoded" in capsys.readouterr().err  # and the one that was started
    assert main(command(photos, vae_path, tmp_path / "out")) == 0
    assert contents(tmp_path / "out") == contents(whole)


def test_a_shard_is_written_while_the_next_one_is_encoded(
    photos: Path,
    vae_path: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    late: Callable[..., list[str]],
) -> None:
    finish, begin, next_begun = ShardWork.finish, ShardWork.begin, threading.Event()

    def waiting(work: ShardWork) -> object:
        assert work.job.number != 0 or next_begun.wait(20), "the first shard was written before the second was begun"
        return finish(work)

    def beginning(work: ShardWork, batch_size: int) -> object:
        if work.job.number == 1:
            next_begun.set()
        return begin(work, batch_size)

    monkeypatch.setattr(ShardWork, "finish", waiting)
    monkeypatch.setattr(ShardWork, "begin", beginning)
    assert main(command(photos, vae_path, tmp_path / "out")) == 0
    assert contents(tmp_path / "out") == contents(whole)


def test_the_bar_says_images_a_second_and_what_is_left(
    photos: Path, vae_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(photos, vae_path, tmp_path / "out")) == 0
    last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert re.search(r"encoding: 100%\|.*\| 14/14 \[\d\d:\d\d, \d\d:\d\d left, +[\d.]+ images/s\]", last), last
