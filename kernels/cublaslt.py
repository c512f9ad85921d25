"""bf16 products of cuBLASLt with an epilogue, through the library that torch has loaded already.

torch reaches cuBLASLt's bias epilogue, but not those of training: GELU that also gives its input, GELU's derivative
with the sum for the bias, and the sum for a bias beside a weight's gradient. The library is found by its soname among
those in the process (nothing is linked, nothing else loaded), and called through ctypes: no compiler, no header, one
text for every CUDA. Names, numbers and layouts are those of NVIDIA's cublasLt.h and its documentation.

Matrices here are row-major, cuBLASLt's are column-major: it computes the transposed product with the factors swapped.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

GELU_AUX_BIAS, DGELU_BGRAD, BGRADB = 164, 208, 512  # cublasLtEpilogue_t
_TRANSA, _TRANSB, _EPILOGUE, _BIAS_POINTER, _AUX_POINTER, _AUX_LD = 3, 4, 7, 8, 11, 12  # cublasLtMatmulDescAttributes_t
_MAX_WORKSPACE, _MIN_ALIGNMENT = 1, (5, 6, 7, 8)  # cublasLtMatmulPreferenceAttributes_t: of A, B, C, D
_COMPUTE_32F, _R_32F, _R_16BF = 68, 0, 14
_WORKSPACE_BYTES = 32 * 2**20  # what NVIDIA recommends on Hopper, and torch takes there
_FUNCTIONS = (
    "cublasLtCreate",
    "cublasLtMatmulDescCreate",
    "cublasLtMatmulDescSetAttribute",
    "cublasLtMatrixLayoutCreate",
    "cublasLtMatmulPreferenceCreate",
    "cublasLtMatmulPreferenceDestroy",
    "cublasLtMatmulPreferenceSetAttribute",
    "cublasLtMatmulAlgoGetHeuristic",
    "cublasLtMatmul",
)


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algo", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class Operand(NamedTuple):
    """A row-major matrix as a factor: column-major it is transposed, unless it `is_transposed` already."""

    matrix: torch.Tensor
    is_transposed: bool = False


@dataclass
class _Plan:
    """A product of one shape: descriptors that live on, the algorithm, and its workspace."""

    descriptor: ctypes.c_void_p
    layouts: tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    heuristic: _Heuristic


_of_thread = threading.local()  # plans hold the pointers of a call: the backward runs in a thread of its own


def why_not() -> str | None:
    """None where products can be computed here, else the reason in words."""
    if not torch.version.cuda:
        return f"torch {torch.__version__} has no CUDA"
    try:
        missing = [name for name in _FUNCTIONS if not hasattr(library(), name)]
    except OSError:
        return f"torch has not loaded {_soname()}"
    return f"{_soname()} has no {missing[0]}" if missing else None


def _soname() -> str:
    return f"libcublasLt.so.{(torch.version.cuda or '0').split('.')[0]}"


@functools.cache
def library() -> ctypes.CDLL:
    """cuBLASLt as torch loaded it. Raises OSError where it did not."""
    return ctypes.CDLL(_soname(), mode=os.RTLD_NOLOAD | os.RTLD_NOW)


def product(
    first: Operand, second: Operand, out: torch.Tensor, epilogue: int, bias: torch.Tensor, aux: torch.Tensor | None
) -> None:
    """out = epilogue(first second), row-major, with the epilogue's second result in `bias` or `aux`.

    first: (M, K), or with is_transposed its transpose, (K, M); second: (K, N), or its transpose; out: (M, N); aux: like
    out. All bfloat16 and contiguous. bias: what the epilogue reads (GELU_AUX_BIAS) or writes (the others), of as many
    elements as out has columns, or rows with BGRADB. Sums in float32; deterministic.
    Raises RuntimeError where cuBLASLt has no such product.
    """
    a, b = second, first  # the transposed product
    key = (epilogue, *(_seen(t) for t in (a.matrix, b.matrix, out, bias, aux)), a.is_transposed, b.is_transposed)
    plans: dict[Any, _Plan] = _of_thread.__dict__.setdefault("plans", {})
    plan = plans.get(key)
    if plan is None:
        plan = plans[key] = _plan(a, b, out, epilogue, bias, aux)
    _point(plan, bias, aux)
    heuristic = plan.heuristic
    workspace = torch.empty(heuristic.workspace_bytes, dtype=torch.uint8, device=out.device)
    one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
    layout_a, layout_b, layout_out = plan.layouts
    _check(
        "cublasLtMatmul",
        _handle(out.device), plan.descriptor, ctypes.byref(one),
        _pointer(a.matrix), layout_a, _pointer(b.matrix), layout_b, ctypes.byref(zero),
        _pointer(out), layout_out, _pointer(out), layout_out,
        ctypes.byref(heuristic.algo), _pointer(workspace), ctypes.c_size_t(heuristic.workspace_bytes), _stream(out),
    )  # fmt: skip


def _seen(tensor: torch.Tensor | None) -> tuple[Any, ...] | None:
    """What the choice of an algorithm depends on."""
    if tensor is None:
        return None
    return tensor.shape, _alignment(tensor), tensor.device


def _alignment(tensor: torch.Tensor) -> int:
    """Of the address, at most the 16 bytes of the widest access: more would let the algorithm, and so the bits, depend
    on where a tensor happens to lie."""
    address = tensor.data_ptr()
    return 16 if address == 0 else min(16, address & -address)


def _plan(a: Operand, b: Operand, out: torch.Tensor, epilogue: int, bias: torch.Tensor, aux: Any) -> _Plan:
    descriptor = ctypes.c_void_p()
    _check("cublasLtMatmulDescCreate", ctypes.byref(descriptor), _COMPUTE_32F, _R_32F)
    _set(descriptor, _TRANSA, ctypes.c_int(a.is_transposed))
    _set(descriptor, _TRANSB, ctypes.c_int(b.is_transposed))
    _set(descriptor, _EPILOGUE, ctypes.c_int(epilogue))
    if aux is not None:
        _set(descriptor, _AUX_LD, ctypes.c_int64(aux.shape[1]))
    layouts = (_layout(a.matrix), _layout(b.matrix), _layout(out))
    plan = _Plan(descriptor, layouts, _Heuristic())
    _point(plan, bias, aux)
    preference = ctypes.c_void_p()
    _check("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
    wanted = [(_MAX_WORKSPACE, ctypes.c_uint64(_WORKSPACE_BYTES))]
    alignments = map(_alignment, (a.matrix, b.matrix, out, out))
    wanted += [(name, ctypes.c_uint32(n)) for name, n in zip(_MIN_ALIGNMENT, alignments, strict=True)]  # type: ignore[misc]
    for name, value in wanted:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        _check("cublasLtMatmulPreferenceSetAttribute", preference, name, ctypes.byref(value), size)
    found = ctypes.c_int()
    _check(
        "cublasLtMatmulAlgoGetHeuristic",
        _handle(out.device), descriptor, layouts[0], layouts[1], layouts[2], layouts[2],
        preference, 1, ctypes.byref(plan.heuristic), ctypes.byref(found),
    )  # fmt: skip
    _check("cublasLtMatmulPreferenceDestroy", preference)
    if not found.value:
        sizes = " x ".join(str(tuple(t.shape)) for t in (b.matrix, a.matrix))
        raise RuntimeError(f"cublaslt: there is no product {sizes} with epilogue {epilogue} on {out.device}")
    return plan


def _point(plan: _Plan, bias: torch.Tensor, aux: torch.Tensor | None) -> None:
    _set(plan.descriptor, _BIAS_POINTER, _pointer(bias))
    if aux is not None:
        _set(plan.descriptor, _AUX_POINTER, _pointer(aux))


def _layout(matrix: torch.Tensor) -> ctypes.c_void_p:
    rows, columns = matrix.shape
    layout = ctypes.c_void_p()
    size = (ctypes.c_uint64(columns), ctypes.c_uint64(rows), ctypes.c_int64(columns))  # the transpose, column-major
    _check("cublasLtMatrixLayoutCreate", ctypes.byref(layout), _R_16BF, *size)
    return layout


def _handle(device: torch.device) -> ctypes.c_void_p:
    """One for each device and thread; it lives as long as the process."""
    handles: dict[torch.device, ctypes.c_void_p] = _of_thread.__dict__.setdefault("handles", {})
    if device not in handles:
        handle = ctypes.c_void_p()
        _check("cublasLtCreate", ctypes.byref(handle))
        handles[device] = handle
    return handles[device]


def _stream(tensor: torch.Tensor) -> ctypes.c_void_p:
    is_cuda = tensor.device.type == "cuda"
    return ctypes.c_void_p(torch.cuda.current_stream(tensor.device).cuda_stream if is_cuda else 0)


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _set(descriptor: ctypes.c_void_p, attribute: int, value: Any) -> None:
    size = ctypes.c_size_t(ctypes.sizeof(value))
    _check("cublasLtMatmulDescSetAttribute", descriptor, attribute, ctypes.byref(value), size)


def _check(function: str, *arguments: Any) -> None:
    status = getattr(library(), function)(*arguments)
    if status:
        raise RuntimeError(f"cublaslt: {function} failed with status {status}")
