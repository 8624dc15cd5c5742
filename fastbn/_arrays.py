"""The boundary: what may come in, and how kernels see it.

Kernels want dense memory, seen as (N, C, S). Any dense array can be seen so without a copy, whatever the order of its
axes: the axes before the channel axis in memory make N, those behind it S. Everything else (strided, reversed,
unaligned) is copied once.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
_SHORT = (np.float16, np.uint8, np.uint16, np.int8, np.int16)
MEASURED: tuple[np.dtype[Any], ...] = (*FLOATS, *map(np.dtype, _SHORT))  # what statistics are taken of

_ALIGNED_C = 0x100 | 0x1  # bits of ndarray.flags.num
_WRITEABLE = 0x400
_UPDATABLE = _ALIGNED_C | _WRITEABLE


@dataclass(slots=True)
class View:
    """A dense array as kernels see it: (n, c, s) in the order of memory."""

    array: Array  # the given one, or a dense copy
    n: int
    c: int
    s: int


def floating(x: Any, name: str = "x", dtypes: tuple[np.dtype[Any], ...] = FLOATS) -> Array:
    """`x` as an array of float32 or float64, or of one of the given dtypes.

    Raises
    ------
    TypeError
        If it has another dtype, or is a masked array (whose mask would be lost).
    """
    if type(x) is not np.ndarray:
        x = converted(x, name)
    if x.dtype not in dtypes:
        expected = f"{', '.join(map(str, dtypes[:-1]))} or {dtypes[-1]}"
        raise TypeError(f"{name} must be {expected}, got {_dtype_in_words(x.dtype, dtypes)}")
    array: Array = x
    return array


def described(value: Any) -> str:
    """What came, in a few words: errors are read."""
    if isinstance(value, np.ndarray):
        return f"{type(value).__name__} of {value.dtype} and shape {value.shape}"
    flat_ones = value if isinstance(value, list | tuple) and len(value) <= 4 else (value,)
    if not all(isinstance(part, int | float | complex | str | bytes | None) for part in flat_ones):
        return type(value).__name__
    try:
        text = repr(value)
    except ValueError:  # Python writes no integers of thousands of digits
        return f"{type(value).__name__}, too large to write"
    return text if len(text) <= 60 else f"{text[:60]}..."


def converted(x: Any, name: str) -> Array:
    """`x` as an array of whatever dtype, without a copy where NumPy needs none."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, and its mask would be ignored; pass x.filled(...) or x.data")
    try:
        if hasattr(x, "__dlpack__") and not hasattr(x, "__array__"):
            return np.from_dlpack(x)
        return np.asarray(x)
    except Exception as error:  # whatever a foreign object raises
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{name} cannot be made an array, got {described(x)} ({type(error).__name__}: {error})") from error


def _dtype_in_words(dtype: np.dtype[Any], dtypes: tuple[np.dtype[Any], ...]) -> str:
    if dtype.newbyteorder("=") in dtypes:
        return f"{dtype.newbyteorder('=')} in foreign byte order; x.astype({dtype.newbyteorder('=')!s}) converts it"
    return str(dtype)


