"""What the right answer is: batch normalization by textbook formulas in extended precision, numerical gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from cases import TOLERANCE, Case


class Result(NamedTuple):
    """Forward and backward in training mode; `y`, `dx` and `through` have the input's shape, the others are (C,).

    `through` is what `dx` would be if the statistics were constants; in a batch of two values they cancel it all.
    """

    y: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    dx: np.ndarray
    through: np.ndarray
    dweight: np.ndarray
    dbias: np.ndarray


def batch_norm(
    case: Case, x: np.ndarray, dy: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float = 1e-5
) -> Result:
    """Two passes over the data, in `longdouble`."""
    x, dy, weight, bias = (a.astype(np.longdouble) for a in (x, dy, weight, bias))
    mean = x.mean(case.reduced)
    centred = x - case.per_channel(mean)
    var = (centred**2).mean(case.reduced)
    invstd = 1 / np.sqrt(var + eps)
    x_hat = centred * case.per_channel(invstd)
    dbias, dweight = dy.sum(case.reduced), (dy * x_hat).sum(case.reduced)
    scale = case.per_channel(weight * invstd)
    projected = case.per_channel(dbias / case.count) + x_hat * case.per_channel(dweight / case.count)
    return Result(
        y=x_hat * case.per_channel(weight) + case.per_channel(bias),
        mean=mean,
        var=var,
        dx=(dy - projected) * scale,
        through=dy * scale,
        dweight=dweight,
        dbias=dbias,
    )


def numerical_gradient(f: Callable[[], float], x: np.ndarray, step: float = 1e-3) -> np.ndarray:
    """df/dx by central differences of fourth order; `f` reads `x`, which is disturbed in place and restored."""
    gradient = np.empty_like(x)
    for i in np.ndindex(x.shape):
        value = x[i]
        samples = {}
        for k in (-2, -1, 1, 2):
            x[i] = value + k * step
            samples[k] = f()
        x[i] = value
        gradient[i] = (samples[-2] - 8 * samples[-1] + 8 * samples[1] - samples[2]) / (12 * step)
    return gradient


def assert_close(
    got: np.ndarray, expected: np.ndarray, tolerance: float | None = None, *, terms: np.ndarray | None = None
) -> None:
    """Equal to within a share of the largest expected value; the share is the dtype's where none is given.

    `terms` is what the expected value is a difference of, where that may cancel: its largest value counts then.
    """
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    if tolerance is None:
        tolerance = TOLERANCE[got.dtype]
    sized = np.abs(expected if terms is None else terms)
    largest = sized[np.isfinite(sized)].max(initial=0)
    np.testing.assert_allclose(got, expected, rtol=0, atol=float(tolerance * largest))
