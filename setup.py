"""Builds the C++/CUDA extension of sra2_fast, without torch; everything else about the package is in pyproject.toml.

The extension is optional: without a compiler, or where one part fails, the install succeeds, PyTorch's own ops do the
work, and the reason is written to sra2_fast/_build.json for `sra2-fast info`, because pip hides build output.

SRA2_BUILD_EXT    auto (default), 0: build nothing, require: fail where the CPU part cannot be built
SRA2_BUILD_CUDA   auto (default: where nvcc is found), 0, require
SRA2_CUDA_ARCHS   CMake's list, as "80-real;90"; default: the visible GPU's, else sm_80 and sm_90
MAX_JOBS          compilations at once; default: the number of CPUs
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
DEFAULT_CUDA_ARCHS = "80-real;90"
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent), "/usr/local/cuda/bin"])


class NotBuilt(Exception):
    """Why a part of the extension is not there."""


def run(*command: object, environment: dict[str, str] | None = None) -> str:
    """Run a command; its output, or NotBuilt with the lines that matter."""
    done = subprocess.run(
        [str(c) for c in command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        telling = [line for line in lines if re.search(r"error|fatal|not found", line, re.I)] or lines
        raise NotBuilt(f"{Path(str(command[0])).name} failed: " + " | ".join(telling[:4])[:1000])
    return done.stdout


def find_tool(name: str) -> str | None:
    return shutil.which(name, path=SEARCH_PATH)


def find_nvcc() -> str | None:
    for variable, below in (("CUDACXX", ""), ("CUDA_HOME", "bin/nvcc"), ("CUDA_PATH", "bin/nvcc")):
        if os.environ.get(variable):
            return shutil.which(str(Path(os.environ[variable], below)))
    return find_tool("nvcc")


def find_cmake() -> tuple[list[str], dict[str, str]] | None:
    """A cmake that answers, and the environment it answers in.

    pip's cmake is a Python script that fails under build isolation, unless PYTHONPATH is cleared.
    """
    without_path = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for command in ([find_tool("cmake") or "cmake"], [sys.executable, "-m", "cmake"]):
        for environment in (dict(os.environ), without_path):
            try:
                run(*command, "--version", environment=environment)
                return command, environment
            except (OSError, NotBuilt):
                continue
    return None


def visible_archs() -> str:
    """The compute capabilities of this machine's GPUs, else the default list."""
    try:
        found = run("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    except (OSError, NotBuilt):
        return DEFAULT_CUDA_ARCHS
    capabilities = sorted(set(re.findall(r"^(\d+)\.(\d+)\s*$", found, re.M)))
    return ";".join(f"{major}{minor}" for major, minor in capabilities) or DEFAULT_CUDA_ARCHS


def build_with_cmake(kind: str, into: Path, *options: str) -> None:
    found = find_cmake()
    if found is None:
        raise NotBuilt("no cmake was found")
    cmake, environment = found
    tree = ROOT / "build" / f"cmake-{kind}"  # kept: the next install compiles only what changed
    configure = [*cmake, "-S", ROOT, "-B", tree, f"-DCMAKE_INSTALL_PREFIX={into}", *options]
    if find_tool("ninja"):
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}"]
    try:
        run(*configure, environment=environment)
    except NotBuilt:
        if not tree.exists():
            raise
        shutil.rmtree(tree)  # of another generator, compiler or checkout
        run(*configure, environment=environment)
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    run(*cmake, "--build", tree, "-j", jobs, environment=environment)
    run(*cmake, "--install", tree, environment=environment)


def build_cpu_directly(into: Path) -> None:
    """What CMakeLists.txt does for the CPU part, with nothing but a C++ compiler."""
    compiler = os.environ.get("CXX", "c++")
    tree = ROOT / "build" / "direct"
    tree.mkdir(parents=True, exist_ok=True)
    common = [compiler, f"@{CSRC / 'common.flags'}"]
    x86 = platform.machine() in ("x86_64", "AMD64")
    objects = []
    for source in sorted([*CSRC.glob("*_isa.cpp"), *CSRC.glob("*_cpu.cpp"), *CSRC.glob("*_torch.cpp")]):
        per_isa = source.stem.endswith("_isa")
        for isa in ("base", "avx2", "avx512") if per_isa and x86 else ("base",):
            flags = [f"-DSRA2_ISA={isa}"] if per_isa else ["-DSRA2_X86_DISPATCH"] if x86 else []
            flags += [f"@{CSRC / isa}.flags"] if isa != "base" else []
            objects.append(tree / f"{source.stem}.{isa}.o")
            run(*common, *flags, "-c", source, "-o", objects[-1])
    stub = tree / "libtorch_cpu.so"
    run(compiler, "-shared", "-x", "c", CSRC / "torch_stub.c", "-o", stub, "-Wl,-soname,libtorch_cpu.so")
    into.mkdir(parents=True, exist_ok=True)
    link = ["-shared", "-Wl,--no-as-needed", stub, "-Wl,--as-needed", "-Wl,--exclude-libs,ALL"]
    run(compiler, *objects, *link, "-o", into / "_C_cpu.so")


