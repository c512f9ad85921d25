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

pytestmark = pytest.mark.slow

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


class Norm(ctypes.Structure):
    """sra2_norm; what is not named is null."""

    _rows_ = ["x", "branch", "gate", "shift", "scale", "x_new", "y"]
    _rows_ += ["dx_new", "dy", "dx", "dbranch", "dgate", "dshift", "dscale"]
    _pointers_ = ("mean", "rstd", "workspace")
    _fields_ = [
        ("shape", Shape),
        *((name, Rows) for name in _rows_),
        *((name, ctypes.c_void_p) for name in _pointers_),
        ("eps", ctypes.c_float),
    ]

    @classmethod
    def of(cls, shape: tuple[int, int, int], **tensors: torch.Tensor | None) -> Norm:
        rows = {name: Rows.of(t) for name, t in tensors.items() if name in cls._rows_}
        pointers = {name: t.data_ptr() for name, t in tensors.items() if name in cls._pointers_}
        return cls(shape=Shape(*shape), eps=EPS, **rows, **pointers)


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


def forward(library, shape, **tensors) -> None:
    assert library.sra2_norm_fwd_cuda(ctypes.byref(Norm.of(shape, **tensors)), None) == 0


def backward(library, shape, **tensors) -> None:
    """In a workspace filled with NaN: a sum that reads what was not written shows."""
    space = torch.full((library.sra2_norm_workspace(Shape(*shape)),), float("nan"))
    assert library.sra2_norm_bwd_cuda(ctypes.byref(Norm.of(shape, workspace=space, **tensors)), None) == 0


@pytest.mark.parametrize(("shape", "dtypes"), CASES)
def test_layer_norm_modulate(library, shape, dtypes):
    x, _, _, shift, scale, dy, _ = make(shape, dtypes)
    b, n, d = shape
    y, mean, rstd = torch.empty_like(dy), torch.empty(b, n), torch.empty(b, n)
    forward(library, shape, x=x, shift=shift, scale=scale, y=y, mean=mean, rstd=rstd)
    want_y = reference.forward(x.double(), shift.double(), scale.double(), EPS)
    assert_close(y, want_y, y.dtype, 5 if y.dtype == F32 else 1, d, name="y")

    dx, dshift, dscale = torch.empty_like(x), torch.empty(b, d).to(dtypes[2]), torch.empty(b, d).to(dtypes[2])
    gradients = {"dx": dx, "dshift": dshift, "dscale": dscale}
    backward(library, shape, dy=dy, x=x, scale=scale, mean=mean, rstd=rstd, **gradients)
    want = reference.backward(dy.double(), x.double(), scale.double(), EPS)
    terms = (dy.double() * reference.normalize(x.double(), EPS)[0]).abs().sum(1)
    assert_close(dx, want[0], x.dtype, 9 if x.dtype == F32 else 1, d, name="dx")
    assert_close(dshift, want[1], dtypes[2], 3, n, dy.double().abs().sum(1), name="dshift")
    assert_close(dscale, want[2], dtypes[2], 3, n + d, terms, name="dscale")


def check_gated(library, shape, dtypes, has_dx_new, samples=slice(None)):
    """Forward and backward against the reference, for those samples."""
    x, branch, gate, shift, scale, dy, dx_new = make(shape, dtypes)
    b, n, d = shape
    x_new, y, mean, rstd = torch.empty_like(x), torch.empty_like(dy), torch.empty(b, n), torch.empty(b, n)
    modulation = {"gate": gate, "shift": shift, "scale": scale}
    forward(library, shape, x=x, branch=branch, **modulation, x_new=x_new, y=y, mean=mean, rstd=rstd)
    exact = [t[samples].double() for t in (x, branch, gate, shift, scale)]
    assert_close(x_new[samples], gated_reference.forward(*exact, EPS)[0], x.dtype, 2, name="x_new")
    stream = x_new[samples].double()
    assert_close(
        y[samples], reference.forward(stream, *exact[3:], EPS), y.dtype, 5 if y.dtype == F32 else 1, d, name="y"
    )

    outputs = [torch.empty_like(x), torch.empty_like(branch), *(torch.empty(b, d).to(dtypes[2]) for _ in range(3))]
    gradients = dict(zip(("dx", "dbranch", "dgate", "dshift", "dscale"), outputs, strict=True))
    arrives = {"dx_new": dx_new if has_dx_new else None, "dy": dy}
    backward(library, shape, **arrives, x=x_new, branch=branch, **modulation, mean=mean, rstd=rstd, **gradients)
    dx_new, dy = dx_new[samples].double() if has_dx_new else None, dy[samples].double()
    want = gated_reference.backward(dx_new, dy, stream, *exact[1:3], exact[4], EPS)
    terms = (None, None, exact[1] * want[0], dy, dy * reference.normalize(stream, EPS)[0])
    for (name, got), true, summed in zip(gradients.items(), want, terms, strict=True):
        absolute = None if summed is None else summed.abs().sum(1)
        assert_close(got[samples], true, got.dtype, 10 if got.dtype == F32 else 1, n + d, absolute, name=name)


@pytest.mark.parametrize(("shape", "dtypes"), CASES)
@pytest.mark.parametrize("has_dx_new", [True, False])
def test_gated_residual_layer_norm_modulate(library, shape, dtypes, has_dx_new):
    check_gated(library, shape, dtypes, has_dx_new)


def test_outputs_that_are_not_wanted_are_not_written(library):
    shape = (2, 5, 64)
    x, _, _, _, scale, dy, _ = make(shape, (F32,) * 4)
    dscale = torch.empty(2, 64)
    backward(library, shape, dy=dy, x=x, scale=scale, mean=torch.zeros(2, 5), rstd=torch.ones(2, 5), dscale=dscale)
    assert_close(dscale, (dy * x).double().sum(1), F32, 3, 5, (dy * x).double().abs().sum(1))


def test_a_batch_of_more_samples_than_a_grid_holds_in_y(library):
    """CUDA's grids end at 65,535 blocks in y and z: a backward that counted samples there was refused."""
    run = ctypes.c_int64.in_dll(library, "cuda_on_cpu_x")
    everything, run.value = run.value, 64  # a grid is taken or refused whole; the last of it are run
    try:
        check_gated(library, (65_600, 1, 8), (F32,) * 4, True, slice(-64, None))
    finally:
        run.value = everything


def test_samples_without_tokens_have_zero_gradients(library):
    """A grid of no blocks is refused by CUDA, and there is nothing to launch; the sums are zeros all the same."""
    shape = (2, 0, 64)
    x, branch, gate, shift, scale, dy, _ = make(shape, (F32,) * 4)
    statistics = {"mean": torch.empty(2, 0), "rstd": torch.empty(2, 0)}
    forward(library, shape, x=x, branch=branch, gate=gate, shift=shift, scale=scale, x_new=x, y=dy, **statistics)
    sums = {name: torch.full((2, 64), float("nan")) for name in ("dgate", "dshift", "dscale")}
    backward(library, shape, dy=dy, x=x, branch=branch, gate=gate, scale=scale, **statistics, **sums)
    assert not any(t.count_nonzero() for t in sums.values())


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
