"""A folder's lock: of one process, gone with it, and not held by what it forked."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from sra2_fast.errors import InputError, TemporaryFailure
from sra2_fast.files import FolderLock, create_folder


def test_a_folder_is_one_s_until_it_is_closed(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path, "train")
    with pytest.raises(TemporaryFailure, match=r"train: --out .* is in use by another process; choose another folder"):
        FolderLock(tmp_path, "train")
    lock.close()
    FolderLock(tmp_path, "train").close()
    with pytest.raises(InputError, match=r"prepare: --out .*none cannot be written \(No such file") as caught:
        FolderLock(tmp_path / "none", "prepare")
    assert not isinstance(caught.value, TemporaryFailure)


def hold_with_a_worker(folder: Path, told: Connection) -> None:
    lock = FolderLock(folder, "train")
    multiprocessing.get_context("fork").Process(target=stay, args=(told,)).start()
    signal.pause()
    lock.close()


def stay(told: Connection) -> None:
    told.send(os.getpid())
    signal.pause()


def test_a_killed_process_leaves_the_folder_free_though_its_workers_live_on(tmp_path: Path) -> None:
    """They had inherited the lock: the same command was refused until they noticed, up to nine seconds later."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    holder = context.Process(target=hold_with_a_worker, args=(tmp_path, there))
    holder.start()
    worker = here.recv()
    with pytest.raises(TemporaryFailure):
        FolderLock(tmp_path, "train")
    holder.kill()
    holder.join()
    try:
        os.kill(worker, 0)  # it is still there
        FolderLock(tmp_path, "train").close()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_new_folders_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the innermost's contents were flushed: after a power cut the folders above it could be gone."""
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    create_folder(tmp_path / "a" / "b")
    assert set(flushed) == {str(tmp_path), str(tmp_path / "a")}
    flushed.clear()
    create_folder(tmp_path / "a" / "b")
    assert not flushed
