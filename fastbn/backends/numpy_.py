"""The kernels in plain NumPy: what the compiled twins must compute, short enough to check by eye.

All arithmetic is in float64, a few samples at a time, and is rounded once to the output's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    mean, var, invstd = stats
    moments(x, n, c, s, mean, np.empty(c), var)
    with np.errstate(all="ignore"):
        var /= n * s
        invstd[:] = 1 / np.sqrt(var + eps)
        affine[0] = mean
        affine[1] = (weight if weight.size else 1.0) * invstd
        affine[2] = bias if bias.size else 0.0
    transform(x, residual, affine, slope, n, c, s, y, signs)


def fold(
    running_mean: Array, running_var: Array, weight: Array, bias: Array, eps: float, stats: Array, affine: Array
) -> None:
    """Inference: statistics and one scale and shift a channel from the running ones."""
    with np.errstate(all="ignore"):
        stats[0] = running_mean
        stats[1] = running_var
        stats[2] = 1 / np.sqrt(stats[1] + eps)
        affine[0] = 0.0
        affine[1] = (weight if weight.size else 1.0) * stats[2]
        affine[2] = (bias if bias.size else 0.0) - stats[0] * affine[1]


def update_running(running_mean: Array, running_var: Array, stats: Array, count: int, factor: float) -> None:
    """Move the running statistics towards the batch's, the variance unbiased, by `factor`."""
    with np.errstate(all="ignore"):
        running_mean[:] = (1 - factor) * running_mean.astype(np.float64) + factor * stats[0]
        running_var[:] = (1 - factor) * running_var.astype(np.float64) + factor * (count / (count - 1)) * stats[1]


def transform(
    x: Array, residual: Array, affine: Array, slope: float, n: int, c: int, s: int, y: Array, signs: Array
) -> None:
    """y = activation((x - center) * scale + shift + residual)."""
    out = y.reshape(n, c, s)
    open_ = np.empty((n, c, s), bool) if signs.size else None
    with np.errstate(all="ignore"):
        for part in _parts(n, c, s):
            z = _preactivation(_wide(x, n, c, s)(part), affine)
            if residual.size:
                z += _wide(residual, n, c, s)(part)
            if slope != 1.0:
                positive = ~(z <= 0)  # NaN is let through
                if open_ is not None:
                    open_[part] = positive
                z = _activated(z, positive, slope)
            out[part] = z
    if open_ is not None:
        packed = np.packbits(open_)
        signs.view(np.uint8)[: packed.size] = packed


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
    """Gradients of input, residual, weight and bias (Ioffe and Szegedy 2015, section 3)."""
    mean, _, invstd = (row[:, None] for row in stats)
    sums = np.empty((2, c))
    gradient_sums(dy, x, stats, affine, slope, signs, n, c, s, sums)
    sum_dy, dot = sums[:, :, None]
    gated = _gated(dy, x, affine, slope, signs, n, c, s)
    with np.errstate(all="ignore"):
        dweight[:] = (dot * invstd)[:, 0]
        dbias[:] = sums[0]
        for part in _parts(n, c, s):
            g = gated(part)
            if dresidual.size:
                dresidual.reshape(n, c, s)[part] = g
            if training:
                g = g - sum_dy / (n * s) - (_wide(x, n, c, s)(part) - mean) * (dot * invstd**2 / (n * s))
            dx.reshape(n, c, s)[part] = affine[1][:, None] * g


def gradient_sums(
    dy: Array, x: Array, stats: Array, affine: Array, slope: float, signs: Array, n: int, c: int, s: int, sums: Array
) -> None:
    """Sums of dy behind the activation, and of it times x - mean."""
    sums[:] = 0.0
    gated = _gated(dy, x, affine, slope, signs, n, c, s)
    with np.errstate(all="ignore"):
        for part in _parts(n, c, s):
            g = gated(part)
            sums[0] += g.sum((0, 2))
            sums[1] += (g * (_wide(x, n, c, s)(part) - stats[0][:, None])).sum((0, 2))


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
    _, _, a, b = grads[:, :, None]
    gated = _gated(dy, x, affine, slope, signs, n, c, s)
    with np.errstate(all="ignore"):
        mean = stats[0].astype(x.dtype)[:, None]
        for part in _parts(n, c, s):
            g = gated(part)
            centred = _wide(x, n, c, s)(part) - mean
            if dresidual.size:
                dresidual.reshape(n, c, s)[part] = g
            dx.reshape(n, c, s)[part] = affine[1][:, None] * g + (a * centred + b)


def _parts(n: int, c: int, s: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of (n, c, s) with about `BLOCK` values each: some samples, or a piece of one."""
    samples = max(1, BLOCK // (c * s))
    length = max(1, BLOCK // c)
    for first in range(0, n, samples):
        for column in range(0, s, length):
            yield slice(first, first + samples), slice(None), slice(column, column + length)


def _wide(x: Array, n: int, c: int, s: int) -> Callable[[Any], Array]:
    """x as float64, part by part."""
    return lambda part: x.reshape(n, c, s)[part].astype(np.float64)


def _preactivation(x: Array, affine: Array) -> Array:
    center, scale, shift = affine[:, :, None]
    z: Array = (x - center) * scale + shift
    return z


def _activated(z: Array, positive: Array, slope: float) -> Array:
    return np.where(positive, z, 0.0 if slope == 0.0 else slope * z)


def _gated(dy: Array, x: Array, affine: Array, slope: float, signs: Array, *size: int) -> Callable[[Any], Array]:
    """dy behind the activation, part by part; its signs are read or, without a residual, computed again."""
    wide, wide_x = _wide(dy, *size), _wide(x, *size)
    if slope == 1.0:
        return wide
    if signs.size:
        open_ = np.unpackbits(signs.view(np.uint8), count=dy.size).reshape(size) == 1
        return lambda part: _activated(wide(part), open_[part], slope)
    return lambda part: _activated(wide(part), ~(_preactivation(wide_x(part), affine) <= 0), slope)
