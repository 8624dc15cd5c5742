"""Arguments that nobody should pass, and some that few do: for arrays, numbers, choices and outputs.

Every entry makes a value from a valid one, so that one table serves every parameter of every function.
"""

from __future__ import annotations

import array
import ctypes
import datetime as dt
import decimal
import fractions
from collections.abc import Callable
from typing import Any

import numpy as np
from arrays import ARRAY_LIKES, LAYOUTS

Make = Callable[[np.ndarray], Any]


class Raising:
    """An array-like that fails in its own way."""

    def __init__(self, error: Exception):
        self.error = error

    def __array__(self, dtype=None, copy=None):
        raise self.error


class WrongArray:
    """An array-like whose array is none."""

    def __array__(self, dtype=None, copy=None):
        return "no array"


class Producer:
    """A DLPack producer without `__array__`; options replace its methods."""

    def __init__(self, a: np.ndarray, error: Exception | None = None, device: tuple[int, int] = (1, 0)):
        self.a, self.error, self.device = a, error, device

    def __dlpack__(self, **options):
        if self.error:
            raise self.error
        return self.a.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device


class Number:
    """A number that fails when it is asked."""

    def __float__(self):
        raise KeyError("no float")

    def __index__(self):
        raise KeyError("no index")


class Unhashable(float):
    __hash__ = None


def _itself() -> list:
    values: list = []
    values.append(values)
    return values


def _nested(depth: int) -> list:
    values: Any = 1.0
    for _ in range(depth):
        values = [values]
    return values


def _masked(a: np.ndarray) -> np.ma.MaskedArray:
    return np.ma.masked_array(a, a > 0)


def _with_metadata(a: np.ndarray) -> np.ndarray:
    return a.astype(np.dtype(a.dtype.str, metadata={"unit": "m"}))


def _reshaped(a: np.ndarray, *more: int) -> np.ndarray:
    return a.reshape(a.shape + more)


DTYPES = (
    *("f2", "f8", "g", "i1", "i8", "u2", "u8", "?", "F", "D", "G", "O", "S8", "U8", "M8[s]", "m8[s]", ">f4", ">f8"),
    *("V4", [("a", "f4")], [("a", "f4"), ("b", "i8")], ("f4", (2,))),
)

THINGS: dict[str, Any] = {
    "nothing": lambda: None,
    "text": lambda: "nonsense",
    "number in text": lambda: "1.0",
    "no text": lambda: "",
    "bytes": lambda: b"1.0",
    "bytearray": lambda: bytearray(b"1234"),
    "True": lambda: True,
    "zero": lambda: 0,
    "one": lambda: 1,
    "minus one": lambda: -1,
    "float": lambda: 1.5,
    "NaN": lambda: float("nan"),
    "infinite": lambda: float("inf"),
    "negative infinite": lambda: float("-inf"),
    "smallest": lambda: 5e-324,
    "largest": lambda: 1.7e308,
    "complex": lambda: 1j,
    "2**31": lambda: 2**31,
    "2**63": lambda: 2**63,
    "-2**63": lambda: -(2**63),
    "10**400": lambda: 10**400,
    "10**5000": lambda: 10**5000,
    "Decimal": lambda: decimal.Decimal("0.1"),
    "signalling Decimal": lambda: decimal.Decimal("sNaN"),
    "Fraction": lambda: fractions.Fraction(1, 3),
    "date": lambda: dt.date(2000, 1, 1),
    "float32": lambda: np.float32(0.25),
    "int8": lambda: np.int8(1),
    "bool_": lambda: np.bool_(True),
    "datetime64": lambda: np.datetime64("2000-01-01"),
    "masked": lambda: np.ma.masked,
    "0-D array": lambda: np.array(0.25),
    "0-D integer": lambda: np.array(1),
    "array of one": lambda: np.array([0.25]),
    "array of two": lambda: np.array([0.25, 0.5]),
    "empty list": list,
    "list of one": lambda: [1],
    "list of text": lambda: ["a", "b"],
    "list of nothing": lambda: [None],
    "list of two kinds": lambda: [1.0, "b", None],
    "ragged": lambda: [[1.0], [2.0, 3.0]],
    "itself": _itself,
    "nested deeply": lambda: _nested(70),
    "nested too deeply": lambda: _nested(3000),
    "tuple": lambda: (),
    "dictionary": lambda: {"a": 1},
    "set": lambda: {1, 2},
    "range": lambda: range(3),
    "generator": lambda: (i for i in range(3)),
    "function": lambda: len,
    "class": lambda: float,
    "object": object,
    "ellipsis": lambda: ...,
    "slice": lambda: slice(None),
    "dtype": lambda: np.dtype("f4"),
    "module": lambda: np,
    "exception": lambda: ValueError("x"),
    "number that fails": Number,
    "unhashable": lambda: Unhashable(0.25),
    "array-like: KeyError": lambda: Raising(KeyError("key")),
    "array-like: ValueError": lambda: Raising(ValueError("no array today")),
    "array-like: RuntimeError": lambda: Raising(RuntimeError("no array today")),
    "array-like: without a message": lambda: Raising(ZeroDivisionError()),
    "array-like of no array": WrongArray,
}

