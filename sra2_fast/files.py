"""Writing a file whole or not at all (under another name, fsynced, renamed), and folders that one process uses."""

from __future__ import annotations

import contextlib
import fcntl
import os
import weakref
from pathlib import Path

from .errors import InputError, TemporaryFailure

PARTIAL = ".partial"
LOCK_FILE = ".lock"


class FolderLock:
    """`folder` for this process alone, from here until `close()` or the end of the process, however it ends.

    Processes that are forked from it do not hold it: a worker that outlives a killed run would keep the next one out.
    op: the command, for messages. Where the file system has no locks nothing is locked.
    Raises TemporaryFailure where another process has it, InputError where the folder cannot be written.
    """

    def __init__(self, folder: Path, op: str) -> None:
        self.path = folder / LOCK_FILE
        try:
            self._file = open(self.path, "w")  # noqa: SIM115 - held as long as the lock
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"{op}: --out {folder} cannot be written ({reason}); choose another folder") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise TemporaryFailure(
                f"{op}: --out {folder} is in use by another process; choose another folder, or wait for it"
            ) from error
        except OSError:
            pass
        _held.add(self)

    def close(self) -> None:
        self._file.close()


_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _leave_locks_to_the_parent() -> None:
    for lock in list(_held):
        lock.close()  # this process's copy of the open file; the parent's keeps the lock


os.register_at_fork(after_in_child=_leave_locks_to_the_parent)


def write_whole(path: Path, *parts: bytes | memoryview, op: str = "data") -> None:
    """Write the bytes of `parts` to `path`; after a kill or on a full disk it is the old file or the new one.

    op: begins the message.
    Raises InputError naming `path` and the reason; then nothing of the new file is left.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        fsync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise InputError(
            f"{op}: cannot write {path} ({error.strerror or error}); make room or choose a folder that can be written, "
            "then run the same command again (what is finished is kept)"
        ) from error


def make_folder(path: Path) -> None:
    """Create `path` and prove that files can be made in it. Raises InputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable{PARTIAL}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"data: cannot write into {path} ({error.strerror or error}); choose another --out") from error


def create_folder(path: Path) -> None:
    """`mkdir -p` whose new folders are still there after a power cut. Raises OSError."""
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync(folder.parent)


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk; a rename is only durable once its folder is. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
