"""Keeps memory that a training step frees for the next one.

The C library returns freed memory to the system and asks for it again, page by page: on a CPU 16 to 33 thousand page
faults a step of SiT-S/2 at batch 8, 5 to 15 % of its time. A GPU's memory has torch's caching allocator for that.
"""

from __future__ import annotations

import ctypes

# malloc.h of the GNU C library. 32 MiB is the most it takes for the first; larger tensors still come and go.
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2
_SETTINGS = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 << 20}


def keep_freed_memory() -> bool:
    """For the rest of the process; False where the C library has no such settings (it is not GNU's)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(name, value) == 1 for name, value in _SETTINGS.items())
