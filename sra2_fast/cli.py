"""`sra2-fast COMMAND`: finds the command, parses its options, turns an InputError into one line and exit code 2.

A command is a module with `add_arguments(parser)` and `run(args) -> exit code`; only the one asked for is imported.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .errors import EXIT_BAD_INPUT, EXIT_TEMPORARY, InputError, TemporaryFailure

COMMANDS = {
    "prepare": ("sra2_fast.prepare", "encode a folder of images with a VAE into latents to train on"),
    "train": ("sra2_fast.train", "train a SiT with SRA 2"),
    "sample": ("sra2_fast.sample", "draw images from a run or a checkpoint"),
    "convert-data": ("sra2_fast.convert_data", "bring latents of any known layout into shards, which are read fastest"),
    "convert": ("sra2_fast.convert", "checkpoints of SiT, REPA, SRA, REPA-E, LightningDiT into ours, and back"),
    "info": ("sra2_fast.info", "what is built and which backends are used here"),
}


class _OneLineParser(argparse.ArgumentParser):
    """argparse, whose complaint is an InputError instead of a page of usage, and whose values may be `-0.1,0.2`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # its own stops at one plain number

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is its own, 2 for bad input, 75 to try again later, 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        from . import __version__

        print(f"sra2-fast {__version__}")
        return 0
    name = argv[0]
    try:
        if name not in COMMANDS:
            raise InputError(f"unknown command {name!r}; commands: {', '.join(COMMANDS)}")
        command = importlib.import_module(COMMANDS[name][0])
        parser = _OneLineParser(prog=f"sra2-fast {name}", description=COMMANDS[name][1], allow_abbrev=False)
        command.add_arguments(parser)
        return int(command.run(parser.parse_args(argv[1:])))
    except InputError as error:
        prefix = f"sra2-fast {name}" if name in COMMANDS else "sra2-fast"
        message = " ".join(str(error).split()).removeprefix(f"{name}: ")
        print(f"{prefix}: {message}", file=sys.stderr)
        return EXIT_TEMPORARY if isinstance(error, TemporaryFailure) else EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print(f"sra2-fast {name}: interrupted", file=sys.stderr)
        return 130


def _overview() -> str:
    lines = [f"  {name:14}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["usage: sra2-fast COMMAND [options]", "", *lines, "", "options of one: sra2-fast COMMAND --help"])


if __name__ == "__main__":
    sys.exit(main())
