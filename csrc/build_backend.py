"""PEP 517 backend: setuptools, the user's own where there is one, so that `pip install -e .` works without a network.

pip's isolation hides the environment's site-packages; this looks there before asking for setuptools to be downloaded.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

OLDEST_SETUPTOOLS = 77  # the first that reads a licence expression (PEP 639) from pyproject.toml


def _setuptools() -> Any:
    try:
        import setuptools
    except ImportError:
        sys.path.append(sysconfig.get_path("purelib"))
        importlib.invalidate_caches()
        import setuptools
    if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
        raise ImportError(f"setuptools {setuptools.__version__} is older than {OLDEST_SETUPTOOLS}")
    return importlib.import_module("setuptools.build_meta")


def _requires(config_settings: Any = None) -> list[str]:
    """Nothing, or setuptools where the environment has none that is new enough.

    Looked up in a process of its own: a setuptools imported in this one would stay and shadow the one pip fetches.
    """
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.append({here!r}); import build_backend; build_backend._setuptools()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True)
    return [] if found.returncode == 0 else [f"setuptools>={OLDEST_SETUPTOOLS}"]


get_requires_for_build_wheel = get_requires_for_build_editable = get_requires_for_build_sdist = _requires


def _hook(name: str) -> Any:
    return lambda *args, **kwargs: getattr(_setuptools(), name)(*args, **kwargs)


build_sdist, build_wheel, build_editable = map(_hook, ("build_sdist", "build_wheel", "build_editable"))
prepare_metadata_for_build_wheel = _hook("prepare_metadata_for_build_wheel")
prepare_metadata_for_build_editable = _hook("prepare_metadata_for_build_editable")
