"""The boundary: what may come in, and how kernels see it.

Kernels want flat arrays in memory order, seen as (N, C, S). Any dense array can be seen so without a copy, whatever the
order of its axes: the axes before the channel axis in memory make N, those behind it S. Everything else (strided,
reversed, unaligned) is copied once.
"""

from __future__ import annotations

import math
import operator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
EMPTY = {dtype: np.empty(0, dtype) for dtype in FLOATS}
NO_SIGNS = np.empty(0, np.uint16)

_ALIGNED_C = 0x100 | 0x1  # bits of ndarray.flags.num
_WRITEABLE = 0x400


class View(NamedTuple):
    """A dense array as kernels see it."""

    array: Array  # the given one, or a dense copy
    flat: Array  # (n * c * s,) in memory order, sharing memory with `array`
    n: int
    c: int
    s: int


def floating(x: Any, name: str = "x") -> Array:
    """`x` as an array of float32 or float64.

    Raises
    ------
    TypeError
        If it has another dtype, or is a masked array (whose mask would be lost).
    """
    if type(x) is not np.ndarray:
        x = _converted(x, name)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32 or float64, got {_dtype_in_words(x.dtype)}")
    array: Array = x
    return array


def _converted(x: Any, name: str) -> Array:
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, and its mask would be ignored; pass x.filled(...) or x.data")
    if hasattr(x, "__dlpack__") and not hasattr(x, "__array__"):
        return np.from_dlpack(x)
    try:
        return np.asarray(x)
    except ValueError as error:
        raise ValueError(f"{name} cannot be made an array: {error}") from error


def _dtype_in_words(dtype: np.dtype[Any]) -> str:
    if dtype.newbyteorder("=") in FLOATS:
        return f"{dtype.newbyteorder('=')} in foreign byte order; x.astype({dtype.newbyteorder('=')!s}) converts it"
    return str(dtype)


@lru_cache(4096, typed=True)
def _sizes(shape: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    """(N, C, S) of a C-contiguous array."""
    axis = channel_axis(axis, len(shape))
    if shape[axis] == 0:
        raise ValueError(f"there must be at least one channel, got none on axis {axis} of shape {shape}")
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


def channel_axis(axis: int, ndim: int) -> int:
    """`axis` counted from the front.

    Raises
    ------
    TypeError
        If it is no integer.
    numpy.exceptions.AxisError
        If there is no such axis; a ValueError and an IndexError.
    """
    if isinstance(axis, bool):
        raise TypeError("axis must be an integer, got bool")
    try:
        index = operator.index(axis)
    except TypeError:
        raise TypeError(f"axis must be an integer, got {type(axis).__name__}") from None
    if not -ndim <= index < ndim:
        raise np.exceptions.AxisError(index, ndim)
    return index % ndim


def view(x: Array, axis: int) -> View:
    """`x` as kernels see it, copied only where it is not dense."""
    if x.flags.num & _ALIGNED_C == _ALIGNED_C:
        return View(x, x.reshape(-1), *_sizes(x.shape, axis))
    order = sorted(range(x.ndim), key=lambda i: -x.strides[i])
    ordered = x.transpose(order)
    if ordered.flags.num & _ALIGNED_C == _ALIGNED_C:
        position = order.index(channel_axis(axis, x.ndim))
        return View(x, ordered.reshape(-1), *_sizes(ordered.shape, position))
    x = x.copy("C")
    return View(x, x.reshape(-1), *_sizes(x.shape, axis))


def flat(x: Array) -> Array:
    """Values of a dense array in memory order, as a view."""
    return x.reshape(-1) if x.flags.num & 0x1 else x.ravel("K")


def same_layout(x: Array, like: View) -> Array:
    """Values of `x` flat, in the memory order of `like`."""
    if x.strides == like.array.strides and x.flags.num & 0x100:
        return flat(x)
    copy = np.empty_like(like.array)
    np.copyto(copy, x)
    return flat(copy)


def check_out(out: Any, shape: tuple[int, ...], dtype: np.dtype[Any], name: str = "out") -> None:
    """Refuse an `out` that cannot take the result."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(out).__name__}")
    if out.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, got {out.dtype}")
    if out.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {out.shape}")
    if not out.flags.num & _WRITEABLE:
        raise ValueError(f"{name} is read-only")


def writable_in_place(out: Array, like: View, inputs: tuple[Array, ...]) -> bool:
    """Whether kernels may write to `out` directly: laid out like the input, and overlapping no input but exactly."""
    if out.strides != like.array.strides or not out.flags.num & 0x100:
        return False
    return all(other is out or not np.may_share_memory(out, other) or _same_memory(out, other) for other in inputs)


def _same_memory(a: Array, b: Array) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.strides == b.strides
        and a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
    )


def channel_vector(values: Any, name: str, channels: int) -> Array:
    """A vector of one float a channel, contiguous; `values` itself where it is one already.

    Raises
    ------
    TypeError, ValueError
        If it has no float dtype, or another length.
    """
    if type(values) is np.ndarray and values.dtype in FLOATS and values.flags.num & _ALIGNED_C == _ALIGNED_C:
        vector: Array = values
    else:
        vector = np.ascontiguousarray(_numbers(values, name))
    if vector.shape != (channels,):
        got = f"{vector.shape[0]}" if vector.ndim == 1 else f"shape {vector.shape}"
        raise ValueError(f"{name} should contain {channels} elements not {got}")
    return vector


def _numbers(values: Any, name: str) -> Array:
    array = _converted(values, name)
    if array.dtype not in FLOATS:
        if array.dtype.kind not in "fiu":
            raise TypeError(f"{name} must be real numbers, got {array.dtype}")
        array = array.astype(np.float32 if array.dtype == np.float16 else np.float64)
    return np.require(array, requirements="A")
