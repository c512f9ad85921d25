"""Which of several ways to compute one thing is the fastest here: measured once, kept in a file, the same on all ranks.

The file is `choices.json` in the user's cache folder ($XDG_CACHE_HOME/sra2_fast, else ~/.cache/sra2_fast). An entry is
found by everything the answer depends on, so a new driver of speed (another torch, GPU, shape) is measured anew. A file
that is damaged or cannot be written costs a line and a measurement, never the run. Left out: what the candidates are
(`models/attention.py` has attention's), and what a checkpoint remembers.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tqdm import tqdm

from .errors import InputError
from .files import PARTIAL
from .schemas import Choices, Damaged, Measured, as_type, read_json

if TYPE_CHECKING:
    import torch

FORMAT: Literal[1] = 1
MARGIN = 1.03  # a later candidate has to be this much faster: below it the clock decides, and each run differently
LEAST_ROUNDS, MOST_ROUNDS, MEASURING_S = 3, 12, 1.5
LEAST_TIMED_MS = 2.0  # calls that are shorter are timed several at once

Run = Callable[[], object]
Case = Mapping[str, Any]  # JSON: everything the answer depends on, device and versions included


class Choice(NamedTuple):
    """What was chosen, how ("measured", "measured earlier", ...), and the ms of every candidate where measured."""

    name: str
    how: str
    ms: dict[str, float] = {}

    def __str__(self) -> str:
        times = ", ".join(f"{name} {ms:.3g}" for name, ms in self.ms.items())
        return f"{self.name} ({self.how}{f': {times} ms' if times else ''})"


def choose(
    op: str, case: Case, names: Sequence[str], prepare: Callable[[], Mapping[str, Run]], device: torch.device
) -> Choice:
    """The first of `names` that is within 3 % of the fastest; where torch.distributed runs, all ranks get rank 0's.

    op: what is chosen, in the file and in messages. names: the candidates, the expected best first.
    prepare: makes {name: one call of it}; asked only where something has to be measured. A candidate that raises a
        RuntimeError is left out.
    Raises InputError where none of them runs, on every rank.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return _choose_here(op, case, names, prepare, device)
    told: list[Any] = [None, ""]
    if dist.get_rank() == 0:
        try:
            told[0] = _choose_here(op, case, names, prepare, device)
        except InputError as error:
            told[1] = str(error)
    dist.broadcast_object_list(told, src=0, device=device if device.type == "cuda" else None)
    if told[0] is None:
        raise InputError(told[1])
    return told[0]


def recorded(op: str) -> list[tuple[dict[str, Any], Choice]]:
    """(case, choice) of everything that the file has about `op`, in the order it was measured."""
    answered = [(_asked(key), entry) for key, entry in _read()[0].items()]
    return [
        (asked["case"], Choice(entry.name, "measured earlier", entry.ms))
        for asked, entry in answered
        if asked["op"] == op
    ]


def cache_file() -> Path:
    """Where the answers are kept."""
    folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(folder).expanduser() / "sra2_fast" / "choices.json"


def _choose_here(
    op: str, case: Case, names: Sequence[str], prepare: Callable[[], Mapping[str, Run]], device: torch.device
) -> Choice:
    key = json.dumps({"op": op, **case, "candidates": list(names)}, sort_keys=True)
    entries, damage = _read()
    if key in entries:
        return Choice(entries[key].name, "measured earlier", entries[key].ms)
    if damage:
        tqdm.write(f"{op}: {damage}; measuring again")
    ms = measure(op, prepare(), device)
    name = next(name for name in names if name in ms and ms[name] <= MARGIN * min(ms.values()))
    _add(op, key, Measured(name=name, ms=ms))
    return Choice(name, "measured", ms)


def measure(op: str, runs: Mapping[str, Run], device: torch.device) -> dict[str, float]:
    """{name: ms of one call}: the least of some interleaved rounds, which a busy machine disturbs least.

    Raises InputError where every one of them raises a RuntimeError.
    """
    calls: dict[str, int] = {}
    reasons = []
    for name, run in runs.items():
        try:
            run()  # what is compiled or allocated once
            once = _timed_ms(run, 1, device)
        except RuntimeError as error:
            reasons.append(f"{name}: {next(iter(str(error).splitlines()), type(error).__name__)}")
        else:
            calls[name] = max(1, min(50, round(LEAST_TIMED_MS / max(once, 1e-3))))
    if not calls:
        raise InputError(f"{op}: none of {', '.join(runs)} runs on {device} ({'; '.join(reasons)})")
    ms = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + MEASURING_S
    for count in range(MOST_ROUNDS):
        if count >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name, repeats in calls.items():
            ms[name] = min(ms[name], _timed_ms(runs[name], repeats, device))
    return ms


def _timed_ms(run: Run, repeats: int, device: torch.device) -> float:
    import torch

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if on_gpu:
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start) / repeats


def _read() -> tuple[dict[str, Measured], str]:
    """The file's entries, and in words what is wrong with it; one that is not there is empty."""
    path = cache_file()
    if not os.path.lexists(path):
        return {}, ""
    try:
        entries = as_type(read_json(path), Choices).choices
        for key in entries:
            _asked(key)
    except Damaged as error:
        return {}, f"{path} {error}"
    return entries, ""


def _asked(key: str) -> Any:
    """What an entry answers. Raises Damaged."""
    try:
        asked = json.loads(key)
        return {"op": asked.pop("op"), "candidates": asked.pop("candidates"), "case": asked}
    except (ValueError, AttributeError, KeyError, RecursionError) as error:
        raise Damaged("is damaged (a key that asks nothing)") from error


def _add(op: str, key: str, entry: Measured) -> None:
    """Write the file with one entry more: another name, then renamed, so that nobody reads half of it."""
    path, partial = cache_file(), ""
    text = Choices(format=FORMAT, choices={**_read()[0], key: entry}).model_dump_json(indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: several runs may start at once.
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=PARTIAL, delete=False) as file:
            partial = file.name
            file.write(text)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        tqdm.write(f"{op}: {path} cannot be written ({error.strerror}); the next run will measure again")
