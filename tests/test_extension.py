"""The compiled extension: its declarations, its instruction sets, how it is built and what is said when it is not."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from repository import ROOT

from sra2_fast import backends, cli, info
from sra2_fast.ops import adamw_ema  # noqa: F401  (registers its operators)
from sra2_fast.ops.registry import ADAPTERS

pytestmark = pytest.mark.slow

COMPILER = shutil.which("c++")
NVCC = shutil.which("nvcc", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
needs_extension = pytest.mark.skipif(not backends.has_extension("cpu"), reason="the extension is not built")

# Stands in for the kernels where only the building is tested: a second instead of a minute.
PROBE = """
namespace sra2 { namespace SRA2_ISA { extern const int probe; const int probe = sizeof(SRA2_NAME); } }
"""


@needs_compiler
def test_declarations_of_torchs_abi_match_its_headers(tmp_path):
    source = tmp_path / "both.cpp"
    headers = ("torch/csrc/inductor/aoti_torch/c/shim.h", "torch/csrc/stable/c/shim.h")
    source.write_text("".join(f"#include <{h}>\n" for h in headers) + '#include "torch_abi.h"\nint main() {}\n')
    include = Path(torch.__file__).parent / "include"
    command = [COMPILER, "-std=c++17", "-fsyntax-only", f"-I{include}", f"-I{ROOT / 'csrc'}"]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wrong = (ROOT / "csrc" / "torch_abi.h").read_text().replace("int64_t* ret_dim", "int32_t* ret_dim")
    source.write_text(source.read_text().replace('#include "torch_abi.h"', wrong.replace("#pragma once", "")))
    assert subprocess.run([*command, str(source)], capture_output=True).returncode != 0


@needs_extension
@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_a_lesser_instruction_set_passes_the_same_tests(isa):
    if isa == "avx2" and backends.cpu_instruction_set() == "base":
        pytest.skip("this CPU has no AVX2")
    files = ["tests/test_layer_norm_modulate.py", "tests/test_gated_residual_layer_norm_modulate.py"]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", "against_reference and (shape1 or shape3) or bit_for_bit"]
    code = (
        "import sys, pytest\nfrom sra2_fast import backends\n"
        f"assert backends.cpu_instruction_set() == {isa!r}\n"
        f"sys.exit(pytest.main({[*options, *files]}))"
    )
    environment = {**os.environ, "SRA2_CPU_ISA": isa, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what the build reads, with a probe instead of the kernels."""
    copy = tmp_path / "checkout"
    files = ["setup.py", "CMakeLists.txt", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE"]
    files += ["sra2_fast/py.typed"]
    files += [str(p.relative_to(ROOT)) for p in [*ROOT.glob("sra2_fast/**/*.py"), *ROOT.glob("kernels/*.py")]]
    files += [f"csrc/{name}" for name in ("build_backend.py", "torch_stub.c", "sra2_c_api.h", "dispatch.h")]
    files += ["csrc/dispatch_cpu.cpp", *(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*.flags"))]
    for name in files:
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    (copy / "csrc" / "probe_isa.cpp").write_text(PROBE.replace("SRA2_NAME", "int"))
    return copy


def build(checkout: Path, **environment: str) -> tuple[subprocess.CompletedProcess, dict[str, str]]:
    """`setup.py build_ext --inplace`, and what it wrote about it."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {**os.environ, "SRA2_BUILD_CUDA": "0", "SRA2_BUILD_EXT": "auto", **environment}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    record = checkout / "sra2_fast" / "_build.json"
    return done, json.loads(record.read_text()) if record.exists() else {}


def without_cmake(tmp_path: Path) -> str:
    """A PATH with the compiler's tools and no cmake."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("c++", "cc", "as", "ld", "nvidia-smi"):
        if shutil.which(name):
            (tools / name).symlink_to(shutil.which(name))
    return str(tools)


def loads(checkout: Path) -> bool:
    """Whether the library that was built loads, next to torch, and answers."""
    library = ctypes.CDLL(str(checkout / "sra2_fast" / "_C_cpu.so"))
    library.sra2_cpu_isa.restype = ctypes.c_char_p
    return library.sra2_cpu_isa().decode() in ("base", "avx2", "avx512")


@needs_compiler
def test_build_with_cmake(checkout):
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    done, record = build(checkout)
    assert done.returncode == 0, done.stderr
    assert record["cpu"].startswith("built with") and loads(checkout)
    assert record["cuda"] == "not built: switched off when it was installed (SRA2_BUILD_EXT or SRA2_BUILD_CUDA = 0)"


@needs_compiler
def test_build_with_nothing_but_a_compiler(checkout, tmp_path, monkeypatch):
    code = (checkout / "setup.py").read_text().replace("/usr/local/cuda/bin", "/nowhere")
    (checkout / "setup.py").write_text(code.replace("str(Path(sys.executable).parent)", '"/nowhere"'))
    done, record = build(checkout, PATH=without_cmake(tmp_path), SRA2_BUILD_CUDA="auto")
    assert done.returncode == 0, done.stderr
    assert record["cpu"].startswith("built with") and loads(checkout)
    assert record["cuda"] == "not built: no nvcc was found"


def test_no_compiler_does_not_fail_the_install(checkout):
    done, record = build(checkout, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert record["cpu"] == "not built: no C++ compiler (no-such-compiler) was found"


def test_no_compiler_fails_where_the_extension_is_required(checkout):
    done, _ = build(checkout, CXX="no-such-compiler", SRA2_BUILD_EXT="require")
    assert done.returncode != 0
    assert "sra2_fast: the cpu part is required, but was not built: no C++ compiler" in done.stderr


@needs_compiler
def test_a_source_that_fails_is_reported(checkout):
    (checkout / "csrc" / "broken_cpu.cpp").write_text("#error this one is broken\n")
    done, record = build(checkout)
    assert done.returncode == 0, done.stderr
    assert record["cpu"].startswith("not built: ") and "this one is broken" in record["cpu"]


@needs_compiler
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_a_cuda_source_that_fails_leaves_the_cpu_part(checkout):
    (checkout / "csrc" / "broken_cuda.cu").write_text("#error this kernel is broken\n")
    done, record = build(checkout, SRA2_BUILD_CUDA="auto", SRA2_CUDA_ARCHS="80-real")
    assert done.returncode == 0, done.stderr
    assert record["cpu"].startswith("built with") and loads(checkout)
    assert record["cuda"].startswith("not built: ") and "this kernel is broken" in record["cuda"]
    assert not (checkout / "sra2_fast" / "_C_cuda.so").exists()


@pytest.mark.slow
@needs_compiler
def test_wheel_holds_the_library_and_every_package(checkout, tmp_path):
    """Built by pip in isolation, without a network; used from a folder with nothing else of ours."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-index",
        "-w",
        str(tmp_path),
        str(checkout),
    ]
    done = subprocess.run(command, env={**os.environ, "SRA2_BUILD_CUDA": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    ours = {str(p.relative_to(ROOT)) for p in (ROOT / "sra2_fast").rglob("*.py")}
    ours |= {f"sra2_fast/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert ours | {"sra2_fast/_C_cpu.so", "sra2_fast/_build.json", "sra2_fast/py.typed"} <= names
    code = "import sra2_fast, sra2_fast.kernels, sra2_fast.backends as b; print(sra2_fast.kernels.__path__[0])"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "site" / "sra2_fast" / "kernels"), done.stderr


@pytest.fixture
def other_folder(tmp_path, monkeypatch) -> Path:
    """The package's folder as backends sees it, empty; what was asked before is forgotten, now and after."""
    monkeypatch.setattr(backends, "_FOLDER", tmp_path)
    cached = (backends._load_extension, backends.cpu_instruction_set, backends._driver_version, backends.choose)
    for function in cached:
        monkeypatch.setattr(backends, function.__name__, function.__wrapped__)
    return tmp_path


def test_status_says_why_the_extension_is_missing(other_folder):
    assert backends.status()["cpu_extension"] == "not built: the package was not installed (pip install -e .)"
    assert not backends.has_extension("cpu")
    (other_folder / "_build.json").write_text('{"cpu": "not built: no C++ compiler (c++) was found"}')
    assert backends.status()["cpu_extension"] == "not built: no C++ compiler (c++) was found"
    why = "c++: not built: no C++ compiler (c++) was found"
    assert backends.status()["adamw_ema on cpu"] == f"pytorch ({why})"
    (other_folder / "_build.json").write_text("{")
    assert "_build.json is unreadable" in backends.status()["cpu_extension"]


def test_a_library_that_does_not_load_is_reported(other_folder, monkeypatch):
    (other_folder / "_C_cpu.so").write_bytes(b"not a library")
    assert "cannot load _C_cpu.so" in backends.status()["cpu_extension"]
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    assert not backends.has_extension("cpu")
    assert backends.status()["cpu_extension"].startswith("not loaded: torch 2.9.1 is older than 2.10")


@needs_compiler
def test_a_driver_that_is_too_old_is_reported(other_folder, monkeypatch):
    source = other_folder / "driver.c"
    operators = f"int sra2_operators(void) {{ return {backends._OPERATORS}; }}\n"
    source.write_text(operators + "int sra2_cuda_driver_needed(void) { return 13000; }\n")
    library = other_folder / "_C_cuda.so"
    subprocess.run([COMPILER, "-x", "c", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "has no CUDA" in backends.status()["cuda_extension"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no usable GPU or driver" in backends.status()["cuda_extension"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "_driver_version", lambda: "535.1")
    monkeypatch.setattr(backends, "_why_not_importable", lambda name: "not installed")
    message = "not loaded: built with CUDA 13.0, the driver (535.1) is too old for it"
    assert not backends.has_extension("cuda")
    assert backends.choose("layer_norm_modulate", "cuda").why_not_better.endswith(message)


@needs_compiler
@pytest.mark.parametrize("source", ["int unrelated;", "int sra2_operators(void) { return 1; }"], ids=["none", "older"])
def test_a_library_of_other_sources_is_not_loaded(other_folder, source):
    """After a pull without an install the kernels read the arguments of another schema, and the process died."""
    (other_folder / "library.c").write_text(source)
    library = other_folder / "_C_cpu.so"
    subprocess.run([COMPILER, "-x", "c", "-shared", "-fPIC", other_folder / "library.c", "-o", library], check=True)
    assert not backends.has_extension("cpu")
    wanted = "not loaded: _C_cpu.so was built from other sources; install again: pip install -e ."
    assert backends.status()["cpu_extension"].startswith(wanted)


def test_the_number_of_the_operators_is_raised_with_their_schemas():
    """Schemas that csrc/ implements. Where this fails: raise SRA2_OPERATORS and backends._OPERATORS, then the hash."""
    with_kernels = [name for name in ADAPTERS if not name.startswith("linear")]
    schemas = "\n".join(str(getattr(torch.ops.sra2_fast, name).default._schema) for name in sorted(with_kernels))
    recorded = {2: "b9b6c5d6952b1a1e"}
    assert hashlib.sha256(schemas.encode()).hexdigest()[:16] == recorded[backends._OPERATORS]
    header = (ROOT / "csrc" / "sra2_c_api.h").read_text()
    assert f"#define SRA2_OPERATORS {backends._OPERATORS}\n" in header


def test_info_prints_everything_status_knows(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    known = {**backends.status(), **info.measured()}
    for name, value in known.items():
        assert name in printed and value in printed
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == known


def test_ops_without_the_extension_are_eager(tmp_path):
    """In a process of its own: which backend there is, is asked once."""
    code = (
        "import torch\nfrom sra2_fast import backends\nbackends._FOLDER = __import__('pathlib').Path('/nowhere')\n"
        "from sra2_fast import ops\nfrom sra2_fast.ops.layer_norm_modulate import eager\n"
        "x, m = torch.randn(2, 3, 8), torch.randn(2, 16, requires_grad=True)\n"
        "y = ops.layer_norm_modulate(x, *m.chunk(2, 1))\n"
        "assert torch.equal(y, eager(x, *m.chunk(2, 1)))\ny.sum().backward()\n"
        "with torch.autocast('cpu', torch.bfloat16):\n"
        "    a, b = ops.gated_residual_layer_norm_modulate(x, x, m[:, :8], *m.chunk(2, 1))\n"
        "assert (a.dtype, b.dtype) == (torch.float32, torch.bfloat16)\nprint(backends.has_extension('cpu'))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
