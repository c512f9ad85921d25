"""The SiT, REPA and SRA model contracts where they differ from `sra2_fast.SiT`.

`sra2_fast.SiT` itself replaces the class of the SiT repository. REPA's and SRA's classes have constructors of their own
and return tuples; `compat.repa` and `compat.sra` keep those, on our layers, for code that writes `model(...)[0]`.
"""

from __future__ import annotations

from . import repa, sra

__all__ = ["repa", "sra"]
