"""What an earlier run left in --out: whether it may be continued, and what of it still holds.

prepare.json remembers what the folder was begun with. A shard or a part is taken over if it is undamaged, was made with
the same options from the same names, and every image file still has the very bytes it was made from.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..data.layouts.shards import INDEX_FILE, Shard, finished_shard, is_shards, read_index
from ..errors import InputError
from ..files import write_whole
from ..progress import progress_bar
from ..schemas import Damaged, as_type, read_json
from .encode import EncodeOptions
from .listing import ImageList
from .reading import has_size_of, mark_of
from .shard_work import ShardJob, ShardWork, read_parts

PLAN_FILE = "prepare.json"


def keep_to_plan(out: Path, options: EncodeOptions, images: ImageList) -> None:
    """Refuse to mix two data sets in one folder, and remember what this one is begun with.

    As long as it is not finished the list of images may change (unreadable ones get removed); afterwards not.
    """
    path = out / PLAN_FILE
    listing = listing_of(images)
    classes = hashlib.sha256(images.labels.tobytes() + json.dumps(images.class_names).encode()).hexdigest()
    if path.is_file():
        before = _read_plan(path)
        if "vae_fingerprint" not in before:
            raise InputError(f"prepare: {out} was begun by an earlier version of sra2-fast; give another --out")
        if before["vae_fingerprint"] != options.vae_fingerprint:
            raise InputError(
                f"prepare: {out} was begun with other weights (--vae {before.get('vae')}) than --vae {options.vae} "
                "holds now; give another --out"
            )
        for name, value in vars(options).items():
            # Another name for the same weights is the same, and another table with the same labels.
            if name not in ("vae", "labels") and before.get(name) != value:
                option = "--" + name.replace("_", "-")
                raise InputError(
                    f"prepare: {out} was begun with {option} {before.get(name)}, not {value}; give another --out"
                )
        if before.get("listing") != listing and (out / INDEX_FILE).is_file():
            raise _other_images(out, images, "their names differ")
        if before.get("classes", classes) != classes and (out / INDEX_FILE).is_file():
            raise InputError(
                f"prepare: {out} is finished, with other labels or class names; give another --out, or remove "
                f"{out / INDEX_FILE} to make it anew"
            )
    elif is_shards(out):
        raise InputError(f"prepare: --out {out} holds latents of another origin; give another folder")
    write_whole(path, json.dumps({**vars(options), "listing": listing, "classes": classes}, indent=1).encode())


def begun_with(out: Path) -> tuple[EncodeOptions, str]:
    """What `out` was begun with, and `listing_of` its images. Raises InputError where that is not known."""
    path = out / PLAN_FILE
    if not path.is_file():
        raise InputError(
            f"prepare: {out} has no {PLAN_FILE}: what its latents were made from is not known; say --verify alone"
        )
    before = _read_plan(path)
    try:
        return EncodeOptions(**{field.name: before[field.name] for field in fields(EncodeOptions)}), before["listing"]
    except KeyError as error:
        raise InputError(f"prepare: {path} is damaged (no {error}); run the same sra2-fast prepare again") from error


def listing_of(images: ImageList) -> str:
    """A digest of the images' names."""
    return hashlib.sha256("\n".join(images.files).encode()).hexdigest()


def _read_plan(path: Path) -> dict[str, Any]:
    """prepare.json, with what the options were that an earlier version did not know yet."""
    defaults = {field.name: field.default for field in fields(EncodeOptions) if field.default is not MISSING}
    try:
        return {**defaults, **as_type(read_json(path), dict[str, Any])}
    except Damaged as error:
        raise InputError(f"prepare: {path} {error}; remove it or give another --out") from error


def survey(
    out: Path, images: ImageList, jobs: list[ShardJob], num_workers: int
) -> tuple[dict[int, Shard], list[ShardWork]]:
    """The shards that are finished, by number, and the work that is left.

    Reads every image file of what is finished, with `num_workers` threads. Raises InputError for a finished folder
    whose images have other contents now; in an unfinished one what was made from them is made anew.
    """
    pictures = _indexed_pictures(out)
    shards: dict[int, Shard] = {}
    works = []
    bar = progress_bar(total=len(images.files), unit="image", desc="comparing with images", delay=2.0)
    with bar, ThreadPoolExecutor(max(1, num_workers)) as pool:
        for job in jobs:
            shard = finished_shard(out, job.name, job.key)
            if shard and not _has_marks(shard.record, len(job.positions)):
                shard = None
            changed = _first_changed(images, job.positions, shard.record["marks"], pool) if shard else None
            if pictures and changed:
                raise _other_images(out, images, f"{changed} was changed")
            if pictures and not shard and job.name in pictures:  # damaged: made anew, but from the same images only
                marks = pool.map(partial(mark_of, images.store), [images.files[position] for position in job.positions])
                if digest_of(list(marks)) != pictures[job.name]:
                    raise _other_images(out, images, f"those of {job.name} were changed")
            if shard and not changed:
                shards[job.number] = shard
            else:
                works.append(_unfinished(out, images, job, pool))
            bar.update(len(job.positions))
    return shards, works


def _has_marks(record: dict[str, Any], count: int) -> bool:
    marks = record.get("marks")
    return isinstance(marks, list) and len(marks) == count and all(isinstance(mark, str) for mark in marks)


def digest_of(marks: list[str]) -> str:
    """One digest for all images of a shard; the index keeps it."""
    return hashlib.sha256("\n".join(marks).encode()).hexdigest()


def _unfinished(out: Path, images: ImageList, job: ShardJob, pool: Executor) -> ShardWork:
    parts, start = [], 0
    for part in read_parts(out, job):
        if _first_changed(images, job.positions[start:], part.marks, pool):
            break
        parts.append(part)
        start += len(part.marks)
    return ShardWork(out, job, parts)


def _first_changed(images: ImageList, positions: np.ndarray, marks: list[str], pool: Executor) -> str | None:
    """The first of the images, in order, that does not have its mark any more; sizes are looked at first."""
    files = [images.files[position] for position in positions[: len(marks)]]
    for file, mark in zip(files, marks, strict=True):
        if not has_size_of(images.store, file, mark):
            return file
    now = pool.map(partial(mark_of, images.store), files)
    return next((file for file, mark, is_now in zip(files, marks, now, strict=True) if mark != is_now), None)


def _indexed_pictures(out: Path) -> dict[str, str]:
    """Shard file -> `digest_of` its images, from the index of a finished folder; nothing from an unfinished one."""
    if not (out / INDEX_FILE).is_file():
        return {}
    index = read_index(out)
    try:
        return as_type(index["prepared_from"]["pictures"], dict[str, str])
    except (KeyError, TypeError, Damaged) as error:
        raise InputError(
            f"prepare: {out / INDEX_FILE} does not say what it was made from ({error!r}); give another --out"
        ) from error


def _other_images(out: Path, images: ImageList, how: str) -> InputError:
    return InputError(
        f"prepare: {out} is finished, and {images.store.path} holds other images now ({how}); "
        f"give another --out, or remove {out / INDEX_FILE} to make it anew"
    )
