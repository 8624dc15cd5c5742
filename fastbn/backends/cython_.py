"""The kernels in Cython and C: adapters over `fastbn_ext`, which has the twins of `_numba`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn._arrays import FLOATS
from fastbn.backends import _images
from fastbn.backends._operations import Operations
from fastbn_ext import _kernels

Array = NDArray[Any]

NAME = "cython"

IMAGE_DTYPES = (*_images.INTEGERS, _images.HALF, *FLOATS)  # in the order of image_types.h


def warmup() -> None:
    """Nothing to prepare: the kernels are compiled."""


def _image_kernel_of(dtype: np.dtype[Any]) -> Callable[..., None]:
    return functools.partial(_kernels.image_sums, IMAGE_DTYPES.index(dtype))


_operations = Operations(lambda _: _kernels.kernel, lambda: sys.maxsize, _kernels.lanes, _image_kernel_of)
sign_words, moments, forward, transform = (
    _operations.sign_words,
    _operations.moments,
    _operations.forward,
    _operations.transform,
)
backward, gradient_sums, gradient_apply = (
    _operations.backward,
    _operations.gradient_sums,
    _operations.gradient_apply,
)


def describe() -> list[tuple[str, str]]:
    """What `show_config` says about this backend."""
    openmp = "OpenMP" if _kernels.openmp else "serial"
    chosen, available = _kernels.get_instruction_set(), ", ".join(_kernels.available_instruction_sets())
    return [("Cython", f"{openmp}, instruction set {chosen} (available: {available})")]
