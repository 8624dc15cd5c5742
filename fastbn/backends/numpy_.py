"""The kernels in plain NumPy: what the compiled twins must compute, short enough to check by eye.

All arithmetic is in float64, a few samples at a time, and is rounded once to the output's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn._arrays import flat
from fastbn._channels import Parameters, finish_statistics, fold, update_running
from fastbn._merge import merge_compensated

Array = NDArray[Any]

NAME = "numpy"
BLOCK = 1 << 16  # values that are worked on at once


def describe() -> list[tuple[str, str]]:
    """What `show_config` says about this backend."""
    return []


def warmup() -> None:
    """Nothing to prepare."""


def sign_words(n: int, c: int, s: int, itemsize: int) -> int:
    """Number of uint16 words that `signs` needs: one bit a value."""
    return -(-n * c * s // 16)


def moments(x: Array, n: int, c: int, s: int, mean: Array, rest: Array, m2: Array) -> None:
    """Mean, what rounding took from it, and sum of squared deviations of every channel, block by block."""
    count = 0
    mean[:] = rest[:] = m2[:] = 0.0
    with np.errstate(all="ignore"):
        for part in _parts(n, c, s):
            block = _wide(x, n, c, s)(part)
            shift = np.where(np.isfinite(block[0, :, 0]), block[0, :, 0], 0.0)
            shift = shift + (block - shift[:, None]).mean((0, 2))  # exact where the block is constant
            shift = np.where(np.isfinite(shift), shift, 0.0)
            deviations = block - shift[:, None]
            block_rest, size = deviations.mean((0, 2)), block.shape[0] * block.shape[2]
            block_m2 = np.square(deviations - block_rest[:, None]).sum((0, 2))
            infinite = ~np.isfinite(block_rest)
            shift[infinite], block_rest[infinite] = block_rest[infinite], 0.0
            merged = merge_compensated(count, mean, rest, m2, size, shift, block_rest, block_m2)
            mean[:], rest[:], m2[:] = merged
            count += size


def forward(
    x: Array,
    residual: Array | None,
    parameters: Parameters,
    training: bool,
    factor: float | None,
    eps: float,
    slope: float,
    n: int,
    c: int,
    s: int,
    y: Array,
    signs: Array | None,
    norm: Array,
) -> None:
    """`norm` of the batch, which the running statistics follow by `factor` if any, or of these; the output."""
    _, _, running_mean, running_var, _ = parameters
    if training:
        mean, rest, m2 = np.empty((3, c))
        moments(x, n, c, s, mean, rest, m2)
        found = finish_statistics(n * s, mean, m2, parameters, eps)
        if factor is not None and running_mean is not None and running_var is not None:
            update_running(running_mean, running_var, found, n * s, factor)
        norm[:] = found
    else:
        norm[:] = fold(parameters, eps)
    transform(x, residual, norm, slope, n, c, s, y, signs)


def transform(
    x: Array, residual: Array | None, norm: Array, slope: float, n: int, c: int, s: int, y: Array, signs: Array | None
) -> None:
    """y = activation((x - center) * scale + shift + residual)."""
    out = _seen(y, n, c, s)
    open_ = None if signs is None else np.empty((n, c, s), bool)
    with np.errstate(all="ignore"):
        for part in _parts(n, c, s):
            z = _preactivation(_wide(x, n, c, s)(part), norm)
            if residual is not None:
                z += _wide(residual, n, c, s)(part)
            if slope != 1.0:
                positive = ~(z <= 0)  # NaN is let through
                if open_ is not None:
                    open_[part] = positive
                z = _activated(z, positive, slope)
            out[part] = z
    if signs is not None and open_ is not None:
        packed = np.packbits(open_)
        signs.view(np.uint8)[: packed.size] = packed


def backward(
    dy: Array,
    x: Array,
    norm: Array,
    training: bool,
    slope: float,
    signs: Array | None,
    n: int,
    c: int,
    s: int,
    dx: Array,
    dresidual: Array | None,
    dweight: Array,
    dbias: Array,
) -> None:
    """Gradients of input, residual, weight and bias (Ioffe and Szegedy 2015, section 3)."""
    mean, _, invstd, _, scale, _ = norm[:, :, None]
    sums = np.empty((2, c))
    gradient_sums(dy, x, norm, slope, signs, n, c, s, sums)
    sum_dy, dot = sums[:, :, None]
    gated = _gated(dy, x, norm, slope, signs, n, c, s)
    with np.errstate(all="ignore"):
        dweight[:] = (dot * invstd)[:, 0]
        dbias[:] = sums[0]
        for part in _parts(n, c, s):
            g = gated(part)
            if dresidual is not None:
                _seen(dresidual, n, c, s)[part] = g
            if training:
                g = g - sum_dy / (n * s) - (_wide(x, n, c, s)(part) - mean) * (dot * invstd**2 / (n * s))
            _seen(dx, n, c, s)[part] = scale * g


def gradient_sums(
    dy: Array,
    x: Array,
    norm: Array,
    slope: float,
    signs: Array | None,
    n: int,
    c: int,
    s: int,
    sums: Array,
) -> None:
    """Sums of dy behind the activation, and of it times x - mean."""
    sums[:] = 0.0
    gated = _gated(dy, x, norm, slope, signs, n, c, s)
    with np.errstate(all="ignore"):
        for part in _parts(n, c, s):
            g = gated(part)
            sums[0] += g.sum((0, 2))
            sums[1] += (g * (_wide(x, n, c, s)(part) - norm[0][:, None])).sum((0, 2))


def gradient_apply(
    dy: Array,
    x: Array,
    norm: Array,
    slope: float,
    signs: Array | None,
    n: int,
    c: int,
    s: int,
    dx: Array,
    dresidual: Array | None,
    grads: Array,
) -> None:
    """dx = scale * dy + a * (x - mean) + b and dresidual, with a and b the last two rows of `grads`."""
    _, _, a, b = grads[:, :, None]
    gated = _gated(dy, x, norm, slope, signs, n, c, s)
    with np.errstate(all="ignore"):
        mean, scale = norm[0].astype(x.dtype)[:, None], norm[4][:, None]
        for part in _parts(n, c, s):
            g = gated(part)
            centred = _wide(x, n, c, s)(part) - mean
            if dresidual is not None:
                _seen(dresidual, n, c, s)[part] = g
            _seen(dx, n, c, s)[part] = scale * g + (a * centred + b)


def _parts(n: int, c: int, s: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of (n, c, s) with about `BLOCK` values each: some samples, or a piece of one."""
    samples = max(1, BLOCK // (c * s))
    length = max(1, BLOCK // c)
    for first in range(0, n, samples):
        for column in range(0, s, length):
            yield slice(first, first + samples), slice(None), slice(column, column + length)


def _seen(x: Array, n: int, c: int, s: int) -> Array:
    """A view of x in the order of memory."""
    return flat(x).reshape(n, c, s)


def _wide(x: Array, n: int, c: int, s: int) -> Callable[[Any], Array]:
    """x as float64, part by part."""
    seen = _seen(x, n, c, s)
    return lambda part: seen[part].astype(np.float64)


def _preactivation(x: Array, norm: Array) -> Array:
    center, scale, shift = norm[3:, :, None]
    z: Array = (x - center) * scale + shift
    return z


def _activated(z: Array, positive: Array, slope: float) -> Array:
    return np.where(positive, z, 0.0 if slope == 0.0 else slope * z)


def _gated(dy: Array, x: Array, norm: Array, slope: float, signs: Array | None, *size: int) -> Callable[[Any], Array]:
    """dy behind the activation, part by part; its signs are read or, without a residual, computed again."""
    wide, wide_x = _wide(dy, *size), _wide(x, *size)
    if slope == 1.0:
        return wide
    if signs is not None:
        open_ = np.unpackbits(signs.view(np.uint8), count=dy.size).reshape(size) == 1
        return lambda part: _activated(wide(part), open_[part], slope)
    return lambda part: _activated(wide(part), ~(_preactivation(wide_x(part), norm) <= 0), slope)
