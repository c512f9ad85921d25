"""`python -m sra2_fast.sample` is `sra2-fast sample`."""

from __future__ import annotations

import sys

from ..cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
