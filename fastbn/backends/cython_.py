"""The kernels in Cython and C: adapters over `fastbn_ext`, which has the twins of `numba_`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import _engine
from fastbn._arrays import EMPTY, NO_SIGNS
from fastbn.backends import _plan
from fastbn.backends._plan import Plan, plan, workspace
from fastbn_ext import _kernels

Array = NDArray[Any]

NAME = "cython"

_NOTHING = np.empty(0)


def warmup() -> None:
    """Nothing to prepare: the kernels are compiled."""


def _cut(n: int, c: int, s: int, itemsize: int, reads: int, arrays: int) -> Plan:
    return plan(n, c, s, itemsize, reads, arrays, _engine.get_num_threads())


def sign_words(n: int, c: int, s: int, itemsize: int) -> int:
    """Number of uint16 words that `signs` needs."""
    return _plan.sign_words(n, c, s, _kernels.lanes(itemsize))


def moments(x: Array, n: int, c: int, s: int, mean: Array, m2: Array) -> None:
    """Mean and sum of squared deviations of every channel."""
    cut = _cut(n, c, s, x.itemsize, 1, 1)._replace(split=True)
    _, part = workspace(cut, c, 0, x.dtype)
    none, stats = EMPTY[x.dtype], np.empty((2, c))
    _kernels.forward(
        True, False, *cut, n, c, s, 0.0, 1.0, x, none, none, NO_SIGNS, stats, _NOTHING, none, part, x.itemsize
    )
    mean[:], m2[:] = stats


def forward(
    x: Array,
    residual: Array,
    weight: Array,
    bias: Array,
    eps: float,
    slope: float,
    n: int,
    c: int,
    s: int,
    y: Array,
    signs: Array,
    stats: Array,
    affine: Array,
) -> None:
    """Training: the batch's statistics, then the output."""
    cut = _cut(n, c, s, x.itemsize, 1, 3 if residual.size else 2)
    coef, part = workspace(cut, c, 3, x.dtype)
    affine[1] = weight if weight.size else 1.0
    affine[2] = bias if bias.size else 0.0
    _kernels.forward(
        True, True, *cut, n, c, s, eps, slope, x, residual, y, signs, stats, affine, coef, part, x.itemsize
    )


def transform(
    x: Array, residual: Array, affine: Array, slope: float, n: int, c: int, s: int, y: Array, signs: Array
) -> None:
    """y = activation((x - center) * scale + shift + residual)."""
    cut = _cut(n, c, s, x.itemsize, 1, 3 if residual.size else 2)
    coef, _ = workspace(cut, c, 3, x.dtype)
    _kernels.forward(
        False, True, *cut, n, c, s, 0.0, slope, x, residual, y, signs, _NOTHING, affine, coef, _NOTHING, x.itemsize
    )


def backward(
    dy: Array,
    x: Array,
    stats: Array,
    affine: Array,
    training: bool,
    slope: float,
    signs: Array,
    n: int,
    c: int,
    s: int,
    dx: Array,
    dresidual: Array,
    dweight: Array,
    dbias: Array,
) -> None:
    """Gradients of input, residual, weight and bias."""
    cut = _cut(n, c, s, x.itemsize, 2, 4 if dresidual.size else 3)
    coef, part = workspace(cut, c, 6, x.dtype)
    grads = np.empty((4, c))
    _kernels.backward(
        *(True, True, *cut, n, c, s, training, slope),
        *(dy, x, stats, affine, signs, dx, dresidual, grads, coef, part, x.itemsize),
    )
    dweight[:] = grads[0]
    dbias[:] = grads[1]


def gradient_sums(
    dy: Array, x: Array, stats: Array, affine: Array, slope: float, signs: Array, n: int, c: int, s: int, sums: Array
) -> None:
    """Sums of dy behind the activation, and of it times x - mean."""
    cut = _cut(n, c, s, x.itemsize, 2, 2)._replace(split=True)
    coef, part = workspace(cut, c, 6, x.dtype)
    none = EMPTY[x.dtype]
    _kernels.backward(
        *(True, False, *cut, n, c, s, True, slope),
        *(dy, x, stats, affine, signs, none, none, sums, coef, part, x.itemsize),
    )


def gradient_apply(
    dy: Array,
    x: Array,
    stats: Array,
    affine: Array,
    slope: float,
    signs: Array,
    n: int,
    c: int,
    s: int,
    dx: Array,
    dresidual: Array,
    grads: Array,
) -> None:
    """dx = scale * dy + a * (x - mean) + b and dresidual, with a and b the last two rows of `grads`."""
    cut = _cut(n, c, s, x.itemsize, 2, 4 if dresidual.size else 3)
    coef, _ = workspace(cut, c, 6, x.dtype)
    _kernels.backward(
        *(False, True, *cut, n, c, s, True, slope),
        *(dy, x, stats, affine, signs, dx, dresidual, grads, coef, _NOTHING, x.itemsize),
    )


def fold(
    running_mean: Array, running_var: Array, weight: Array, bias: Array, eps: float, stats: Array, affine: Array
) -> None:
    """Inference: statistics and one scale and shift a channel from the running ones."""
    _kernels.fold(running_mean, running_var, weight, bias, eps, stats, affine, running_mean.size, running_mean.itemsize)


def update_running(running_mean: Array, running_var: Array, stats: Array, count: int, factor: float) -> None:
    """Move the running statistics towards the batch's, the variance unbiased, by `factor`."""
    _kernels.update_running(running_mean, running_var, stats, count, factor, running_mean.size, running_mean.itemsize)


def describe() -> list[tuple[str, str]]:
    """What `show_config` says about this backend."""
    openmp = "OpenMP" if _kernels.openmp else "serial"
    chosen, available = _kernels.get_instruction_set(), ", ".join(_kernels.available_instruction_sets())
    return [("Cython", f"{openmp}, instruction set {chosen} (available: {available})")]
