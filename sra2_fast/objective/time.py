"""Which times a batch trains at."""

from __future__ import annotations

import math

import torch

from ..errors import must_be

TIMES = ("uniform", "lognormal")


def time_from_uniform(u: torch.Tensor, time: str, path: str) -> torch.Tensor:
    """Map a uniform draw in (0, 1) to the training time, by the inverse distribution function.

    time: "uniform": t = u; "lognormal": sigma = exp(n), n ~ N(0, 1) (arXiv 2206.00364), as the noise-to-data ratio of
        the path: t = sigma / (1 + sigma) on the linear one, t = (2 / pi) atan(sigma) on the cosine path.
    """
    if time == "uniform":
        return u
    if time == "lognormal":
        tiny = torch.finfo(u.dtype).tiny
        sigma = torch.special.ndtri(u.clamp(tiny, 1 - torch.finfo(u.dtype).eps)).exp()
        return sigma / (1 + sigma) if path == "linear" else torch.atan(sigma) * (2 / math.pi)
    raise must_be("SRA2Loss", "time", " or ".join(TIMES), repr(time))
