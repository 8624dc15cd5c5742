"""The merge of statistics, over arrays of channels: for batches, blocks and whatever else has parts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Count = int | float | Array  # one for all channels, or (C,) int64 or float64; weights make it a float


def merge(
    count_a: Count, mean_a: Array, m2_a: Array, count_b: Count, mean_b: Array, m2_b: Array
) -> tuple[Array, Array]:
    """Mean and m2 of two parts together (Chan, Golub and LeVeque 1983); an infinite mean stays infinite."""
    mean, _, m2 = merge_compensated(count_a, mean_a, 0.0, m2_a, count_b, mean_b, 0.0, m2_b)
    return mean, m2


def merge_compensated(
    count_a: Count,
    mean_a: Array,
    rest_a: Array | float,
    m2_a: Array,
    count_b: Count,
    mean_b: Array,
    rest_b: Array | float,
    m2_b: Array,
) -> tuple[Array, Array, Array]:
    """Mean, its rest and m2 of two parts together.

    A mean is ``mean + rest``: float64 alone rounds 1e6 by 1e-10, which is seen in the next merge's m2 (5e-12 of it).
    An infinite mean stays infinite. A part without values changes nothing, in the channels where it has none.
    """
    with np.errstate(all="ignore"):
        delta = (mean_b - mean_a) + (rest_b - rest_a)
        share = _share(count_a, count_b)
        mean, rest = _sum(mean_a, rest_a + delta * share)
        m2 = m2_a + m2_b + delta * delta * (count_a * share)
        finite = np.isfinite(delta)
        parts = np.where(finite, mean, mean_a + mean_b), np.where(finite, rest, 0.0), np.where(finite, m2, np.nan)
    if _all(count_a) and _all(count_b):
        return parts
    a, b = (mean_a, rest_a, m2_a), (mean_b, rest_b, m2_b)
    return tuple(  # type: ignore[return-value]
        np.where(np.equal(count_a, 0), of_b, np.where(np.equal(count_b, 0), of_a, both))
        for of_a, of_b, both in zip(a, b, parts, strict=True)
    )


def merge_all(counts: Array, means: Array, rests: Array, m2s: Array) -> tuple[Array, Array, Array]:
    """Mean, its rest and m2 of all parts together, (parts, C) each: as `merge_compensated`, in two passes over them."""
    with np.errstate(all="ignore"):
        delta = (means - means[0]) + rests
        average = (counts * delta).sum(0) / counts.sum(0)
        m2 = m2s.sum(0) + (counts * np.square(delta - average)).sum(0)
        mean, rest = _sum(means[0], average)
        finite = np.isfinite(average)
        return np.where(finite, mean, (means + rests).sum(0)), np.where(finite, rest, 0.0), np.where(finite, m2, np.nan)


def _all(count: Count) -> bool:
    return bool(count.all() if isinstance(count, np.ndarray) else count)


def _share(count_a: Count, count_b: Count) -> Any:
    """Share of the second part. Python's integers divide exactly, whatever their size."""
    if isinstance(count_a, np.ndarray) or isinstance(count_b, np.ndarray):
        return np.true_divide(count_b, np.add(count_a, count_b, dtype=np.float64))
    return count_b / (count_a + count_b) if count_a or count_b else 0.0


def _sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b, rounded, and what rounding took (Knuth's two-sum)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)
