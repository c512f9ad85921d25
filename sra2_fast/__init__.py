"""sra2_fast: SiT diffusion transformers trained with SRA 2, as fast as the hardware allows.

Importing this package imports nothing else: the names below load on first use.
"""

from __future__ import annotations

import importlib as _importlib
import os as _os
from typing import TYPE_CHECKING as _TYPE_CHECKING

if not _os.path.isdir(_os.path.join(__path__[0], "kernels")):  # a checkout: sra2_fast.kernels is the folder beside us
    __path__.append(_os.path.dirname(__path__[0]))

__version__ = "0.1.0"

_HOME = {
    "SiT": "models",
    "SiT_models": "models",
    "SRA2Loss": "objective",
    "LossOutput": "objective",
    "Aligner": "aligner",
    "load_checkpoint": "checkpoints",
    "open_model": "checkpoints",
    "convert_state_dict": "checkpoints",
    "status": "backends",
    "sample_ode": "sampling",
    "sample_sde": "sampling",
}

__all__ = ["__version__", *_HOME]

if _TYPE_CHECKING:
    from .aligner import Aligner as Aligner
    from .backends import status as status
    from .checkpoints import convert_state_dict as convert_state_dict
    from .checkpoints import load_checkpoint as load_checkpoint
    from .checkpoints import open_model as open_model
    from .models import SiT as SiT
    from .models import SiT_models as SiT_models
    from .objective import LossOutput as LossOutput
    from .objective import SRA2Loss as SRA2Loss
    from .sampling import sample_ode as sample_ode
    from .sampling import sample_sde as sample_sde


def __getattr__(name: str) -> object:
    if name in _HOME:
        value = getattr(_importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name in ("ops", "optim", "compat", "kernels", "data"):
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
