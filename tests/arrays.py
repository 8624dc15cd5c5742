"""The same values in memory in different ways."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def _readonly(a: np.ndarray) -> np.ndarray:
    b = a.copy()
    b.flags.writeable = False
    return b


def _every_second(a: np.ndarray) -> np.ndarray:
    wide = np.full([2 * n for n in a.shape], 7, a.dtype)
    view = wide[(slice(None, None, 2),) * a.ndim]
    view[...] = a
    return view


def _backwards(a: np.ndarray) -> np.ndarray:
    flip = (slice(None, None, -1),) * a.ndim
    return a[flip].copy()[flip]


def _window(a: np.ndarray) -> np.ndarray:
    """Inside an array with a border, as after padding: rows are contiguous, nothing else is."""
    wide = np.full([n + 2 for n in a.shape], 7, a.dtype)
    view = wide[(slice(1, -1),) * a.ndim]
    view[...] = a
    return view


def _channels_moved(a: np.ndarray) -> np.ndarray:
    """Second axis fastest, or last axis second: the other layout, transposed back."""
    return np.moveaxis(np.moveaxis(a, 1, -1).copy(), -1, 1)


def _at_offset(n_bytes: int) -> Callable[[np.ndarray], np.ndarray]:
    def place(a: np.ndarray) -> np.ndarray:
        raw = np.zeros(a.nbytes + 128, np.uint8)
        start = -raw.ctypes.data % 64 + n_bytes
        b = raw[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
        b[...] = a
        return b

    return place


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "read-only": _readonly,
    "strided": _every_second,
    "negative strides": _backwards,
    "window": _window,
    "Fortran": np.asfortranarray,
    "other channel order": _channels_moved,
    "64-byte aligned": _at_offset(0),
    "8 bytes off": _at_offset(8),
    "unaligned": _at_offset(3),
}

# No plain arrays, yet what NumPy takes for one.
ARRAY_LIKES: dict[str, Callable[[np.ndarray], object]] = {
    "list": np.ndarray.tolist,
    "tuple": lambda a: tuple(a.tolist()),
    "subclass": lambda a: a.view(type("Sub", (np.ndarray,), {})),
    "memoryview": memoryview,
}
