"""`python -m sra2_fast` is `sra2-fast`."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
