"""Writing a file whole or not at all: under another name, fsynced, renamed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from .errors import InputError

PARTIAL = ".partial"


def write_whole(path: Path, *parts: bytes | memoryview) -> None:
    """Write the bytes of `parts` to `path`; after a kill or on a full disk it is the old file or the new one.

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
            f"data: cannot write {path} ({error.strerror or error}); make room or choose a folder that can be written, "
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


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk; a rename is only durable once its folder is. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
