"""The CUDA C++ kernels without a GPU: their arithmetic run on the CPU, their compilation by nvcc.

tests/cuda_on_cpu/ stands in for CUDA's headers, so that the same .cu files compile as C++; what that cannot show
(races, alignment faults, speed) is for tests/gpu.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess

import pytest
import torch
from repository import ROOT
from tolerance import assert_close

from sra2_fast.reference import gated_residual_layer_norm_modulate as gated_reference
from sra2_fast.reference import layer_norm_modulate as reference

SOURCES = sorted((ROOT / "csrc").glob("*_cuda.cu"))
NVCC = shutil.which("nvcc", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin")
F32, BF16 = torch.float32, torch.bfloat16
EPS = 1e-6


class Shape(ctypes.Structure):
    """sra2_shape of csrc/sra2_c_api.h."""

    _fields_ = [("B", ctypes.c_int64), ("N", ctypes.c_int64), ("D", ctypes.c_int64)]


class Rows(ctypes.Structure):
    """sra2_rows."""

    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("dtype", ctypes.c_int32)]

    @classmethod
    def of(cls, t: torch.Tensor | None) -> Rows:
        return cls(None, 0, 0) if t is None else cls(t.data_ptr(), t.stride(-2), int(t.dtype == BF16))


def pointer(t: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    out = tmp_path_factory.mktemp("cuda_on_cpu") / "kernels.so"
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    command += [f"-I{ROOT / 'tests' / 'cuda_on_cpu'}", f"-I{ROOT / 'csrc'}", "-x", "c++", *map(str, SOURCES)]
    subprocess.run([*command, "-o", str(out)], check=True)
    loaded = ctypes.CDLL(str(out))
    loaded.sra2_norm_workspace.restype = ctypes.c_int64
    return loaded


# shape, dtypes of x, branch, modulation, y; the unaligned sizes take the element-wise kernel
CASES = [
    ((2, 5, 64), (F32, F32, F32, F32)),
    ((2, 9, 520), (BF16, BF16, BF16, BF16)),
    ((1, 5, 520), (F32, BF16, BF16, BF16)),
    ((2, 5, 37), (BF16, F32, F32, BF16)),
    ((1, 3, 2056), (F32, BF16, F32, F32)),
    ((1, 3, 2051), (BF16, BF16, BF16, F32)),
    ((3, 1, 8), (F32, F32, F32, BF16)),
]


def make(shape, dtypes):
    b, _, d = shape
    x, branch = torch.randn(shape).to(dtypes[0]), torch.randn(shape).to(dtypes[1])
    gate, shift, scale = torch.randn(b, 4 * d).to(dtypes[2])[:, d:].chunk(3, 1)
    return x, branch, gate, shift, scale, torch.randn(shape).to(dtypes[3]), torch.randn(shape).to(dtypes[0])


def workspace(library, shape) -> torch.Tensor:
    """Filled with NaN: a sum that reads what was not written shows."""
    return torch.full((library.sra2_norm_workspace(Shape(*shape)),), float("nan"))


@pytest.mark.parametrize(("shape", "dtypes"), CASES)
def test_layer_norm_modulate(library, shape, dtypes):
    x, _, _, shift, scale, dy, _ = make(shape, dtypes)
    b, n, d = shape
    y, mean, rstd = torch.empty_like(dy), torch.empty(b, n), torch.empty(b, n)
    error = library.sra2_layer_norm_modulate_fwd_cuda(
        Shape(*shape),
        *map(Rows.of, (x, shift, scale)),
        ctypes.c_float(EPS),
        Rows.of(y),
        pointer(mean),
        pointer(rstd),
        None,
    )
    assert error == 0
    want_y = reference.forward(x.double(), shift.double(), scale.double(), EPS)
    assert_close(y, want_y, y.dtype, 5 if y.dtype == F32 else 1, d, name="y")

    dx, dshift, dscale = torch.empty_like(x), torch.empty(b, d).to(dtypes[2]), torch.empty(b, d).to(dtypes[2])
    rows = map(Rows.of, (dy, x, scale))
    space = workspace(library, shape)
    error = library.sra2_layer_norm_modulate_bwd_cuda(
        Shape(*shape), *rows, pointer(mean), pointer(rstd), *map(Rows.of, (dx, dshift, dscale)), pointer(space), None
    )
    assert error == 0
    want = reference.backward(dy.double(), x.double(), scale.double(), EPS)
    terms = (dy.double() * reference.normalize(x.double(), EPS)[0]).abs().sum(1)
    assert_close(dx, want[0], x.dtype, 9 if x.dtype == F32 else 1, d, name="dx")
    assert_close(dshift, want[1], dtypes[2], 3, n, dy.double().abs().sum(1), name="dshift")
    assert_close(dscale, want[2], dtypes[2], 3, n + d, terms, name="dscale")


@pytest.mark.parametrize(("shape", "dtypes"), CASES)
@pytest.mark.parametrize("has_dx_new", [True, False])
def test_gated_residual_layer_norm_modulate(library, shape, dtypes, has_dx_new):
    x, branch, gate, shift, scale, dy, dx_new = make(shape, dtypes)
    b, n, d = shape
    x_new, y, mean, rstd = torch.empty_like(x), torch.empty_like(dy), torch.empty(b, n), torch.empty(b, n)
    inputs = map(Rows.of, (x, branch, gate, shift, scale))
    error = library.sra2_gated_residual_layer_norm_modulate_fwd_cuda(
        Shape(*shape), *inputs, ctypes.c_float(EPS), Rows.of(x_new), Rows.of(y), pointer(mean), pointer(rstd), None
    )
    assert error == 0
    exact = [t.double() for t in (x, branch, gate, shift, scale)]
    assert_close(x_new, gated_reference.forward(*exact, EPS)[0], x.dtype, 2, name="x_new")
    want_y = reference.forward(x_new.double(), *exact[3:], EPS)
    assert_close(y, want_y, y.dtype, 5 if y.dtype == F32 else 1, d, name="y")

    outputs = [torch.empty_like(x), torch.empty_like(branch), *(torch.empty(b, d).to(dtypes[2]) for _ in range(3))]
    arguments = map(Rows.of, (dx_new if has_dx_new else None, dy, x_new, branch, gate, scale))
    space = workspace(library, shape)
    error = library.sra2_gated_residual_layer_norm_modulate_bwd_cuda(
        Shape(*shape), *arguments, pointer(mean), pointer(rstd), *map(Rows.of, outputs), pointer(space), None
    )
    assert error == 0
    arrives = dx_new.double() if has_dx_new else None
    want = gated_reference.backward(arrives, dy.double(), x_new.double(), *exact[1:3], exact[4], EPS)
    h = reference.normalize(x_new.double(), EPS)[0]
    terms = (None, None, exact[1] * want[0], dy.double(), dy.double() * h)
    for name, got, true, summed in zip(
        ("dx", "dbranch", "dgate", "dshift", "dscale"), outputs, want, terms, strict=True
    ):
        absolute = None if summed is None else summed.abs().sum(1)
        assert_close(got, true, got.dtype, 10 if got.dtype == F32 else 1, n + d, absolute, name=name)


def test_outputs_that_are_not_wanted_are_not_written(library):
    shape = (2, 5, 64)
    x, _, _, _, scale, dy, _ = make(shape, (F32,) * 4)
    mean, rstd, space = torch.zeros(2, 5), torch.ones(2, 5), workspace(library, shape)
    dscale = torch.empty(2, 64)
    rows = [Rows.of(t) for t in (None, None, dscale)]
    library.sra2_layer_norm_modulate_bwd_cuda(
        Shape(*shape), *map(Rows.of, (dy, x, scale)), pointer(mean), pointer(rstd), *rows, pointer(space), None
    )
    assert_close(dscale, (dy * x).double().sum(1), F32, 3, 5, (dy * x).double().abs().sum(1))


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_nvcc_compiles_without_spills(source, tmp_path):
    command = [NVCC, "-std=c++17", "-O3", "-Xptxas=-v", "--threads=2", "-c", str(source), "-o", str(tmp_path / "out.o")]
    for arch in (80, 90):
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores", done.stdout + done.stderr)
    assert spills and not any(map(int, spills))
