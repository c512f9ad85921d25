"""The public sizes by name, and the sizes of a model that is given as four numbers instead."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import InputError
from .sit import SiT

SIZES = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6)}  # depth, hidden, heads
Model = TypeVar("Model", bound=SiT)


def registry(model_class: Callable[..., Model], patch_sizes: tuple[int, ...]) -> dict[str, Callable[..., Model]]:
    """{"SiT-XL/2": builder, ...}: every size with every patch size; a builder takes the other arguments."""

    def registered(size: str, patch_size: int) -> Callable[..., Model]:
        depth, hidden_size, num_heads = SIZES[size]

        def build(**kwargs: Any) -> Model:
            return model_class(
                depth=depth, hidden_size=hidden_size, num_heads=num_heads, patch_size=patch_size, **kwargs
            )

        build.__name__ = f"SiT_{size}_{patch_size}"
        build.__doc__ = f"SiT-{size}/{patch_size}: {depth} blocks of width {hidden_size}, {num_heads} heads."
        return build

    return {f"SiT-{size}/{patch}": registered(size, patch) for size in SIZES for patch in patch_sizes}


SiT_models = registry(SiT, (1, 2, 4, 8))


def model_sizes(model: str, op: str = "SiT_models") -> dict[str, int]:
    """hidden_size, depth, num_heads, patch_size of a registry name or of "D,depth,heads,patch".

    Raises InputError, beginning with `op`, for anything else.
    """
    names = ("hidden_size", "depth", "num_heads", "patch_size")
    if model in SiT_models:
        size, patch_size = model.removeprefix("SiT-").split("/")
        depth, hidden_size, num_heads = SIZES[size]
        return dict(zip(names, (hidden_size, depth, num_heads, int(patch_size)), strict=True))
    numbers = model.split(",")
    if len(numbers) == 4 and all(number.strip().isdecimal() and int(number) > 0 for number in numbers):
        return dict(zip(names, map(int, numbers), strict=True))
    by_upper_case = {name.upper(): name for name in SiT_models}
    near = difflib.get_close_matches(model.upper(), by_upper_case, n=1, cutoff=0.4)
    hint = f"; did you mean {by_upper_case[near[0]]}?" if near else "."
    raise InputError(
        f"{op}: --model {model} is not known{hint} Names are SiT-{{XL,L,B,S}}/{{1,2,4,8}}, "
        "or give 'hidden_size,depth,heads,patch' such as 128,6,4,2"
    )
