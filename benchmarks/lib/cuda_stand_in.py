"""Enough of torch.cuda on a CPU to rehearse what needs a GPU: `python benchmarks/lib/cuda_stand_in.py SCRIPT OPTIONS`.

A first call on a GPU must not die of a typo, so its own code runs here: what asks for "cuda" gets the CPU, events read
the clock, a CUDA graph records operators and repeats them. Every function takes what torch's own takes and nothing
else, and what it lacks raises. `-m MODULE` runs a module. With TRITON_INTERPRET=1 the fused ops run their Triton
launchers in Triton's interpreter, else the C++ kernels. What it cannot show: time, memory, races, synchronisation.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
CYCLES_PER_S = 2e9
CAPABILITY = (9, 0)
NAME = "a CPU in a GPU's place"
MEMORY_BYTES = 1 << 30  # so that tests of giant tensors are left out
_MARK = "_sra2_fast_stand_in"


def is_installed() -> bool:
    """Whether "cuda" is the CPU in this process."""
    return hasattr(torch.cuda, _MARK)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


class _CudaIsCpu(TorchFunctionMode):
    """Whatever a torch function is to make on "cuda", it makes on the CPU; nothing is pinned."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        kwargs = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.pin_memory:
            return args[0].clone()
        return func(*map(_on_cpu, args), **kwargs)


