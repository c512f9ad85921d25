"""Makes Triton's interpreter right for bf16, in this process, for tests only.

Triton 3.6 to 3.9 keep bf16 as raw 16-bit integers and compute on those: products are off by orders of magnitude, and
the cast from float32 truncates. Our kernels touch bf16 in three ways only: casts from and to float32, and the operands
of `tl.dot`. Those are repaired; any other arithmetic on a bf16 value raises instead of being silently wrong.

`tl.dot` on float32 operands is computed as the hardware does for the asked precision: "tf32" rounds the operands to 11
bits, "tf32x3" adds the products of high and low parts.
"""

from __future__ import annotations

import os

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

REFUSED = ("binary_op", "unary_op", "create_fma", "create_fabs", "create_idiv")


def to_bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bit patterns of bf16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(values), np.uint16(0x7FC0), (rounded >> np.uint32(16)).astype(np.uint16))


def from_bf16_bits(bits: np.ndarray) -> np.ndarray:
    """uint16 bit patterns of bf16 -> float32, exact."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_tf32(values: np.ndarray) -> np.ndarray:
    """float32 with the mantissa rounded to tf32's 10 stored bits, ties away from zero, as the conversion does."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def _is_bf16(handle: object) -> bool:
    return (
        isinstance(handle, interpreter.TensorHandle)
        and not isinstance(handle.dtype, tl.pointer_type)
        and handle.dtype.scalar == tl.bfloat16
    )


def _dot(a: np.ndarray, b: np.ndarray, precision: str) -> np.ndarray:
    if precision == "tf32x3":
        a_high, b_high = to_tf32(a), to_tf32(b)
        a_low, b_low = to_tf32(a - a_high), to_tf32(b - b_high)
        return np.matmul(a_low, b_high) + np.matmul(a_high, b_low) + np.matmul(a_high, b_high)
    if precision == "tf32":
        a, b = to_tf32(a), to_tf32(b)
    return np.matmul(a, b)


def install() -> None:
    """Repair the interpreter; once a process."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "run these checks through test_triton.py, which sets it"
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "is_bf16_repaired", False):
        return
    builder.is_bf16_repaired = True

    convert_float = interpreter._convert_float

    def _convert_float(values, source, target, rounding):
        if source == tl.float32 and target == tl.bfloat16:
            return to_bf16_bits(values)
        if source == tl.bfloat16 and target == tl.float32:
            return from_bf16_bits(values).reshape(values.shape)
        return convert_float(values, source, target, rounding)

    interpreter._convert_float = _convert_float

    def create_dot(self, a, b, d, input_precision, *rest):
        precision = str(input_precision).rsplit(".", 1)[-1].lower()
        operands = [from_bf16_bits(x.data).reshape(x.data.shape) if _is_bf16(x) else x.data for x in (a, b)]
        if _is_bf16(a):
            precision = "ieee"
        product = _dot(*operands, precision)
        return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    builder.create_dot = create_dot

    for name in REFUSED:
        setattr(builder, name, _refusing_bf16(name, getattr(builder, name)))

    if triton.__version__.startswith("3.6."):
        _repair_scalars()


def _refusing_bf16(name: str, method):
    def checked(self, *arguments):
        if any(_is_bf16(argument) for argument in arguments):
            raise NotImplementedError(f"bf16_interpreter: {name} on bf16; cast to float32 after the load")
        return method(self, *arguments)

    return checked


def _repair_scalars() -> None:
    """Triton 3.6 converts one-element arrays with int(), which numpy >= 2.4 refuses for arrays of a dimension."""
    patch = interpreter._patch_lang_tensor

    def item(tensor) -> int:
        return int(np.asarray(tensor.handle.data).reshape(-1)[0])

    def patched(tensor, *scope):
        result = patch(tensor, *scope)
        for name in ("__index__", "__int__"):
            if hasattr(tensor, name):
                setattr(tensor, name, item)
        return result

    interpreter._patch_lang_tensor = patched