@lru_cache(4096)
def _sizes(shape: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    """(N, C, S) of a C-contiguous array; the axis may be counted from the back."""
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
    index = integer(axis, "axis")
    if not -ndim <= index < ndim:
        raise np.exceptions.AxisError(f"axis {described(index)} is out of bounds for array of dimension {ndim}")
    return index % ndim


def integer(value: Any, name: str) -> int:
    """`value` as an int; truth values and whole floats are none."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError  # said below
        return operator.index(value)
    except Exception as error:
        raise TypeError(f"{name} must be an integer, got {described(value)} ({type(value).__name__})") from error


def real(value: Any, name: str) -> float:
    """`value` as a float; strings, None and complex numbers are none."""
    if type(value) is float:
        return value
    try:
        if isinstance(value, str | bytes | bytearray):
            raise TypeError  # said below
        return float(value)
    except Exception as error:
        kind = ValueError if isinstance(error, OverflowError) else TypeError
        raise kind(f"{name} must be a number, got {described(value)}") from error


def truth(value: Any, name: str) -> bool:
    """`value` as a truth value; arrays of several have none."""
    try:
        return bool(value)
    except Exception as error:
        raise TypeError(f"{name} must be True or False, got {described(value)}") from error


def view(x: Array, axis: int) -> View:
    """`x` as kernels see it, copied only where it is not dense."""
    if type(axis) is not int:
        axis = channel_axis(axis, x.ndim)
    if x.flags.num & _ALIGNED_C == _ALIGNED_C:
        n, c, s = _sizes(x.shape, axis)
        return View(x, n, c, s)
    order = sorted(range(x.ndim), key=lambda i: -x.strides[i])
    ordered = x.transpose(order)
    if ordered.flags.num & _ALIGNED_C == _ALIGNED_C:
        position = order.index(channel_axis(axis, x.ndim))
        return View(x, *_sizes(ordered.shape, position))
    axis = channel_axis(axis, x.ndim)
    x = x.copy("C")
    return View(x, *_sizes(x.shape, axis))


def wrong_channels(expected: int, axis: int, got: View) -> ValueError:
    """The error for an input of another number of channels."""
    return ValueError(
        f"expected {expected} channels on axis {axis}, got {got.c} in an input of shape {got.array.shape}"
    )


def flat(x: Array) -> Array:
    """Values of a dense array in memory order, as a view; a matrix would stay one."""
    x = np.asarray(x)
    return x.reshape(-1) if x.flags.num & 0x1 else x.ravel("K")


def same_layout(x: Array, like: View) -> Array:
    """`x` itself or a copy, in the memory order of `like`."""
    if x.strides == like.array.strides and x.flags.num & 0x100:
        return x
    copy = np.empty_like(like.array)
    np.copyto(copy, x)
    return copy


def check_out(out: Any, shape: tuple[int, ...], dtype: np.dtype[Any], name: str = "out") -> None:
    """Refuse an `out` that cannot take the result."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(out).__name__}")
    if type(out) is not np.ndarray and isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a NumPy array, got a masked one, whose mask would be ignored")
    if out.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, got {out.dtype}")
    if out.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {out.shape}")
    flags = out.flags.num
    if not flags & _WRITEABLE:
        raise ValueError(f"{name} is read-only")
    if not flags & 0x3 and _may_collide(out):
        raise ValueError(f"{name} has values that overlap each other: shape {shape}, strides {out.strides}")


def check_apart(out: Any, running_mean: Array | None, running_var: Array | None) -> None:
    """Refuse an `out` that lies over running statistics: one would overwrite the other."""
    for name, values in (("running_mean", running_mean), ("running_var", running_var)):
        if values is None or not isinstance(out, np.ndarray):
            continue
        if np.may_share_memory(out, values) and np.shares_memory(out, values):
            raise ValueError(f"out shares memory with {name}, which is updated too")


def _may_collide(x: Array) -> bool:
    """Whether two values of an array may share memory, as in windows or what is broadcast."""
    reach = x.itemsize
    for stride, length in sorted((abs(stride), n) for stride, n in zip(x.strides, x.shape, strict=True) if n > 1):
        if stride < reach:
            return x.size > 0
        reach += stride * (length - 1)
    return False


def writable_in_place(out: Array, like: View, inputs: tuple[Array | None, ...]) -> bool:
    """Whether kernels may write to `out` directly: laid out like the input, and overlapping no input but exactly."""
    if out.strides != like.array.strides or not out.flags.num & 0x100:
        return False
    for other in inputs:
        if other is None or other is out:
            continue
        if np.may_share_memory(out, other) and not _same_memory(out, other):
            return False
    return True


def _same_memory(a: Array, b: Array) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.strides == b.strides
        and a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
    )


def channel_vector(values: Any, name: str, channels: int, update: bool = False) -> Array:
    """A vector of one float a channel, contiguous; `values` itself where it is one already.

    Raises
    ------
    TypeError, ValueError
        If it has no float dtype, or another length; or is to be updated in place, and cannot be.
    """
    needed = _UPDATABLE if update else _ALIGNED_C
    if type(values) is np.ndarray and values.dtype in FLOATS and values.flags.num & needed == needed:
        vector: Array = values
    else:
        if update:
            _check_updatable(values, name)
        vector = np.ascontiguousarray(numbers(values, name))
    if vector.shape != (channels,):
        got = f"{vector.shape[0]}" if vector.ndim == 1 else f"shape {vector.shape}"
        raise ValueError(f"{name} should contain {channels} elements not {got}")
    return vector


def _check_updatable(values: Any, name: str) -> None:
    if not (isinstance(values, np.ndarray) and values.dtype.kind == "f"):
        kind = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
        raise TypeError(f"{name} is updated in place and must be an array of float32 or float64, got {kind}")
    if not values.flags.writeable:
        raise ValueError(f"{name} is updated in place but read-only")
    if _may_collide(values):
        raise ValueError(f"{name} is updated in place, but its values overlap: strides {values.strides}")


def numbers(values: Any, name: str) -> Array:
    """Real numbers as an array of floats: float32 where half as many bits hold them, else float64."""
    array = converted(values, name)
    if array.dtype not in FLOATS:
        if array.dtype.kind not in "fiu":
            raise TypeError(f"{name} must be real numbers, got {array.dtype}")
        array = array.astype(np.float32 if array.dtype == np.float16 else np.float64)
    return np.require(array, requirements="A")