class _Recorder(TorchDispatchMode):
    """Notes every operator, so that it can be run again on the same memory."""

    def __init__(self, graph: CUDAGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.graph.keep(args[index] if index < len(args) else kwargs.get(argument.name))
        out = func(*args, **kwargs)
        if not func.is_view:
            self.graph.calls.append(functools.partial(_again, func, args, kwargs, out))
        return out


def _again(func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """The operator once more, its results where they were."""
    given = {id(t) for t in tree_leaves((args, kwargs))}
    for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
        if isinstance(old, torch.Tensor) and id(old) not in given:
            old.detach().copy_(new)


class Event:
    """The host's clock at `record`."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.enable_timing = enable_timing

    def record(self, stream: Any = None) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, end_event: Event) -> float:
        if not (self.enable_timing and end_event.enable_timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        return max((end_event._at - self._at) * 1e3, 1e-6)

    def wait(self, stream: Any = None) -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


class Stream:
    cuda_stream = 0

    def __init__(self, device: Any = None, priority: int = 0) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        event = Event() if event is None else event
        event.record()
        return event

    def synchronize(self) -> None: ...


class CUDAGraph:
    """The operators of a block; `replay` runs them again, on the same memory."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.calls: list[Callable[[], None]] = []
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(self, tensors: Any) -> None:
        """What is about to be written: a capture runs nothing, so it is put back when the capture ends."""
        for one in tree_leaves(tensors):
            if isinstance(one, torch.Tensor) and one.data_ptr() not in self._before:
                self._before[one.data_ptr()] = (one.detach(), one.detach().clone())

    def end(self) -> None:
        for one, before in self._before.values():
            one.copy_(before)
        self._before.clear()

    def replay(self) -> None:
        with torch.no_grad():
            for call in self.calls:
                call()

    def pool(self) -> tuple[int, int]:
        return 0, 0

    def reset(self) -> None:
        self.calls.clear()


_capturing: list[CUDAGraph] = []


@contextlib.contextmanager
def _graph(cuda_graph: Any, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
    _capturing.append(cuda_graph)
    try:
        # What is compiled runs as it was written: the recorder sees operators, and no generated code.
        with torch.compiler.set_stance("force_eager"), _Recorder(cuda_graph):
            yield
    finally:
        _capturing.pop()
        cuda_graph.end()


def record_interpreted_launches() -> None:
    """A kernel that is launched within a capture, past torch's operators, is repeated with it."""
    from triton.runtime import interpreter

    run = interpreter.GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _capturing and _get_current_dispatch_mode() is not None:  # else within an operator, which is repeated itself
            _capturing[-1].keep(args)
            _capturing[-1].calls.append(functools.partial(run, self, *args, **kwargs))
        with _disable_current_modes():
            return run(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = call


class _GeneratorType(type):
    """torch's generators are not subclassed; this one makes those of "cuda" on the CPU, and knows all of them."""

    original = torch.Generator

    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        return cls.original(device=_on_cpu(device))

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls.original)


class Generator(metaclass=_GeneratorType): ...


_properties = SimpleNamespace(
    name=NAME,
    major=0,  # so that torch.compile does not take Triton for it
    minor=0,
    multi_processor_count=1,
    L2_cache_size=1 << 20,
    total_memory=MEMORY_BYTES,
)
_stream = Stream()
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "is_bf16_supported": lambda *_, **__: True,
    "device_count": lambda: 2,
    "current_device": lambda: 0,
    "get_device_name": lambda *_, **__: NAME,
    "get_device_capability": lambda *_, **__: CAPABILITY,
    "get_device_properties": lambda *_, **__: _properties,
    "mem_get_info": lambda *_, **__: (MEMORY_BYTES, MEMORY_BYTES),
    "memory_allocated": lambda *_, **__: 0,
    "max_memory_allocated": lambda *_, **__: 1 << 20,
    "max_memory_reserved": lambda *_, **__: 1 << 20,
    "reset_peak_memory_stats": lambda *_, **__: None,
    "empty_cache": lambda: None,
    "synchronize": lambda *_, **__: None,
    "set_sync_debug_mode": lambda *_, **__: None,
    "get_sync_debug_mode": lambda: 0,
    "current_stream": lambda *_, **__: _stream,
    "is_current_stream_capturing": lambda: bool(_capturing),
    "stream": lambda *_, **__: contextlib.nullcontext(),
    "graph": _graph,
    "get_rng_state": lambda *_, **__: torch.get_rng_state(),
    "set_rng_state": lambda *_, **__: None,
    "_sleep": lambda cycles: time.sleep(cycles / CYCLES_PER_S),
}
_CLASSES = {"Event": Event, "Stream": Stream, "CUDAGraph": CUDAGraph}


def _like(original: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, refusing arguments that the original does not take."""
    try:
        signature = inspect.signature(original)
    except (TypeError, ValueError):
        return function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def _ops_take_the_launchers() -> None:
    """On the CPU the fused ops run what they run on CUDA: Triton's launchers, interpreted; before ops are imported."""
    from sra2_fast import backends

    assert "sra2_fast.ops" not in sys.modules, "install the stand-in before sra2_fast.ops is imported"
    sys.path.insert(0, str(ROOT / "tests" / "triton"))
    import bf16_interpreter

    bf16_interpreter.install()
    record_interpreted_launches()
    backends._load_extension = lambda kind: (False, "left out: the launchers are rehearsed")
    for kinds in backends.CANDIDATES.values():
        kinds["cpu"] = tuple(name for name in kinds["cuda"] if name == "triton")
    implement = torch.library.Library.impl

    def on_cpu_too(self: Any, op_name: Any, fn: Any, dispatch_key: str = "", **options: Any) -> Any:
        is_ours = self.ns == "sra2_fast" and dispatch_key == "CUDA"
        return implement(self, op_name, fn, "CPU" if is_ours else dispatch_key, **options)

    torch.library.Library.impl = on_cpu_too


def _cuda_kernels_are_the_cpus() -> None:
    """An operator `..._cuda` of the extension runs the CPU's kernel of the same name."""
    from sra2_fast import backends

    define, load = torch.library.Library.define, backends._load_extension

    def define_both(self: Any, schema: str, *args: Any, **kwargs: Any) -> Any:
        defined = define(self, schema, *args, **kwargs)
        name = schema.partition("(")[0]
        if self.ns == "sra2_fast" and name.endswith("_cuda"):
            on_cpu = name.removesuffix("_cuda")
            self.impl(name, lambda *given: getattr(torch.ops.sra2_fast, on_cpu)(*given), "CPU")
        return defined

    torch.library.Library.define = define_both
    backends._load_extension = lambda kind: (True, f"loaded ({NAME})") if kind == "cuda" else load(kind)


def install() -> None:
    """For the rest of this process."""
    if is_installed():
        return
    for name, function in {**_FUNCTIONS, **_CLASSES}.items():
        original = getattr(torch.cuda, name)
        setattr(torch.cuda, name, function if isinstance(function, type) else _like(original, function))
    setattr(torch.cuda, _MARK, True)
    # A torch with CUDA counts the GPUs that it was built for.
    torch.accelerator.is_available = lambda: False
    torch.accelerator.current_accelerator = lambda check_available=False: None
    torch.version.cuda = "13.0"
    torch.Generator = Generator
    autocast = torch.autocast
    torch.autocast = lambda device_type, *args, **kwargs: autocast(_on_cpu(device_type), *args, **kwargs)
    profile, cpu_alone = torch.profiler.profile, [torch.profiler.ProfilerActivity.CPU]
    torch.profiler.profile = _like(
        profile, lambda *, activities=None, **options: profile(activities=cpu_alone, **options)
    )
    _CudaIsCpu().__enter__()
    if os.environ.get("TRITON_INTERPRET") == "1":
        _ops_take_the_launchers()
    else:
        _cuda_kernels_are_the_cpus()


def main(argv: list[str]) -> None:
    """Install, then run a script or a module as python itself would."""
    install()
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        sys.path.insert(0, str(Path(argv[0]).resolve().parent))
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]
    # The module by its name: a script's own module is replaced while the script it runs is running.
    from lib import cuda_stand_in

    cuda_stand_in.main(sys.argv[1:])
