"""Weights & Biases: the records of metrics.jsonl in a run of its own, gone on with where the run goes on.

Its settings are wandb's own environment variables: WANDB_MODE=offline, WANDB_PROJECT, WANDB_ENTITY, WANDB_API_KEY.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import InputError


class WandbRun:
    """One run of wandb, whose files and id lie in `folder`/wandb; `folder`'s name is its name.

    Raises InputError where wandb does not begin: not logged in, or no connection.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        import wandb

        kept = folder / "wandb" / "run-id"
        is_new = not kept.parent.exists()
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            if not kept.exists():
                kept.write_text(secrets.token_hex(4))
            self._errors: tuple[type[Exception], ...] = (wandb.Error, OSError)
            self._run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "sra2-fast"),
                name=os.environ.get("WANDB_NAME", folder.resolve().name),
                dir=str(folder),
                id=kept.read_text().strip(),
                resume="allow",
                config=config,
                settings=wandb.Settings(console="off", silent=True),
            )
            # By our step, not by the count of records: a run that goes on from an earlier checkpoint logs steps again.
            self._run.define_metric("*", step_metric="step")
        except (wandb.Error, OSError) as error:
            if is_new:
                shutil.rmtree(kept.parent, ignore_errors=True)
            reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
            raise InputError(
                f"train: --log wandb did not begin: {reason}; run `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def log(self, record: dict[str, float]) -> None:
        """Every number of the record; the first failure is said in a line and ends wandb's part of the run."""
        if self._run is None:
            return
        try:
            self._run.log(record)
        except self._errors as error:
            tqdm.write(f"no more wandb: {error}; metrics.jsonl goes on")
            self._run = None

    def close(self) -> None:
        """Wait until everything is written or sent."""
        if self._run is not None:
            with contextlib.suppress(*self._errors):
                self._run.finish()
