"""The merge of statistics, over arrays of channels: for batches, blocks and whatever else has parts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def merge(
    count_a: float, mean_a: Array, m2_a: Array, count_b: float, mean_b: Array, m2_b: Array
) -> tuple[Array, Array]:
    """Mean and m2 of two parts together (Chan, Golub and LeVeque 1983); an infinite mean stays infinite."""
    if not count_a:
        return mean_b, m2_b
    share = count_b / (count_a + count_b)
    with np.errstate(all="ignore"):
        delta = mean_b - mean_a
        finite = np.isfinite(delta)
        mean = np.where(finite, mean_a + delta * share, mean_a + mean_b)
        return mean, np.where(finite, m2_a + m2_b + delta * delta * (count_a * share), np.nan)
