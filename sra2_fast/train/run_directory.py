"""The folder of a run: its config, metrics, samples and checkpoints, and who may write there.

OUT/config.json                  every option, what it became, versions, the machine
OUT/metrics.jsonl                one object a log point; a resumed run goes on where its checkpoint stood
OUT/tensorboard/, OUT/wandb/     the same numbers as --log has them
OUT/samples/step-00000040.png
OUT/checkpoints/step-00000040/   see sra2_fast/checkpoints/training.py
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from ..checkpoints import list_checkpoints, remove_partial_checkpoints
from ..errors import InputError
from ..files import LOCK_FILE, PARTIAL, FolderLock, create_folder, write_whole
from .scalars import Scalars
from .wandb_run import WandbRun


class RunDirectory:
    """Creates and locks the folder; raises InputError when it cannot be written or another process trains in it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        is_new = not self.path.exists()
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.metrics: IO[str] | None = None
        self._scalars: Scalars | WandbRun | None = None
        try:
            create_folder(self.path)
        except OSError as error:
            raise InputError(
                f"train: --out {path} cannot be written ({error.strerror}); choose another folder"
            ) from error
        self._lock = FolderLock(self.path, "train")
        self._is_new = is_new
        remove_partial_checkpoints(self.checkpoints)
        for folder in (self.path, self.samples):  # what a kill left half written
            for partial in folder.glob(f"*{PARTIAL}"):
                partial.unlink(missing_ok=True)

    def newest_checkpoint(self) -> Path | None:
        found = list_checkpoints(self.checkpoints)
        return found[-1] if found else None

    def holds(self, checkpoint: Path) -> bool:
        """Whether the checkpoint is one of this run's."""
        return self.checkpoints.is_dir() and self.checkpoints.samefile(checkpoint.parent)

    def write_config(self, config: dict[str, Any]) -> None:
        write_whole(self.path / "config.json", (json.dumps(config, indent=1) + "\n").encode(), op="train")

    def open_metrics(self, last_step: int, log: str = "none", config: dict[str, Any] | None = None) -> None:
        """Open metrics.jsonl to go on after `last_step`; records of later steps are dropped.

        log: what takes the records besides: "tensorboard", "wandb" (which is told `config`) or "none".
        """
        if log == "wandb":  # first, because it may be refused, and then nothing is written
            self._scalars = WandbRun(self.path, config or {})
        path = self.path / "metrics.jsonl"
        with self._disk_errors("metrics.jsonl"):
            kept = [line for line in _whole_lines(path) if _step_of(line) <= last_step]
            write_whole(path, "".join(kept).encode(), op="train")
            self.metrics = open(path, "a", buffering=1)  # noqa: SIM115 - open for the whole run
        if log == "tensorboard":
            self._scalars = Scalars(self.path / "tensorboard", last_step + 1)

    def log(self, record: dict[str, float]) -> None:
        """One line of metrics.jsonl and one scalar a number."""
        assert self.metrics is not None
        with self._disk_errors("metrics.jsonl"):
            if os.fstat(self.metrics.fileno()).st_nlink == 0:  # written on, it would be lost without a word
                tqdm.write(f"{self.path / 'metrics.jsonl'} was removed; the records go on in a new file")
                self.path.mkdir(parents=True, exist_ok=True)
                self.metrics.close()
                self.metrics = open(self.path / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 - as above
            self.metrics.write(json.dumps(record) + "\n")
        if self._scalars is not None:
            self._scalars.log(record)

    def flush(self) -> None:
        """Bring metrics.jsonl to the disk, so that no checkpoint is there before the records of its steps."""
        assert self.metrics is not None
        with self._disk_errors("metrics.jsonl"):
            os.fsync(self.metrics.fileno())

    def close(self) -> None:
        if isinstance(self._scalars, WandbRun):
            self._scalars.close()
        if self.metrics is not None:
            with contextlib.suppress(OSError):
                self.metrics.close()
        entries = [entry.name for entry in self.path.iterdir()] if self.path.is_dir() else []
        if self._is_new and entries == [LOCK_FILE]:  # the run never began
            (self.path / LOCK_FILE).unlink()
            self.path.rmdir()
        self._lock.close()

    @contextlib.contextmanager
    def _disk_errors(self, name: str) -> Any:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"train: {self.path / name} cannot be written ({error.strerror}); free some space"
            ) from error


def _whole_lines(path: Path) -> list[str]:
    """The lines of a metrics file; a last one that a crash cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    return [line for line in lines if line.endswith("}\n")]


def _step_of(line: str) -> float:
    """The step of a record; infinity, so that it is dropped, for what a crash or an editor left instead of one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
