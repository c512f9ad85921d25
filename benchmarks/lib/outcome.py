"""How a benchmark ends: its exit code, the one line that says why, and files tried before minutes are spent."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from sra2_fast.errors import InputError, is_out_of_memory


class WrongStep(RuntimeError):
    """A timed step computed something else than it should, so that its time is worth nothing."""


def exit_code(op: str, lower: str, work: Callable[[], None]) -> int:
    """Run `work`; 0, or with a line on stderr 2 for bad input and for lack of memory, 1 for a WrongStep.

    lower: the options that need less memory. Raises what else went wrong.
    """
    try:
        work()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except WrongStep as error:
        print(f"{op}: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        (what, *_) = str(error).splitlines() or [type(error).__name__]
        print(f"{op}: out of memory ({what}); lower {lower}", file=sys.stderr)
        return 2
    return 0


def check_can_write(op: str, option: str, path: str | Path) -> None:
    """Raises InputError where `path` cannot be written, before minutes of measuring are lost to it; leaves it as it is.

    Its folder is made.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        path.open("a").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise InputError(f"{op}: {option} {path} cannot be written ({error.strerror}); name another file") from error
