"""Where outputs come from."""

from __future__ import annotations

import numpy as np

from fastbn._arrays import Array


def empty_like(x: Array) -> Array:
    """Uninitialised array of x's shape, dtype and memory order."""
    return np.empty_like(x)
