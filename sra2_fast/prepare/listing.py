"""Folders and zip archives of images: which files are read, what class each has, and what is passed over.

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
from .labels import Labelling, class_names_from, labelling_of
from .stores import FolderStore, Store, ZipStore, is_image_name, open_store

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF")  # as Pillow names them
READ = "PNG, JPEG, WebP, GIF, BMP or TIFF"
MAX_NAMED = 3


class ImageList(NamedTuple):
    """All images of a store: by class and path where its folders are the classes, by path where they are not."""

    store: Store
    files: list[str]  # names in the store; where its folders are the classes, the first part is the class
    labels: np.ndarray  # (n,) int64
    class_names: list[str] | None  # a label is an index into it; None where classes have numbers only
    class_folders: list[str] | None  # the folder of every class, where its folders are the classes
    notes: list[str]  # lines for the user: links, files that are no images, where labels come from

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1

    def class_called(self, label: int) -> str:
        """A class, in words for a message."""
        if self.class_folders is not None:
            return f"class folder {self.store.path / self.class_folders[label]}"
        return f"class {label if self.class_names is None else self.class_names[label]} of {self.store.path}"


class Found(NamedTuple):
    """What lies in a store. Names have forward slashes."""

    by_folder: dict[str, list[str]]  # first folder -> images at any depth in it
    loose: list[str]  # images in none
    notes: list[str]


def list_images(
    path: Path, *, labels: Path | None = None, class_names: Path | None = None, ignore_labels: bool = False
) -> ImageList:
    """The images in a folder or a zip archive, at any depth; hidden names are passed over.

    Their classes are what `labels` says (a JSON like REPA's dataset.json, or a CSV of file, class), or else the
    store's own dataset.json, or else its subfolders; with ignore_labels there is one.
    class_names: a CSV of class, name.
    Raises InputError: no such folder, no image, images without a class, classes without images, a name that is no
    UTF-8, a folder that cannot be listed, a table that cannot be read.
    """
    store = open_store(path)
    found = _walk_folder(path) if isinstance(store, FolderStore) else _list_zip(store)
    table = Labelling("", {}) if ignore_labels else labelling_of(store, labels)
    listed = _by_folder(store, found) if table is None else _by_table(store, found, table, ignore_labels)
    if class_names is None:
        return listed
    if table is not None and not table.classes:
        raise InputError(f"prepare: --class-names {class_names} has nothing to name: all images are of one class")
    known: list[str] | range = listed.class_folders or listed.class_names or range(listed.num_classes)
    return listed._replace(class_names=class_names_from(class_names, known))


def _by_folder(store: Store, found: Found) -> ImageList:
    if found.loose:
        raise InputError(
            f"prepare: {store.path / min(found.loose)} is in no class subfolder, like {len(found.loose) - 1} others; "
            "move it into one, or say --labels FILE, or --ignore-labels to make one class of all"
        )
    if not found.by_folder:
        raise InputError(f"prepare: --images {store.path} is empty; it must hold a subfolder of images for every class")
    files, labels = [], []
    folders = sorted(found.by_folder)
    for label, name in enumerate(folders):
        inside = sorted(found.by_folder[name])
        if not inside:
            raise InputError(f"prepare: class folder {store.path / name} holds no {READ}; add some or remove it")
        files += inside
        labels += [label] * len(inside)
    return ImageList(store, files, np.array(labels, dtype=np.int64), folders, folders, found.notes)


def _by_table(store: Store, found: Found, table: Labelling, ignore_labels: bool) -> ImageList:
    files = sorted(found.loose + [name for inside in found.by_folder.values() for name in inside])
    if not files:
        raise InputError(f"prepare: --images {store.path} holds no {READ}; give a folder or a zip archive of images")
    notes = found.notes
    if not table.classes:
        if not ignore_labels:
            notes = [*notes, f"{table.origin} has no labels: all images are of one class, label 0"]
        return ImageList(store, files, np.zeros(len(files), dtype=np.int64), None, None, notes)
    _check_complete(store, files, table)
    classes = [table.classes[name] for name in files]
    names = sorted({one for one in classes if isinstance(one, str)})
    label_of = {name: label for label, name in enumerate(names)}
    labels = np.array([label_of[one] if isinstance(one, str) else one for one in classes], dtype=np.int64)
    notes = [*notes, f"labels from {table.origin}: {len(set(classes))} classes"]
    return ImageList(store, files, labels, names or None, None, notes)


def _check_complete(store: Store, files: list[str], table: Labelling) -> None:
    missing = table.classes.keys() - set(files)
    if missing:
        raise InputError(
            f"prepare: {table.origin} names {min(missing)}, which is no image in {store.path} (like {len(missing) - 1} "
            f"others of {len(table.classes)}); take it out of there, or add the image"
        )
    unlabelled = set(files) - table.classes.keys()
    if unlabelled:
        raise InputError(
            f"prepare: {store.path / min(unlabelled)} has no label in {table.origin}, like "
            f"{len(unlabelled) - 1} others of {len(files)}; add it there or remove it"
        )


def _list_zip(store: ZipStore) -> Found:
    by_folder: dict[str, list[str]] = {}
    loose: list[str] = []
    passed_over: Counter[str] = Counter()
    for name in store.names:
        folder, _, inside = name.partition("/")
        if is_image_name(name):
            (by_folder.setdefault(folder, []) if inside else loose).append(name)
        elif inside:
            passed_over[_suffix(name)] += 1
    notes = [f"the images are those in {store.root} of {store.path}"] if store.root else []
    return Found(by_folder, loose, notes + _passed_over_note(passed_over))


def _walk_folder(folder: Path) -> Found:
    walk = _Walk(folder)
    walk.classes()
    if walk.no_utf8:
        raise InputError(
            f"prepare: {len(walk.no_utf8)} names in {folder} are no UTF-8, such as {walk.no_utf8[0].lstrip('/')}; "
            "rename them"
        )
    return Found(walk.found, walk.loose, walk.notes())


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
        lines = _passed_over_note(self._passed_over)
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
                (images if is_image_name(entry.name) else self._dangling).append(path)
            elif entry.is_dir():
                self._links.append(path)
            elif _is_image(entry):
                images.append(path)
            else:
                self._passed_over[_suffix(entry.name)] += 1
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


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without a suffix"


def _passed_over_note(passed_over: Counter[str]) -> list[str]:
    if not passed_over:
        return []
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in passed_over.most_common())
    total = sum(passed_over.values())
    return [f"passed over {total} files in class folders that are no {READ} by their names: {kinds}"]


def _is_image(entry: os.DirEntry[str]) -> bool:
    return is_image_name(entry.name) and entry.is_file()
