"""Statistics that merge: count, mean and sum of squared deviations of every channel."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastbn._arrays import Array, described, floating, integer, numbers, real, view
from fastbn._engine import kernels
from fastbn._merge import merge

__all__ = ["Moments"]


class Moments:
    """Count, mean and m2 (sum of squared deviations from the mean) of C channels, in float64.

    Batches are added by `update`, other statistics by `merge` or ``+``; the result is that of all values together,
    without the cancellation of a sum of squares.

    Parameters
    ----------
    count : int
        Number of values in each channel.
    mean, m2 : (C,) array_like of float
        Copied.

    Raises
    ------
    ValueError
        If `count` or an m2 is negative, or the shapes are not two times (C,).

    References
    ----------
    Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", 1983.

    Examples
    --------
    >>> images = np.random.default_rng(0).random((100, 3, 8, 8))
    >>> m = Moments.empty(3)
    >>> for batch in np.array_split(images, 7):
    ...     m = m.update(batch)
    >>> np.allclose(m.std(), images.std((0, 2, 3)))
    True
    """

    __slots__ = ("count", "m2", "mean")

    count: int
    mean: Array
    m2: Array

    def __init__(self, count: int, mean: ArrayLike, m2: ArrayLike) -> None:
        number = integer(count, "count")
        if number < 0:
            raise ValueError(f"count must not be negative, got {described(number)}")
        means, squares = (np.array(numbers(a, name), np.float64) for a, name in ((mean, "mean"), (m2, "m2")))
        if means.ndim != 1 or means.shape != squares.shape:
            raise ValueError(f"mean and m2 must both have shape (C,), got {means.shape} and {squares.shape}")
        if (squares < 0).any():
            raise ValueError(f"m2 is a sum of squares and must not be negative, got {squares.min()}")
        self.count, self.mean, self.m2 = number, means, squares

    @classmethod
    def empty(cls, num_channels: int) -> Moments:
        """Moments of no values of `num_channels` channels."""
        channels = integer(num_channels, "num_channels")
        if not 0 <= channels <= sys.maxsize:
            raise ValueError(f"num_channels must be from 0 to {sys.maxsize}, got {described(channels)}")
        return cls(0, np.zeros(channels), np.zeros(channels))

    def update(self, x: ArrayLike, axis: int = 1) -> Moments:
        """Add the values of `x`, an array of float32 or float64 with the channels on `axis`. Returns self.

        Raises
        ------
        ValueError
            If `x` has another number of channels. Nothing is added then.
        """
        xv = view(floating(x), axis)
        self._check_channels(xv.c)
        if xv.flat.size:
            mean, m2 = np.empty(xv.c), np.empty(xv.c)
            kernels().moments(xv.flat, xv.n, xv.c, xv.s, mean, m2)
            self._add(xv.n * xv.s, mean, m2)
        return self

    def merge(self, other: Moments) -> Moments:
        """Add the values that `other` stands for. Returns self."""
        if not isinstance(other, Moments):
            raise TypeError(f"only Moments can be merged, got {type(other).__name__}")
        self._check_channels(len(other.mean))
        if other.count:
            self._add(other.count, other.mean, other.m2)
        return self

    def __add__(self, other: Any) -> Moments:
        if not isinstance(other, Moments):
            return NotImplemented
        return Moments(self.count, self.mean, self.m2).merge(other)

    def var(self, ddof: float = 0) -> Array:
        """Variance of each channel, ``m2 / (count - ddof)``; NaN where there are not more than `ddof` values."""
        ddof = real(ddof, "ddof")
        if self.count <= ddof:
            return np.full_like(self.mean, np.nan)
        return self.m2 / (self.count - ddof)

    def std(self, ddof: float = 0) -> Array:
        """Square root of `var`."""
        return np.sqrt(self.var(ddof))

    def _add(self, count: int, mean: Array, m2: Array) -> None:
        mean, m2 = merge(self.count, self.mean, self.m2, count, mean, m2)
        self.count, self.mean, self.m2 = self.count + count, mean.copy(), m2.copy()

    def _check_channels(self, channels: int) -> None:
        if channels != len(self.mean):
            raise ValueError(f"expected {len(self.mean)} channels, got {channels}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Moments):
            return NotImplemented
        return (
            self.count == other.count
            and np.array_equal(self.mean, other.mean, equal_nan=True)
            and np.array_equal(self.m2, other.m2, equal_nan=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Moments(count={self.count}, mean={self.mean}, m2={self.m2})"
