"""Labels that are not the folders' names: REPA's dataset.json, or a CSV; and the names of classes, from a CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..data.layouts.vae_sd import LABELS_FILE, labels_of
from ..errors import InputError
from .stores import Store

FILE_HEADS = ("file", "file_name", "filename", "image", "path")
CLASS_HEADS = ("class", "label", "folder")
NAME_HEADS = ("name", "class_name", "class")


class Labelling(NamedTuple):
    """The class of every image by name; classes that are numbers are the labels themselves."""

    origin: str  # for messages
    classes: dict[str, str | int]


def labelling_of(store: Store, table: Path | None) -> Labelling | None:
    """What `table` (a JSON like REPA's or a CSV of file, class) says, or else the store's own dataset.json.

    None: neither is there, so the folders are the classes. With no classes: the dataset.json says "labels": null.
    Raises InputError for a table that cannot be read or is of another form.
    """
    if table is None:
        if not store.has(LABELS_FILE):
            return None
        origin = f"{store.path / LABELS_FILE}"
        try:
            content = store.read(LABELS_FILE)
        except OSError as error:
            raise InputError(f"prepare: {origin} cannot be read ({error}); write it again") from error
        return Labelling(origin, _from_json(content, origin))
    if table.suffix.lower() == ".json":
        return Labelling(str(table), _from_json(_content(table, "--labels"), str(table)))
    rows = _rows(table, "--labels", FILE_HEADS, CLASS_HEADS)
    are_numbers = all(value.isascii() and value.isdigit() for _, value in rows)
    classes = {name.replace("\\", "/"): int(value) if are_numbers else value for name, value in rows}
    if len(classes) < len(rows):
        raise InputError(
            f"prepare: --labels {table} names {_first_twice([name for name, _ in rows])} twice; write it once"
        )
    return Labelling(str(table), classes)


def class_names_from(table: Path, classes: Sequence[str | int]) -> list[str]:
    """The names that a CSV of class, name gives to `classes`: folders' names, or labels. Others in it do not matter.

    Raises InputError for a class without a name, or with two.
    """
    rows = _rows(table, "--class-names", CLASS_HEADS, NAME_HEADS)
    names = dict(rows)
    if len(names) < len(rows):
        raise InputError(
            f"prepare: --class-names {table} names class {_first_twice([one for one, _ in rows])} twice; write it once"
        )
    missing = [str(one) for one in classes if str(one) not in names]
    if missing:
        raise InputError(
            f"prepare: --class-names {table} has no name for {len(missing)} of the {len(classes)} classes, such as "
            f"{missing[0]}; add a line `{missing[0]},NAME`"
        )
    return [names[str(one)] for one in classes]


def _from_json(content: bytes, origin: str) -> dict[str, str | int]:
    """The labels of a dataset.json, none for null."""
    try:
        entries = json.loads(content)["labels"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"prepare: {origin} cannot be read ({error!r}); write it again") from error
    return dict(labels_of(entries, origin) or {})


def _rows(table: Path, option: str, first: Sequence[str], second: Sequence[str]) -> list[tuple[str, str]]:
    """The two columns of a CSV: those that its header names, or else the only two."""
    try:
        text = _content(table, option).decode("utf-8-sig")
        lines = [(number, row) for number, row in enumerate(csv.reader(io.StringIO(text), strict=True), 1) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"prepare: {option} {table} is no CSV in UTF-8 ({error}); write it again") from error
    left, right, width = 0, 1, 2
    heads = [cell.strip().lower() for cell in lines[0][1]] if lines else []
    if any(head in first for head in heads) and any(head in second for head in heads):
        left = next(column for column, head in enumerate(heads) if head in first)
        right = next((column for column, head in enumerate(heads) if head in second and column != left), len(heads))
        width, lines = len(heads), lines[1:]
    rows = []
    for number, row in lines:
        if len(row) != width or not 0 <= right < width or not row[left].strip() or not row[right].strip():
            raise InputError(
                f"prepare: {option} {table}, line {number}: must be `{first[0]},{second[0]}`, got {','.join(row)!r}"
            )
        rows.append((row[left].strip(), row[right].strip()))
    if not rows:
        raise InputError(f"prepare: {option} {table} is empty; it must have lines `{first[0]},{second[0]}`")
    return rows


def _content(table: Path, option: str) -> bytes:
    try:
        return table.read_bytes()
    except OSError as error:
        raise InputError(f"prepare: {option} {table} cannot be read ({error.strerror}); give a file") from error


def _first_twice(names: list[str]) -> str:
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
