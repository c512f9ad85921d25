"""TensorBoard scalars, written where they are logged: a disk or folder that fails is noticed here and costs a line.

tensorboard's own writer hands records to a thread that dies with a traceback of its own, and takes the run with it.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm


class Scalars:
    """One event file in `folder`; records of steps from `first_step` on replace those of a run that went further.

    path: of that file; None once it could not be written.
    Raises ImportError where tensorboard is not installed.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._records = event_pb2.Event, summary_pb2.Summary, RecordWriter
        stamp = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self.path: Path | None = folder / f"events.out.tfevents.{stamp}.0"
        self._write(file_version="brain.Event:2")
        restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=first_step, session_log=restart)

    def log(self, record: dict[str, float]) -> None:
        """Every number of the record but `step`, at that step."""
        values = [self._summary.Value(tag=tag, simple_value=x) for tag, x in record.items() if tag != "step"]
        self._write(step=int(record["step"]), summary=self._summary(value=values))

    def _write(self, **event: Any) -> None:
        """Append one event; the first failure is said in a line and ends TensorBoard's part of the run."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                self._records(file).write(self._event(wall_time=time.time(), **event).SerializeToString())
        except OSError as error:
            tqdm.write(f"no more TensorBoard: {self.path} ({error.strerror}); metrics.jsonl goes on")
            self.path = None
