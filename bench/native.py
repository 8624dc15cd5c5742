"""The compiled yardsticks: the fastest copy, oneDNN, and a probe of the machine.

`yardsticks.cpp` is built at first use, beside the bytecode.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import subprocess
import sys
import weakref
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from fastbn._engine import cpu_features

LAYOUTS = ("nchw", "nhwc", "nChw16c", "nChw8c")
OPS = ("train", "eval", "backward")
SOURCE = Path(__file__).with_name("yardsticks.cpp")
PREFIX = Path(sys.prefix)

Pointer, Long = ctypes.c_void_p, ctypes.c_long
SIGNATURES = {
    "set_threads": (None, ctypes.c_int),
    "copy_plain": (None, Pointer, Pointer, Long),
    "copy_stream": (None, Pointer, Pointer, Long),
    "probe": (None, ctypes.POINTER(ctypes.c_double), ctypes.POINTER(ctypes.c_double)),
    "norm_new": (Pointer, *[ctypes.c_int] * 3, Pointer, ctypes.c_float, *[Pointer] * 6),
    "norm_run": (None, Pointer),
    "norm_result": (None, Pointer, Pointer, Pointer),
    "norm_free": (None, Pointer),
}


def has_onednn() -> bool:
    """Whether oneDNN's library and headers are in this environment."""
    return bool(_dnnl()) and (PREFIX / "include" / "oneapi" / "dnnl" / "dnnl.hpp").exists()


def _dnnl() -> str | None:
    return next((str(path) for path in sorted((PREFIX / "lib").glob("libdnnl.so.*"))), None)


def layouts() -> tuple[str, ...]:
    """Those for which oneDNN has its fast code here: the blocks are those of the CPU's registers."""
    return "nchw", "nhwc", "nChw16c" if "avx512f" in cpu_features() else "nChw8c"


@functools.cache
def library() -> ctypes.CDLL:
    """The yardsticks, compiled where that has not been done yet."""
    command = ["g++", "-O2", "-std=c++17", "-fopenmp", "-shared", "-fPIC", str(SOURCE)]
    dnnl = _dnnl()
    if has_onednn() and dnnl:
        lib = PREFIX / "lib"
        command += ["-DWITH_ONEDNN", f"-I{PREFIX / 'include'}", dnnl, f"-Wl,-rpath,{lib}"]
    key = hashlib.sha256(repr(command).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    built = SOURCE.parent / "__pycache__" / f"yardsticks-{key}.so"
    if not built.exists():
        built.parent.mkdir(exist_ok=True)
        subprocess.run([*command, "-o", str(built)], check=True)
    loaded = ctypes.CDLL(str(built))
    for name, (result, *arguments) in SIGNATURES.items():
        if name.startswith("norm") and not has_onednn():
            continue
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


class Norm:
    """oneDNN's batch norm of an (N, C, H, W) float32 array in one layout; `run()` computes, `result()` is (N, C, H, W).

    Raises
    ------
    ValueError
        Where oneDNN refuses.
    """

    def __init__(
        self,
        op: str,
        layout: str,
        x: np.ndarray,
        dy: np.ndarray,
        vectors: tuple[np.ndarray, ...],
        eps: float,
        relu: bool = False,
    ) -> None:
        self._shape = (Long * 4)(*x.shape)
        self._dims = x.shape
        arrays = [np.ascontiguousarray(a, np.float32) for a in (x, dy, *vectors)]
        handle = library().norm_new(
            OPS.index(op), LAYOUTS.index(layout), relu, self._shape, eps, *(a.ctypes.data for a in arrays)
        )
        if not handle:
            raise ValueError(f"oneDNN refuses {op} of {x.shape} in {layout}")
        weakref.finalize(self, library().norm_free, handle)
        self._handle = handle
        self.run = functools.partial(library().norm_run, handle)

    def result(self) -> np.ndarray:
        values = np.empty(self._dims, np.float32)
        library().norm_result(self._handle, self._shape, values.ctypes.data)
        return values


def installed(module: str) -> bool:
    """Whether a Python module can be imported."""
    return find_spec(module) is not None