def build_cpu(into: Path) -> str:
    compiler = os.environ.get("CXX", "c++")
    if not find_tool(compiler):
        raise NotBuilt(f"no C++ compiler ({compiler}) was found")
    if find_cmake():
        build_with_cmake("cpu", into, "-DSRA2_CPU=ON", "-DSRA2_CUDA=OFF")
    else:
        build_cpu_directly(into)
    return "built with " + run(compiler, "--version").splitlines()[0]


def build_cuda(into: Path) -> str:
    nvcc = find_nvcc()
    if nvcc is None:
        raise NotBuilt("no nvcc was found")
    archs = os.environ.get("SRA2_CUDA_ARCHS") or visible_archs()
    options = ["-DSRA2_CPU=OFF", "-DSRA2_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DSRA2_CUDA_ARCHS={archs}"]
    build_with_cmake("cuda", into, *options)
    release = re.search(r"release (\S+),", run(nvcc, "--version"))
    return f"built with CUDA {release.group(1) if release else '(unknown)'} for {archs}"


class BuildExtension(build_ext):
    """Both parts into the package's folder, and why one is missing beside them."""

    def get_ext_filename(self, fullname: str) -> str:  # no Python inside, so no ABI tag
        return fullname.replace(".", os.sep) + ".so"

    def run(self) -> None:
        into = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "sra2_fast"
        into.mkdir(parents=True, exist_ok=True)
        state = {}
        all_parts = os.environ.get("SRA2_BUILD_EXT", "auto")
        for kind, build in (("cpu", build_cpu), ("cuda", build_cuda)):
            wanted = os.environ.get("SRA2_BUILD_CUDA", "auto") if kind == "cuda" else all_parts
            library = into / f"_C_{kind}.so"
            library.unlink(missing_ok=True)
            state[kind] = self.build_part(build, into, "0" if all_parts == "0" else wanted, kind)
            print(f"sra2_fast: the {kind} part: {state[kind]}", flush=True)
        (into / "_build.json").write_text(json.dumps(state, indent=1) + "\n")

    def build_part(self, build: Callable[[Path], str], into: Path, wanted: str, kind: str) -> str:
        if wanted == "0":
            return "not built: switched off when it was installed (SRA2_BUILD_EXT or SRA2_BUILD_CUDA = 0)"
        start = time.monotonic()
        try:
            return f"{build(into)} in {time.monotonic() - start:.0f} s"
        except (NotBuilt, OSError) as error:
            if wanted == "require":
                raise SystemExit(f"sra2_fast: the {kind} part is required, but was not built: {error}") from error
            return f"not built: {error}"

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "sra2_fast"
        return [str(folder / f) for f in ("_build.json", "_C_cpu.so", "_C_cuda.so") if (folder / f).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def copy_extensions_to_source(self) -> None:  # run() has put them there
        pass


class PlatformWheel(bdist_wheel):
    """Any Python 3, this platform: the libraries know torch's C ABI and no Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def packages() -> dict[str, str]:
    """Every package and its folder: kernels/ is sra2_fast.kernels."""
    found = {".".join(p.parent.relative_to(ROOT).parts): p.parent for p in (ROOT / "sra2_fast").rglob("__init__.py")}
    found["sra2_fast.kernels"] = ROOT / "kernels"
    return {name: str(folder.relative_to(ROOT)) for name, folder in sorted(found.items())}


def version() -> str:
    text = (ROOT / "sra2_fast" / "__init__.py").read_text()
    found = re.search(r'^__version__ = "(.+)"$', text, re.M)
    assert found, "sra2_fast/__init__.py has no __version__"
    return found.group(1)


if __name__ == "__main__":
    setup(
        version=version(),
        packages=list(packages()),
        package_dir=packages(),
        package_data={"sra2_fast": ["py.typed"]},
        ext_modules=[Extension("sra2_fast._C_cpu", [], optional=True)],
        cmdclass={"build_ext": BuildExtension, "bdist_wheel": PlatformWheel},
    )
