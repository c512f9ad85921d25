"""The floating types that latents and features are stored in, through numpy, which has no bfloat16: its bits are kept.

float32 keeps what the autoencoder gave; the others halve the bytes and round once, by at most 2^-11 (float16) or 2^-8
(bfloat16) of a value.
"""

from __future__ import annotations

import numpy as np

from ..errors import InputError

# name: safetensors' code, and the numpy type that holds it
PRECISIONS: dict[str, tuple[str, type[np.generic]]] = {
    "float32": ("F32", np.float32),
    "float16": ("F16", np.float16),
    "bfloat16": ("BF16", np.uint16),
}
PRECISION_OF_CODE = {code: name for name, (code, _) in PRECISIONS.items()}
CODE_OF_BITS = {"U16": "BF16"}  # in the header of what was written from numpy


def to_stored(values: np.ndarray, precision: str) -> np.ndarray:
    """Float32 values rounded to nearest even in `precision`, as the numpy type of PRECISIONS.

    Raises InputError for values that float16 has no room for (above 65504).
    """
    values = np.ascontiguousarray(values, np.float32)
    if precision == "bfloat16":
        bits = values.view(np.uint32)
        rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    if precision == "float16" and values.size and np.nanmax(np.abs(values)) > np.finfo(np.float16).max:
        raise InputError("data: some values are above 65504, the largest of float16; store them in bfloat16 or float32")
    return values.astype(PRECISIONS[precision][1])


def to_float32(stored: np.ndarray) -> np.ndarray:
    """What `to_stored` made, exactly, as float32; itself where it is float32."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)