ARRAYS: dict[str, Make] = {
    **{f"dtype {dtype}": (lambda a, dtype=dtype: _as(a, dtype)) for dtype in DTYPES},
    **LAYOUTS,
    **ARRAY_LIKES,
    "matrix": lambda a: a.reshape(a.shape[0], -1).view(np.matrix),
    "masked array": _masked,
    "masked array without a mask": np.ma.masked_array,
    "recarray": lambda a: a.astype([("a", "f4")]).view(np.recarray),
    "chararray": lambda a: np.char.array(a.astype("U8")),
    "dtype with metadata": _with_metadata,
    "array.array": lambda a: array.array("f", a.ravel().tolist()),
    "ctypes": lambda a: (ctypes.c_float * a.size)(*a.ravel().tolist()),
    "bytes of it": lambda a: a.tobytes(),
    "iterator": lambda a: iter(a.tolist()),
    "list of arrays": list,
    "flat iterator": lambda a: a.flat,
    "none of it": lambda a: a[:0],
    "none of the last axis": lambda a: a[..., :0],
    "none at all": lambda a: np.empty((0,) * a.ndim, a.dtype),
    "first": lambda a: a[:1],
    "first only": lambda a: a[0],
    "all but one": lambda a: a[:-1],
    "one more": lambda a: np.concatenate([a, a[:1]]),
    "one more at the end": lambda a: np.concatenate([a, a[..., :1]], -1),
    "an axis before": lambda a: a[None],
    "an axis behind": lambda a: a[..., None],
    "flat": lambda a: a.ravel(),
    "64 axes": lambda a: _reshaped(a, *(1,) * (64 - a.ndim)),
    "60 empty axes": lambda a: np.empty(a.shape + (0,) * (60 - a.ndim), a.dtype),
    "transposed": lambda a: a.T,
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
    "one value broadcast": lambda a: np.broadcast_to(a.dtype.type(0.5), a.shape),
    "overlapping windows": lambda a: np.lib.stride_tricks.as_strided(
        np.arange(99, dtype=a.dtype), a.shape, (a.itemsize,) * a.ndim
    ),
    "all NaN": lambda a: np.full_like(a, np.nan),
    "a NaN": lambda a: _with(a, np.nan),
    "an infinity": lambda a: _with(a, np.inf),
    "huge": lambda a: a * a.dtype.type(1e37),
    "tiny": lambda a: a * a.dtype.type(1e-40),
    "constant": lambda a: np.full_like(a, 0.1),
    "zeros": np.zeros_like,
    "DLPack only": Producer,
    "DLPack that fails": lambda a: Producer(a, BufferError("busy")),
    "DLPack that fails without a message": lambda a: Producer(a, KeyError()),
    "DLPack on another device": lambda a: Producer(a, device=(2, 0)),
    "DLPack of integers": lambda a: Producer(a.astype("i4")),
}


def _as(a: np.ndarray, dtype: Any) -> np.ndarray:
    if isinstance(dtype, str) and dtype[0] in "Mm":
        return np.round(a).astype("i8").astype(dtype)
    if isinstance(dtype, str) and dtype[0] == "V":
        return a.view(dtype)
    with np.errstate(all="ignore"):
        return a.astype(dtype)


def _with(a: np.ndarray, value: float) -> np.ndarray:
    a = a.copy()
    a.flat[0] = value
    return a


def for_pytorch(torch: Any) -> dict[str, Make]:
    """Tensors of all kinds, as made from an array."""
    return {
        "tensor": torch.tensor,
        "tensor that shares memory": torch.from_numpy,
        "tensor with a gradient": lambda a: torch.tensor(a, requires_grad=True),
        "tensor, transposed": lambda a: torch.tensor(a).T if a.ndim == 2 else torch.tensor(a).movedim(0, -1),
        "half tensor": lambda a: torch.tensor(a).half(),
        "bfloat16 tensor": lambda a: torch.tensor(a).bfloat16(),
        "integer tensor": lambda a: torch.tensor(a).long(),
        "sparse tensor": lambda a: torch.tensor(a).to_sparse(),
        "tensor without values": lambda a: torch.tensor(a).to("meta"),
        "conjugate tensor": lambda a: torch.tensor(a + 0j).conj(),
        "negative tensor": lambda a: torch._neg_view(torch.tensor(a)),
        "parameter": lambda a: torch.nn.Parameter(torch.tensor(a)),
    }
