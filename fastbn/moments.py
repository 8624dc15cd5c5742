"""Statistics that merge: count, mean and sum of squared deviations of every channel."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
from numpy.typing import ArrayLike

from fastbn._arrays import (
    MEASURED,
    Array,
    channel_axis,
    converted,
    described,
    floating,
    integer,
    numbers,
    real,
    view,
)
from fastbn._engine import kernels
from fastbn._files import put, read_npz
from fastbn._merge import Count, merge_compensated

__all__ = ["Moments", "NanPolicy"]

NanPolicy = Literal["propagate", "omit"]

BLOCK = 1 << 16  # values that are weighed or masked at once, in float64
_FIELDS = ("count", "mean", "rest", "m2")  # of a file


class Moments:
    """Count, mean and m2 (sum of squared deviations from the mean) of C channels, in float64.

    Batches are added by `update`, other statistics by `merge` or ``+``; the result is that of all values together,
    without the cancellation of a sum of squares. Means are carried between merges with twice the digits of a float64,
    so that the order of merges leaves no trace beyond rounding.

    Parameters
    ----------
    count : int, float or (C,) array_like of either
        Number of values in each channel; exact, whatever its size, where it is one for all. With sample weights it is
        the sum of the weights, a float.
    mean, m2 : (C,) array_like of float
        Copied.

    Raises
    ------
    ValueError
        If a count or an m2 is negative, or the shapes are not two times (C,).
    TypeError
        If one of them is no number or array of numbers.

    References
    ----------
    Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", 1983.

    Examples
    --------
    >>> images = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), np.uint8)
    >>> m = Moments.empty(3)
    >>> for batch in np.array_split(images, 7):
    ...     m = m.update(batch, axis=-1)
    >>> np.allclose(m.std(), images.std((0, 1, 2)))
    True
    """

    __slots__ = ("_rest", "count", "m2", "mean")

    count: Count
    mean: Array
    m2: Array
    _rest: Array  # what rounding took from the mean

    def __init__(self, count: Count | ArrayLike, mean: ArrayLike, m2: ArrayLike) -> None:
        means, squares = (np.array(numbers(a, name), np.float64) for a, name in ((mean, "mean"), (m2, "m2")))
        if means.ndim != 1 or means.shape != squares.shape:
            raise ValueError(f"mean and m2 must both have shape (C,), got {means.shape} and {squares.shape}")
        if (squares < 0).any():
            raise ValueError(f"m2 is a sum of squares and must not be negative, got {squares.min()}")
        self.count = _checked_count(count, len(means))
        self.mean, self.m2, self._rest = means, squares, np.zeros_like(means)

    @classmethod
    def empty(cls, num_channels: int) -> Moments:
        """Moments of no values of `num_channels` channels.

        Parameters
        ----------
        num_channels : int
            C, not negative.

        Raises
        ------
        TypeError, ValueError
            If it is no integer, or out of range.
        """
        channels = integer(num_channels, "num_channels")
        if not 0 <= channels <= sys.maxsize:
            raise ValueError(f"num_channels must be from 0 to {sys.maxsize}, got {described(channels)}")
        return cls(0, np.zeros(channels), np.zeros(channels))

    def update(
        self,
        x: ArrayLike,
        axis: int = 1,
        *,
        where: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        nan_policy: NanPolicy = "propagate",
    ) -> Moments:
        """Add the values of `x`. Returns self.

        Parameters
        ----------
        x : array_like of float32, float64, float16, uint8, uint16, int8 or int16
            The C channels are on `axis`. Nothing is copied or converted as a whole, if `x` is dense in memory. Sums of
            integers are exact.
        axis : int
            The channel axis.
        where : array_like of bool, optional
            Which values count, broadcastable to the shape of `x`. The others are not looked at, and may be NaN.
        weights : array_like of float, optional
            How much values count: finite and not negative, one for each sample (N,), or broadcastable to the shape of
            `x`. `count` becomes their sum, and `ddof` is taken from that sum, as for counts of repeated values.
        nan_policy : {"propagate", "omit"}
            Whether NaN makes its channel's statistics NaN, or counts as missing.

        Raises
        ------
        TypeError, ValueError
            If `x` has another number of channels, or an argument is not as said here. Nothing is added then.
        """
        omit = _omits(nan_policy)
        array = floating(x, dtypes=MEASURED)
        chosen = _mask(where, array.shape), _weights(weights, array.shape, axis)
        xv = None if any(part is not None for part in chosen) else view(array, axis)
        self._check_channels(array.shape[channel_axis(axis, array.ndim)] if xv is None else xv.c)
        if array.size == 0:
            return self
        if xv is not None:
            mean, rest, m2 = np.empty((3, xv.c))
            kernels().moments(xv.array, xv.n, xv.c, xv.s, mean, rest, m2)
            if not omit or not np.isnan(mean).any():
                self._add(xv.n * xv.s, mean, rest, m2)
                return self
        added = _chosen_moments(array, channel_axis(axis, array.ndim), *chosen, omit)
        return self.merge(added)

    def merge(self, other: Moments) -> Moments:
        """Add the values that `other` stands for. Returns self.

        Raises
        ------
        TypeError, ValueError
            If `other` is something else than `Moments`, or of another number of channels.
        """
        if not isinstance(other, Moments):
            raise TypeError(f"only Moments can be merged, got {type(other).__name__}")
        self._check_channels(len(other.mean))
        self._add(other.count, other.mean, other._rest, other.m2)
        return self

    def __add__(self, other: Any) -> Moments:
        if not isinstance(other, Moments):
            return NotImplemented
        return Moments.empty(len(self.mean)).merge(self).merge(other)

    def var(self, ddof: float = 0) -> Array:
        """Variance of each channel, ``m2 / (count - ddof)``, float64 (C,); NaN where no more than `ddof` values count.

        Parameters
        ----------
        ddof : float
            0 for the biased variance, 1 for the unbiased one.
        """
        with np.errstate(all="ignore"):
            degrees = np.asarray(self.count - real(ddof, "ddof"), np.float64)
            return np.where(degrees > 0, self.m2 / degrees, np.nan)

    def std(self, ddof: float = 0) -> Array:
        """Square root of `var` with this `ddof`, float64 (C,)."""
        return np.sqrt(self.var(ddof))

    def save(self, file: str | os.PathLike[str] | IO[bytes]) -> None:
        """Write an .npz file that `load` reads back without loss.

        A file of that name is replaced once the new one is complete: whatever interrupts this leaves the old one.

        Parameters
        ----------
        file : path or binary file object
            As for `numpy.savez`: a path that does not end in ``.npz`` gets that ending.
        """
        # Text, because no array of numbers takes integers of any size.
        count = self.count if isinstance(self.count, float | np.ndarray) else str(self.count)
        fields: dict[str, Any] = dict(zip(_FIELDS, (count, self.mean, self._rest, self.m2), strict=True))
        if hasattr(file, "write"):
            np.savez(file, **fields)
            return
        path = _npz(file)
        aside = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
        try:
            with aside.open("xb") as unfinished:
                np.savez(unfinished, **fields)
                unfinished.flush()
                os.fsync(unfinished.fileno())
            put(aside, path)
        finally:
            aside.unlink(missing_ok=True)

    @classmethod
    def load(cls, file: str | os.PathLike[str] | IO[bytes]) -> Moments:
        """Read what `save` wrote.

        Parameters
        ----------
        file : path or binary file object
            As for `save`.

        Raises
        ------
        OSError
            If there is no such file, or it cannot be read.
        ValueError
            If it is a file of something else.
        """
        source = cast("IO[bytes]", file) if hasattr(file, "read") else _npz(file)
        try:
            found = read_npz(source, _FIELDS)
            count, mean, rest, m2 = (found[name] for name in _FIELDS)
            loaded = cls(int(str(count)) if count.dtype.kind == "U" else count, mean, m2)
            if rest.shape != mean.shape or rest.dtype != np.float64:
                raise ValueError(f"rest must be float64 of shape {mean.shape}, got {rest.dtype} of {rest.shape}")
        except (ValueError, TypeError, KeyError) as error:
            name = source if isinstance(source, Path) else getattr(source, "name", "the file")
            raise ValueError(f"{name} is not what Moments.save wrote: {error}") from error
        loaded._rest = rest
        return loaded

    def _add(self, count: Count, mean: Array, rest: Array | float, m2: Array) -> None:
        if not np.any(count):
            return
        total = _total(self.count, count)
        if not isinstance(self.count, np.ndarray) and not self.count:
            self.count, self.mean, self.m2 = total, mean.copy(), m2.copy()
            self._rest = np.zeros_like(mean) + rest
            return
        merged = merge_compensated(self.count, self.mean, self._rest, self.m2, count, mean, rest, m2)
        self.count = total
        self.mean, self._rest, self.m2 = merged

    def _check_channels(self, channels: int) -> None:
        if channels != len(self.mean):
            raise ValueError(f"expected {len(self.mean)} channels, got {channels}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Moments):
            return NotImplemented
        return (
            np.array_equal(self.count, other.count)
            and np.array_equal(self.mean, other.mean, equal_nan=True)
            and np.array_equal(self.m2, other.m2, equal_nan=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Moments(count={self.count}, mean={self.mean}, m2={self.m2})"


# --- counts -----------------------------------------------------------------------------------------------------------


def _checked_count(count: Any, channels: int) -> Count:
    """A count as `Moments` keeps it: an int or a float for all channels, an array only where they differ."""
    if isinstance(count, int):  # of any size
        if count < 0:
            raise ValueError(f"count must not be negative, got {described(count)}")
        return integer(count, "count")
    values = converted(count, "count")
    if values.dtype.kind not in "iuf":
        raise TypeError(f"count must be one number or one for each channel, got {described(count)}")
    if values.shape not in ((), (channels,)):
        raise ValueError(f"count must be one number or have shape ({channels},), got {values.shape}")
    if not ((values >= 0) & np.isfinite(values)).all():
        raise ValueError(f"count must be finite and not negative, got {values}")
    if values.ndim == 0:
        return cast("int | float", values.item())
    if values.dtype.kind == "f":
        return _collapsed(values.astype(np.float64))
    if (values > np.iinfo(np.int64).max).any():
        raise ValueError(f"counts that differ must be below 2**63, got {values.max()}")
    return _collapsed(values.astype(np.int64))


def _collapsed(counts: Array) -> Count:
    """The one number of all channels, if they have one."""
    return counts if counts.size == 0 or (counts != counts[0]).any() else cast("int | float", counts[0].item())


def _total(a: Count, b: Count) -> Count:
    """a + b; raises OverflowError where integers that differ between channels pass int64."""
    if not isinstance(a, np.ndarray) and not isinstance(b, np.ndarray):
        return a + b
    total: Array = np.add(a, b)
    if total.dtype.kind == "i" and (total < 0).any():
        raise OverflowError("counts that differ between channels must stay below 2**63")
    return _collapsed(total)


# --- values that count, more or less ---------------------------------------------------------------------------------


def _omits(nan_policy: Any) -> bool:
    if not isinstance(nan_policy, str) or nan_policy not in ("propagate", "omit"):
        raise ValueError(f"nan_policy must be 'propagate' or 'omit', got {described(nan_policy)}")
    return nan_policy == "omit"


def _mask(where: ArrayLike | None, shape: tuple[int, ...]) -> Array | None:
    if where is None:
        return None
    mask = converted(where, "where")
    if mask.dtype != np.bool_:
        raise TypeError(f"where must be bool, got {mask.dtype}")
    return _broadcast(mask, shape, "where")


def _weights(weights: ArrayLike | None, shape: tuple[int, ...], axis: int) -> Array | None:
    """Weights of all values of an array; those of samples (N,) lie along its first axis that has no channels."""
    if weights is None:
        return None
    array = converted(weights, "weights")
    if array.dtype.kind not in "fiu":
        raise TypeError(f"weights must be real numbers, got {array.dtype}")
    if array.ndim == 1 and len(shape) > 1:
        samples = 0 if channel_axis(axis, len(shape)) else 1
        if len(array) != shape[samples]:
            raise ValueError(f"weights must be one for each of {shape[samples]} samples, got {len(array)}")
        array = np.expand_dims(array, tuple(i for i in range(len(shape)) if i != samples))
    return _broadcast(array, shape, "weights")


def _broadcast(array: Array, shape: tuple[int, ...], name: str) -> Array:
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(f"{name} must be broadcastable to the shape of x {shape}, got shape {array.shape}") from None


def _chosen_moments(x: Array, axis: int, mask: Array | None, weights: Array | None, omit: bool) -> Moments:
    """Moments of the values that count, in float64, some of them at a time."""
    moments = Moments.empty(x.shape[axis])
    reduced = tuple(i for i in range(x.ndim) if i != axis)
    for index in _blocks(x.shape, axis):
        values = x[index].astype(np.float64)
        chosen = np.ones(values.shape, bool) if mask is None else mask[index]
        if omit:
            chosen = chosen & ~np.isnan(values)
        factor = chosen
        if weights is not None:
            weight = weights[index].astype(np.float64)
            if not ((weight >= 0) & (weight < np.inf)).all():
                raise ValueError("weights must be finite and not negative")
            chosen = chosen & (weight > 0)
            factor = np.where(chosen, weight, 0.0)
        moments._add(*_block_moments(np.where(chosen, values, 0.0), factor, reduced))
    return moments


def _block_moments(values: Array, factor: Array, reduced: tuple[int, ...]) -> tuple[Count, Array, float, Array]:
    """Count, mean, its rest and m2 of each channel; the mean twice, so that the deviations are from the rounded one."""
    with np.errstate(all="ignore"):
        count = factor.sum(reduced, keepdims=True)
        divisor = np.where(count > 0, count, 1)
        mean = (factor * values).sum(reduced, keepdims=True) / divisor
        finite = np.isfinite(mean)
        mean = np.where(finite, mean + (factor * (values - mean)).sum(reduced, keepdims=True) / divisor, mean)
        m2 = np.where(finite, (factor * np.square(values - mean)).sum(reduced, keepdims=True), np.nan)
    return _collapsed(count.ravel()), mean.ravel(), 0.0, m2.ravel()


def _blocks(shape: tuple[int, ...], axis: int) -> Iterator[tuple[slice, ...]]:
    """Indices that cut an array into parts of about `BLOCK` values, with all channels each."""
    size, steps = shape[axis], list(shape)
    for i in reversed(range(len(shape))):
        if i != axis:
            steps[i] = min(shape[i], max(1, BLOCK // size))
            size *= steps[i]
    for begin in product(*(range(0, length, step) for length, step in zip(shape, steps, strict=True))):
        yield tuple(slice(first, first + step) for first, step in zip(begin, steps, strict=True))


def _npz(file: Any) -> Path:
    path = Path(os.fspath(file))
    return path if path.suffix == ".npz" else path.with_name(f"{path.name}.npz")
