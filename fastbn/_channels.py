"""Parameters of every channel, and channel arithmetic over arrays of channels: the twin of the kernels' own.

For those who need something between the sums and the output: statistics over several ranks, layers that normalise with
others than the batch's. Operation by operation as in the kernels, so that results are theirs to the bit unless a C
compiler fuses a multiplication and an addition.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Parameters(NamedTuple):
    """A layer's vectors of one value a channel: all of one dtype, or None where they are not there."""

    weight: Array | None = None
    bias: Array | None = None
    running_mean: Array | None = None
    running_var: Array | None = None
    wide: bool = False  # whether they are float64, and not float32

    @classmethod
    def of(
        cls,
        weight: Array | None,
        bias: Array | None,
        running_mean: Array | None = None,
        running_var: Array | None = None,
    ) -> Self:
        """The vectors themselves where they share a dtype, else float64 copies."""
        vectors: tuple[Array | None, ...] = (weight, bias, running_mean, running_var)
        wide = narrow = False
        for vector in vectors:
            if vector is not None:
                if vector.itemsize == 8:
                    wide = True
                else:
                    narrow = True
        if wide and narrow:
            vectors = tuple(None if vector is None else vector.astype(np.float64) for vector in vectors)
        return tuple.__new__(cls, (*vectors, wide))  # 0.4 us, with a list of sizes and `_make` 0.65


def finish_statistics(count: float, mean: Array, m2: Array, parameters: Parameters, eps: float) -> Array:
    """`norm` of training, from the moments of `count` values a channel."""
    with np.errstate(all="ignore"):
        norm = _normalisation(mean, m2 / count, parameters, eps)
    norm[3] = mean
    return norm


def fold(parameters: Parameters, eps: float) -> Array:
    """`norm` of inference, from the running statistics: the center is 0."""
    assert parameters.running_mean is not None
    assert parameters.running_var is not None
    with np.errstate(all="ignore"):
        norm = _normalisation(parameters.running_mean, parameters.running_var, parameters, eps)
        norm[5] -= norm[0] * norm[4]
    return norm


def _normalisation(mean: Array, var: Array, parameters: Parameters, eps: float) -> Array:
    """`norm` around the center 0 with the bias as its shift."""
    norm = np.zeros((6, len(mean)))
    norm[0] = mean
    norm[1] = var
    norm[2] = 1 / np.sqrt(norm[1] + eps)
    norm[4] = norm[2] if parameters.weight is None else parameters.weight * norm[2]
    norm[5] = 0.0 if parameters.bias is None else parameters.bias
    return norm


def update_running(running_mean: Array, running_var: Array, norm: Array, count: int, factor: float) -> None:
    """Move the running statistics towards the batch's, the variance unbiased, by `factor`."""
    unbiased = count / (count - 1)
    with np.errstate(all="ignore"):
        running_mean[:] = (1 - factor) * running_mean.astype(np.float64) + factor * norm[0]
        running_var[:] = (1 - factor) * running_var.astype(np.float64) + factor * (unbiased * norm[1])


def finish_gradient(sums: Array, count: float, norm: Array, dtype: np.dtype[Any]) -> Array:
    """`grads`: dweight, dbias, a and b of ``dx = scale * dy + a * (x - mean) + b`` with the mean rounded to `dtype`.

    `sums` (2, C) is what `gradient_sums` gives: of dy, and of dy * (x - mean); `count` the number of values that they
    run over, a channel.
    """
    grads = np.empty((4, sums.shape[1]))
    sum_dy, dot = sums
    mean, invstd, scale = norm[0], norm[2], norm[4]
    with np.errstate(all="ignore"):
        grads[0] = dot * invstd
        grads[1] = sum_dy
        grads[2] = -scale * invstd * invstd * dot / count
        grads[3] = -scale * sum_dy / count - grads[2] * (mean - mean.astype(dtype))
    return grads
