"""Folders of images, one subfolder a class: which files are read, and what is passed over.

A folder is visited once, however many links lead to it: real folders first, then links. A link to a folder that was
visited (the images folder, one above it, another class) would give images twice, or to two classes: it is not followed.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF")  # as Pillow names them
READ = "PNG, JPEG, WebP, GIF, BMP or TIFF"
MAX_NAMED = 3


class ImageList(NamedTuple):
    """All images below a folder, sorted by class, then by path."""

    folder: Path
    files: list[str]  # relative to `folder`, with forward slashes; the first part is the class
    labels: np.ndarray  # (n,) int64
    class_names: list[str]  # sorted; a label is an index into it
    notes: list[str]  # lines for the user: links, and files that are no images


def list_images(folder: Path) -> ImageList:
    """The images in the class subfolders of `folder`, at any depth; hidden names are passed over.

    Raises InputError: no such folder, no class subfolders, images beside them, a class without images, a name that is
    no UTF-8, a folder that cannot be listed.
    """
    if not folder.is_dir():
        raise InputError(f"prepare: --images {folder} is no folder; give one with a subfolder for every class")
    walk = _Walk(folder)
    walk.classes()
    if walk.no_utf8:
        raise InputError(
            f"prepare: {len(walk.no_utf8)} names in {folder} are no UTF-8, such as {walk.no_utf8[0].lstrip('/')}; "
            "rename them"
        )
    if walk.loose:
        raise InputError(
            f"prepare: {folder / min(walk.loose)} is in no class subfolder, like {len(walk.loose) - 1} others; "
            "move it into one"
        )
    if not walk.found:
        raise InputError(f"prepare: --images {folder} is empty; it must hold a subfolder of images for every class")
    files, labels = [], []
    class_names = sorted(walk.found)
    for label, name in enumerate(class_names):
        found = sorted(walk.found[name])
        if not found:
            raise InputError(f"prepare: class folder {folder / name} holds no {READ}; add some or remove it")
        files += found
        labels += [label] * len(found)
    return ImageList(folder, files, np.array(labels, dtype=np.int64), class_names, walk.notes())


def name_some(names: list[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


class _Walk:
    """One pass over the images folder. Paths are relative to it, with forward slashes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.found: dict[str, list[str]] = {}  # class -> its images
        self.loose: list[str] = []  # images beside the class folders
        self.no_utf8: list[str] = []  # names, escaped
        above = (root.resolve(), *root.resolve().parents)
        self._visited = {_identity(folder) for folder in above}  # so that no link leads there
        self._links: list[str] = []  # to folders, inside the classes; followed last
        self._followed: list[str] = []
        self._not_followed: list[str] = []
        self._dangling: list[str] = []
        self._passed_over: Counter[str] = Counter()

    def classes(self) -> None:
        """Visit the class folders: real ones, then links, then what links inside them lead to."""
        links = []
        for entry in self._entries(""):
            if entry.is_dir(follow_symlinks=False):
                self._visit(entry.name)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                raise InputError(f"prepare: {self.root / entry.name} is a link to nothing; repair or remove it")
            elif entry.is_dir():
                links.append(entry.name)
            elif _is_image(entry):
                self.loose.append(entry.name)
        links += sorted(self._links)
        while links:
            self._links = []
            for link in links:
                (self._followed if self._visit(link) else self._not_followed).append(link)
            links = sorted(self._links)

    def notes(self) -> list[str]:
        lines = []
        if self._passed_over:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in self._passed_over.most_common())
            total = sum(self._passed_over.values())
            lines.append(f"passed over {total} files in class folders that are no {READ} by their names: {kinds}")
        if self._followed:
            lines.append(f"followed {len(self._followed)} links to folders, each once: {name_some(self._followed)}")
        if self._not_followed:
            lines.append(
                f"did not follow {len(self._not_followed)} links to folders that are read anyway (of this or another "
                f"class, or the images folder or one above it): {name_some(self._not_followed)}"
            )
        if self._dangling:
            lines.append(f"passed over {len(self._dangling)} links to nothing: {name_some(self._dangling)}")
        return lines

    def _visit(self, folder: str) -> bool:
        """List a class folder or one below it; False where it was visited before."""
        identity = _identity(self.root / folder)
        if identity in self._visited:
            return False
        self._visited.add(identity)
        images = self.found.setdefault(folder.split("/")[0], [])
        for entry in self._entries(folder):
            path = f"{folder}/{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                if not self._visit(path):  # below a link, and reached by another one before
                    self._not_followed.append(path)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                # An image that cannot be read is counted with the unreadable ones, whatever the reason.
                (images if _has_suffix(entry.name) else self._dangling).append(path)
            elif entry.is_dir():
                self._links.append(path)
            elif _is_image(entry):
                images.append(path)
            else:
                self._passed_over[os.path.splitext(entry.name)[1].lower() or "without a suffix"] += 1
        return True

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        """What lies in a folder, by name, without hidden names and those that are no UTF-8."""
        try:
            with os.scandir(self.root / folder) as scan:
                entries = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            raise InputError(
                f"prepare: {self.root / folder} cannot be listed ({error.strerror}); make it readable or remove it"
            ) from error
        self.no_utf8 += [path for entry in entries if (path := _escaped(f"{folder}/{entry.name}")) is not None]
        return [entry for entry in entries if _escaped(entry.name) is None]


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _escaped(name: str) -> str | None:
    """A printable form of a name that is no UTF-8; None for one that is."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    return None


def _has_suffix(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _is_image(entry: os.DirEntry[str]) -> bool:
    return _has_suffix(entry.name) and entry.is_file()
