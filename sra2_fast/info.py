"""`sra2-fast info`: what is built, what is missing and why, and which device and versions are in use."""

from __future__ import annotations

import argparse
import json
import sys

from . import choices
from .backends import status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `sra2-fast info`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the table; exit code 0 whatever is missing."""
    found = {**status(), **measured()}
    if args.json:
        print(json.dumps(found))
        return 0
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")
    return 0


def measured() -> dict[str, str]:
    """What was chosen by measurement, for which shape on which device."""
    return {
        f"{op} of {case.get('shape')} {case.get('dtype', 'bfloat16')}": f"{choice} on {case.get('device')}"
        for op in ("attention", "products")
        for case, choice in choices.recorded(op)
    }


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["info", *sys.argv[1:]]))
