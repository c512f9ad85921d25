"""The folder of samples: what it is of, which images are there, and what is made of them at the end.

OUT/sample.json        the plan: everything that shapes an image
OUT/images/000000.png  one file an image, there in whole or not at all
OUT/samples.npz        arr_0 (N, H, W, 3) uint8, as the ADM evaluation suite reads it, and arr_1 (N,) int64, the labels
OUT/grid.png           the first images side by side

A kill at any moment costs the images under way. The arrays are written image by image: 50,000 of 256x256 are 10 GB.
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from ..errors import InputError, must_be
from ..files import PARTIAL, FolderLock, make_folder, write_whole
from ..pictures import png_bytes, tile, write_png

FORMAT = 1
PLAN_FILE, ARRAYS_FILE, GRID_FILE = "sample.json", "samples.npz", "grid.png"
GRID_IMAGES, GRID_COLUMNS = 100, 10
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"


class SampleFolder:
    """Opens (or begins) the folder for one plan, and keeps other processes out of it.

    plan: JSON-able; the folder must be of the same one, or begin with it.
    Raises InputError where it is of another plan, in use, holds images of something else, or cannot be written.
    """

    def __init__(self, path: Path, plan: dict[str, Any], about: dict[str, Any]) -> None:
        self.path, self.images = path, path / "images"
        plan = json.loads(json.dumps(plan))
        make_folder(path)
        self._lock = FolderLock(path, "sample")
        try:
            self._begin(plan, about)
        except BaseException:
            self.close()
            raise

    def _begin(self, plan: dict[str, Any], about: dict[str, Any]) -> None:
        if (self.path / PLAN_FILE).is_file():
            _check_same(self.path, plan)
        elif self.images.is_dir() and any(self.images.iterdir()):
            raise InputError(
                f"sample: {self.images} holds files, and {self.path} no {PLAN_FILE} that says of what; "
                "choose another --out"
            )
        else:
            record = {"format": FORMAT, "plan": plan, **about}
            write_whole(self.path / PLAN_FILE, (json.dumps(record, indent=1) + "\n").encode(), op="sample")
        make_folder(self.images)
        for partial in self.images.glob(f".*{PARTIAL}"):
            partial.unlink(missing_ok=True)

    def file(self, index: int) -> Path:
        return self.images / f"{index:06d}.png"

    def missing(self, count: int) -> np.ndarray:
        """(n,) int64: which of the first `count` images are not there in whole, in order."""
        return np.array([i for i in range(count) if not _is_whole(self.file(i))], dtype=np.int64)

    def write_image(self, index: int, image: np.ndarray) -> None:
        """image: (H, W, 3) uint8. Raises InputError."""
        write_png(image, self.file(index))

    def read_image(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8. Raises InputError naming the file."""
        from PIL import Image, UnidentifiedImageError

        path = self.file(index)
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise InputError(f"sample: {path} cannot be read; delete it and run the same command again") from error

    def write_grid(self, count: int) -> Path:
        """The first images, ten in a row."""
        shown = np.stack([self.read_image(index) for index in range(min(count, GRID_IMAGES))])
        path = self.path / GRID_FILE
        write_whole(path, png_bytes(tile(shown, min(len(shown), GRID_COLUMNS))), op="sample")
        return path

    def has_arrays(self, count: int) -> bool:
        """Whether samples.npz holds that many images."""
        try:
            with zipfile.ZipFile(self.path / ARRAYS_FILE) as arrays, arrays.open("arr_0.npy") as first:
                npy.read_magic(first)
                return npy.read_array_header_1_0(first)[0][0] == count
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return False

    def write_arrays(self, labels: np.ndarray, indices: Iterable[int]) -> Path:
        """samples.npz of the images `indices`, one label each; read one by one, never held together."""
        path = self.path / ARRAYS_FILE
        partial = path.with_name(f".{path.name}{PARTIAL}")
        try:
            with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as arrays:
                with arrays.open("arr_0.npy", "w", force_zip64=True) as member:
                    for number, index in enumerate(indices):
                        image = self.read_image(index)
                        if number == 0:
                            shape = image.shape
                            _write_header(member, (len(labels), *shape), image.dtype)
                        if image.shape != shape:
                            raise must_be("sample", str(self.file(index)), f"{shape} as the first image", image.shape)
                        member.write(np.ascontiguousarray(image).data)
                with arrays.open("arr_1.npy", "w") as member:
                    npy.write_array(member, labels.astype(np.int64), allow_pickle=False)
            os.replace(partial, path)
        except OSError as error:
            raise InputError(
                f"sample: {path} cannot be written ({error.strerror or error}); make room, then run the same command "
                "again (the images are kept)"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        return path

    def close(self) -> None:
        self._lock.close()


def _write_header(member: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
    about = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(member, about)


def _is_whole(path: Path) -> bool:
    """Whether the file is there and ends as a PNG does: after a power cut one may be cut short."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:
        return False


def _check_same(path: Path, plan: dict[str, Any]) -> None:
    try:
        record = json.loads((path / PLAN_FILE).read_text())
        before, number = dict(record["plan"]), int(record["format"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"sample: {path / PLAN_FILE} is damaged; choose another --out") from error
    if number > FORMAT:
        raise InputError(f"sample: {path} was written by a newer sra2_fast (format {number}); upgrade sra2_fast")
    changes = [
        f"{name} {_brief(before.get(name))} -> {_brief(plan.get(name))}"
        for name in {**before, **plan}
        if before.get(name) != plan.get(name)
    ]
    if changes:
        raise InputError(
            f"sample: --out {path} holds other samples ({'; '.join(changes)}); give the same options, or choose "
            "another folder"
        )


def _brief(value: object, longest: int = 40) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= longest else text[: longest - 3] + "..."
