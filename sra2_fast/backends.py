"""Which device and which backends there are, why one is missing, and which of them runs an op.

Every question about the machine is asked here, once: the answers are cached, so a backend does not appear or vanish
while a program runs. The compiled extension is loaded when an op is first imported, not at `import sra2_fast`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import must_be

if TYPE_CHECKING:
    import torch

_FOLDER = Path(__file__).resolve().parent
_OLDEST_TORCH = (2, 10)
_OPERATORS = 2  # SRA2_OPERATORS of csrc/sra2_c_api.h

# What can run each op on each kind of device, the best first; PyTorch's own operators run what is left.
PYTORCH = "pytorch"
_NORM = {"cpu": ("c++",), "cuda": ("triton", "cuda c++")}
CANDIDATES: dict[str, dict[str, tuple[str, ...]]] = {
    "layer_norm_modulate": _NORM,
    "gated_residual_layer_norm_modulate": _NORM,
    "alignment_velocity_loss": {"cpu": ("c++",), "cuda": ("triton",)},
    "adamw_ema": {"cpu": ("c++",), "cuda": ("triton",)},
    "linear": {"cpu": (), "cuda": ("cublaslt",)},
}
# Attention is not in that table: on each kind of device the fastest of these is measured (models/attention.py), the
# first unless another is faster. All but two need bf16.
ATTENTION: dict[str, tuple[str, ...]] = {
    "cpu": ("sdpa", "matmul"),
    "cuda": ("flash-attn-3", "flash-attn", "cudnn", "flash", "efficient", "sdpa"),
}
_ATTENTION_IN_FLOAT32 = ("sdpa", "efficient")
_FLASH_ATTN_MODULES = {"flash-attn": "flash_attn", "flash-attn-3": "flash_attn_interface"}


class Choice(NamedTuple):
    """The backend that runs an op on a kind of device, and in words why no better one does ("" for the best)."""

    backend: str
    why_not_better: str


@functools.cache
def choose(op: str, device_type: str) -> Choice:
    """Which implementation runs `op` on "cpu" or "cuda" devices, and why not a better one."""
    reasons: list[str] = []
    for backend in CANDIDATES[op].get(device_type, ()):
        why = _why_not(backend)
        if why is None:
            return Choice(backend, "; ".join(reasons))
        reasons.append(f"{backend}: {why}")
    return Choice(PYTORCH, "; ".join(reasons))


def fused_devices(op: str) -> frozenset[str]:
    """The kinds of device on which `op` has a kernel here. An op asks once, at import."""
    return frozenset(kind for kind in CANDIDATES[op] if choose(op, kind).backend != PYTORCH)


def without_kernels(kind: str) -> str:
    """The ops that PyTorch's operators run on this kind of device, and why, in words; "" where each has a kernel."""
    reasons: dict[str, list[str]] = {}
    for op, candidates in CANDIDATES.items():
        backend, why = choose(op, kind)
        if backend == PYTORCH and candidates.get(kind):
            reasons.setdefault(why, []).append(op)
    return "; ".join(f"{', '.join(ops)} ({why})" for why, ops in reasons.items())


def has_flash_attn() -> bool:
    """Whether flash-attn 2 can be imported."""
    return _why_not_importable("flash_attn") is None


