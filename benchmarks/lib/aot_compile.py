"""Compile what the real Triton launchers launch, for a GPU that is not there, and read the machine code.

`compile_only(arch)` puts a fake driver in place: launchers called on CPU tensors specialise and compile their kernels
as on the device, and nothing runs. The fake driver stays for the rest of the process, so use one of its own.
`inspect` then counts registers, spills, shared memory and instructions with the disassembler in Triton's wheel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Shared memory of a multiprocessor, and the most one program may have [bytes] (CUDA programming guide, compute
# capabilities).
SHARED_BYTES = {80: 164 << 10, 90: 228 << 10}
SHARED_BYTES_OF_A_PROGRAM = {80: 163 << 10, 90: 227 << 10}
REGISTERS = 65536
MAX_WARPS = 64
MAX_PROGRAMS = 32


@dataclass(frozen=True)
class Launch:
    """One compiled launch: the kernel's name, its grid, the compiled kernel, and the tensors it was given."""

    kernel: str
    grid: tuple[int, ...]
    compiled: Any
    tensors: tuple[torch.Tensor, ...]

    @property
    def programs(self) -> int:
        return int(torch.Size(self.grid).numel())

    @property
    def tensor_bytes(self) -> int:
        """Every tensor the kernel was given once, whatever the kernel does with it."""
        distinct = {(t.data_ptr(), t.shape): t.numel() * t.itemsize for t in self.tensors}
        return sum(distinct.values())


@dataclass(frozen=True)
class Inspection:
    """What the compiler made of a kernel; instruction counts are static. warps: resident on one multiprocessor."""

    registers: int
    spill_instructions: int
    shared_bytes: int
    num_warps: int
    warps: int
    hgmma: int
    hmma: int
    loads: int
    loads_128: int
    stores: int
    stores_128: int
    barriers: int


class _FakeDriver:
    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # compiled kernels are cached by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


@contextmanager
def compile_only(arch: int) -> Iterator[list[Launch]]:
    """Inside, every kernel launch compiles for sm_<arch> and is appended to the list; nothing runs."""
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_instead(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        tensors = tuple(argument for argument in args if isinstance(argument, torch.Tensor))
        launches.append(Launch(self.__name__.lstrip("_"), tuple(grid), compiled, tensors))
        return compiled

    driver.set_active(_FakeDriver(arch))
    JITFunction.run = compile_instead
    try:
        yield launches
    finally:
        JITFunction.run = run


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def inspect(launch: Launch, arch: int) -> Inspection:
    """Registers, spills, shared memory, residency and instruction counts of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(launch.compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
        code = _tool("nvdisasm", "-c", cubin.name)
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None, usage
    registers, shared = int(found[1]), int(launch.compiled.metadata.shared)
    num_warps = int(launch.compiled.metadata.num_warps)

    def count(pattern: str) -> int:
        return len(re.findall(rf"\b{pattern}", code))

    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * num_warps)
    by_shared = SHARED_BYTES[arch] // (shared + 1024)
    programs = min(by_registers, by_shared, MAX_PROGRAMS, MAX_WARPS // num_warps)
    return Inspection(
        registers=registers,
        spill_instructions=count(r"(LDL|STL)\b"),
        shared_bytes=shared,
        num_warps=num_warps,
        warps=programs * num_warps,
        hgmma=count("HGMMA"),
        hmma=count("HMMA"),
        loads=count(r"(LDG|LDGSTS)\."),
        loads_128=count(r"(LDG|LDGSTS)\.\S*128\b"),
        stores=count(r"STG\."),
        stores_128=count(r"STG\.\S*128\b"),
        barriers=count(r"BAR\."),
    )
