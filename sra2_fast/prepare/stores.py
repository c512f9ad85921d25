"""Where images lie: a folder, or a zip archive that is read as if it were one. Names have forward slashes."""

from __future__ import annotations

import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from ..data.layouts.vae_sd import LABELS_FILE
from ..errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
HIDDEN, MAC_FOLDER = ".", "__MACOSX"
DAMAGED = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError)  # besides OSError


class Store(ABC):
    """Named files."""

    path: Path

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises OSError."""

    @abstractmethod
    def size(self, name: str) -> int:
        """The number of bytes, without reading them. Raises OSError."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""


class FolderStore(Store):
    """The files below a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def size(self, name: str) -> int:
        return os.path.getsize(self.path / name)

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()


class ZipStore(Store):
    """The files in a zip archive, in every process through a file of its own.

    root: the folder in it that holds everything, with a slash; "" where there is no such one (see `_root`).
    names: of all files but hidden ones, sorted, relative to root.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()
        entries = [entry.filename for entry in self._zip.infolist() if not entry.is_dir()]
        visible = sorted(name for name in entries if not _is_hidden(name))
        self.root = _root(visible)
        self.names = [name.removeprefix(self.root) for name in visible]
        for name, following in zip(self.names, self.names[1:], strict=False):
            if name == following:
                raise InputError(f"prepare: --images {path} holds {name} twice; write it again")

    def read(self, name: str) -> bytes:
        try:
            return self._archive().read(self._entry(name))
        except DAMAGED as error:
            raise OSError(str(error)) from error

    def size(self, name: str) -> int:
        return self._entry(name).file_size

    def has(self, name: str) -> bool:
        return self.root + name in self._zip.NameToInfo

    def _entry(self, name: str) -> zipfile.ZipInfo:
        try:
            return self._zip.getinfo(self.root + name)
        except KeyError as error:
            raise FileNotFoundError(f"no {name} in {self.path}") from error

    def _open(self) -> None:
        self._process = os.getpid()
        try:
            self._zip = zipfile.ZipFile(self.path)
        except (OSError, *DAMAGED) as error:
            raise InputError(f"prepare: --images {self.path} is no zip archive that can be read ({error})") from error

    def _archive(self) -> zipfile.ZipFile:
        """A forked process shares the position in its parent's file, so it gets a file of its own; the list of entries
        (a million of them take seconds) it keeps."""
        if self._process != os.getpid():
            self._zip.fp = open(self.path, "rb")  # noqa: SIM115 - as long as the archive
            self._process = os.getpid()
        return self._zip

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_zip"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def open_store(path: Path) -> FolderStore | ZipStore:
    """Raises InputError for anything but a folder or a zip archive."""
    if path.is_dir():
        return FolderStore(path)
    if path.is_file():
        return ZipStore(path)
    raise InputError(
        f"prepare: --images {path} is no folder and no zip archive; give one with a subfolder for every class"
    )


def _root(names: list[str]) -> str:
    """`train/` where all images lie in folders of one folder train, as `zip -r train.zip train` packs them, or anywhere
    in it beside its dataset.json; else nothing."""
    images = [name.split("/") for name in names if is_image_name(name)]
    tops = {parts[0] for parts in images}
    if len(tops) != 1 or min(map(len, images)) == 1:
        return ""
    top = f"{tops.pop()}/"
    return top if f"{top}{LABELS_FILE}" in names or min(map(len, images)) > 2 else ""


def is_image_name(name: str) -> bool:
    """Whether a file is taken for an image, which its ending decides."""
    return name.lower().endswith(SUFFIXES)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(HIDDEN) or part == MAC_FOLDER for part in name.split("/"))