def flash_attn_functions(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The functions of "flash-attn" or "flash-attn-3" for qkv (B, N, 3, H, head_dim), and for q, k, v (B, N, H,
    head_dim) each. Raises ImportError where it is not installed."""
    module = importlib.import_module(_FLASH_ATTN_MODULES[name])
    return module.flash_attn_qkvpacked_func, module.flash_attn_func


def attention_backends(device_type: str, is_bf16: bool = True) -> dict[str, str]:
    """{name: ""} of every attention backend that can run on this kind of device, {name: why not} of the others."""
    found = {}
    for name in ATTENTION.get(device_type, ("sdpa",)):
        why = None if name in ("sdpa", "matmul") else _why_not(name)
        if why is None and not is_bf16 and name not in _ATTENTION_IN_FLOAT32:
            why = "needs bf16"
        found[name] = why or ""
    return found


def check_attention(op: str, option: str, name: str, device_type: str, is_bf16: bool) -> None:
    """Raises InputError, naming op and option, unless the attention backend `name` can run there; "auto" can."""
    found = attention_backends(device_type, is_bf16)
    if name == "auto" or found.get(name) == "":
        return
    why = found.get(name, f"not for {device_type}")
    there = ", ".join(["auto", *(one for one, why_not in found.items() if not why_not)])
    raise must_be(op, option, f"one of {there} here", f"{name} ({why})")


def has_apex() -> bool:
    """Whether NVIDIA's apex with its fused optimizers can be imported."""
    return _why_not_importable("apex.optimizers") is None


def has_extension(kind: str = "cpu") -> bool:
    """Whether the compiled kernels for kind ("cpu" or "cuda") are loaded; loads them at the first call."""
    return _load_extension(kind)[0]


@functools.cache
def cpu_instruction_set() -> str | None:
    """What the CPU kernels use: "avx512", "avx2" or "base"; None without the extension."""
    if not _library("cpu").exists():
        return None
    import torch  # noqa: F401  (the library finds torch's in the process)

    library = ctypes.CDLL(str(_library("cpu")))
    library.sra2_cpu_isa.restype = ctypes.c_char_p
    return library.sra2_cpu_isa().decode()


@functools.cache
def is_bf16_fast(device: str | torch.device) -> bool:
    """Whether bf16 matrix products are faster than float32 ones: sm_80 or later, a CPU with avx512_bf16 or AMX."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, bool)() for name in names)
    return False


def versions() -> dict[str, str]:
    """Of everything a number of a run can depend on; what is not installed is left out."""
    from importlib.metadata import PackageNotFoundError, version

    from . import __version__

    found = {"sra2_fast": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "triton", "safetensors", "flash-attn", "flash-attn-3", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def device_name(device: str | torch.device) -> str:
    """`NVIDIA H200`, or a CPU's model and the threads that torch uses: `AMD EPYC, 2 threads`."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def status() -> dict[str, str]:
    """Every backend by name, in words: what it is, or "not ..." and why it is not there."""
    import torch

    from . import __version__

    found = {"sra2_fast": __version__, "python": platform.python_version(), "torch": torch.__version__}
    found["device"] = _describe_device()
    found["driver"] = _driver_version() or "not found"
    for kind in ("cpu", "cuda"):
        is_loaded, found[f"{kind}_extension"] = _load_extension(kind)
        if not is_loaded and _library(kind).exists():
            found[f"{kind}_extension"] += f" ({_build_record(kind)})"
    for name, module in (
        ("triton", "triton"),
        ("flash_attn", "flash_attn"),
        ("flash_attn_3", "flash_attn_interface"),
        ("apex", "apex.optimizers"),
    ):
        why = _why_not_importable(module)
        version = getattr(sys.modules.get(name), "__version__", None)
        found[name] = (f"{version}" if version else "installed") if why is None else why
    for op, kinds in CANDIDATES.items():
        for kind in kinds:
            backend, why = choose(op, kind)
            found[f"{op} on {kind}"] = f"{backend} ({why})" if why else backend
    for kind in ATTENTION:
        reasons = attention_backends(kind)
        found[f"attention on {kind}"] = "the fastest of " + ", ".join(name for name, why in reasons.items() if not why)
        missing = "; ".join(f"{name}: {why}" for name, why in reasons.items() if why)
        found[f"attention on {kind}"] += f" ({missing})" if missing else ""
    found["bf16"] = (
        "fast" if is_bf16_fast("cuda" if torch.cuda.is_available() else "cpu") else "not fast on this machine"
    )
    return found


def _why_not(backend: str) -> str | None:
    """None where this backend of CANDIDATES can be used, else the reason in words."""
    import torch

    if backend in ("c++", "cuda c++"):
        is_there, what = _load_extension("cpu" if backend == "c++" else "cuda")
        return None if is_there else what
    if not torch.version.cuda:
        return f"torch {torch.__version__} has no CUDA"
    if backend == "cudnn":
        return None if torch.backends.cudnn.is_available() else "torch has no cuDNN"
    if backend == "cublaslt":
        return importlib.import_module("sra2_fast.kernels.cublaslt").why_not()
    return None if backend in ("flash", "efficient") else _why_not_importable(_FLASH_ATTN_MODULES.get(backend, backend))


@functools.cache
def _why_not_importable(name: str) -> str | None:
    """None where the module imports, else the reason in words. A broken install raises all kinds of errors."""
    try:
        if importlib.util.find_spec(name) is None:
            return "not installed"
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        return "not installed" if error.name == name.split(".")[0] else f"not importable: {error}"
    except Exception as error:
        return f"not importable: {type(error).__name__}: {error}".splitlines()[0]
    return None


def _library(kind: str) -> Path:
    return _FOLDER / f"_C_{kind}.so"


def _build_record(kind: str) -> str:
    """What setup.py wrote about this part."""
    try:
        return json.loads((_FOLDER / "_build.json").read_text())[kind]
    except FileNotFoundError:
        return "not built: the package was not installed (pip install -e .)"
    except (OSError, ValueError, KeyError) as error:
        return f"not built: {_FOLDER / '_build.json'} is unreadable ({error})"


@functools.cache
def _load_extension(kind: str) -> tuple[bool, str]:
    """Load the library once; whether it is there, and what to tell the user."""
    import torch

    path = _library(kind)
    if not path.exists():
        return False, _build_record(kind)
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < _OLDEST_TORCH:
        return False, f"not loaded: torch {torch.__version__} is older than {'.'.join(map(str, _OLDEST_TORCH))}"
    if kind == "cuda":
        if not torch.version.cuda:
            return False, f"not loaded: torch {torch.__version__} has no CUDA"
        if not torch.cuda.is_available():
            return False, "not loaded: no usable GPU or driver"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return False, f"not loaded: torch {torch.__version__} cannot load {path.name}: {error}"
    if not hasattr(library, "sra2_operators") or library.sra2_operators() != _OPERATORS:
        return False, f"not loaded: {path.name} was built from other sources; install again: pip install -e ."
    if kind == "cuda":
        needed = library.sra2_cuda_driver_needed()
        if needed:
            needs = f"{needed // 1000}.{needed % 1000 // 10}"
            return False, f"not loaded: built with CUDA {needs}, the driver ({_driver_version()}) is too old for it"
    torch.ops.load_library(str(path))
    instructions = f"{cpu_instruction_set()}, " if kind == "cpu" else ""
    return True, f"loaded ({instructions}{_build_record(kind)})"


def _describe_device() -> str:
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()} (sm_{major}{minor}, {torch.cuda.device_count()} visible)"
    return device_name("cpu")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def _driver_version() -> str | None:
    """The NVIDIA driver's version, None where there is none."""
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
    except Exception:  # no module, no library or no device: pynvml has an error class for each
        return None
    return version if isinstance(version, str) else version.decode()
