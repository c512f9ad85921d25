"""`python -m sra2_fast.prepare` is `sra2-fast prepare`."""

from __future__ import annotations

import sys

from ..cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
