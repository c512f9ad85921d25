"""The normalisation a user gives for latents that record none: --latent-scale and --latent-shift."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import must_be

Numbers = float | str | Sequence[float]  # as text: separated by commas


def per_channel(option: str, given: Numbers, channels: int) -> np.ndarray:
    """(C,) float32 from one number or one for every channel.

    option: its name for messages, such as --latent-scale.
    Raises InputError for another count, for what is no finite number, and for a scale that is not above 0.
    """
    parts = given.split(",") if isinstance(given, str) else given
    expected = f"a finite number, or {channels} of them separated by commas, one a channel"
    try:
        values = np.atleast_1d(np.asarray(parts, dtype=np.float32))
    except ValueError as error:
        raise must_be("data", option, expected, given) from error
    if values.shape not in ((1,), (channels,)) or not np.isfinite(values).all():
        raise must_be("data", option, expected, given)
    if option == "--latent-scale" and (values <= 0).any():
        raise must_be("data", option, "above 0", given)
    return np.broadcast_to(values, (channels,)).copy()
