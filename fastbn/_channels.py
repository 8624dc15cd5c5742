"""What follows from the sums of every channel, over arrays of channels: the twin of the kernels' channel arithmetic.

For those who need something between the sums and the output: statistics over several ranks, layers that normalise with
others than the batch's. Operation by operation as in the kernels, so that results are theirs to the bit unless a C
compiler fuses a multiplication and an addition.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def finish_statistics(
    count: float, mean: Array, m2: Array, weight: Array, bias: Array, eps: float
) -> tuple[Array, Array]:
    """`stats` and `affine` of training, from the moments of `count` values a channel; weight and bias may be empty."""
    stats, affine = np.empty((3, len(mean))), np.empty((3, len(mean)))
    with np.errstate(all="ignore"):
        stats[0] = mean
        stats[1] = m2 / count
        stats[2] = 1 / np.sqrt(stats[1] + eps)
        affine[0] = mean
        affine[1] = (weight if weight.size else 1.0) * stats[2]
        affine[2] = bias if bias.size else 0.0
    return stats, affine


def finish_gradient(sums: Array, count: float, stats: Array, affine: Array, dtype: np.dtype[Any]) -> Array:
    """`grads`: dweight, dbias, a and b of ``dx = scale * dy + a * (x - mean) + b`` with the mean rounded to `dtype`.

    `sums` (2, C) is what `gradient_sums` gives: of dy, and of dy * (x - mean); `count` the number of values that they
    run over, a channel.
    """
    grads = np.empty((4, sums.shape[1]))
    sum_dy, dot = sums
    mean, invstd, scale = stats[0], stats[2], affine[1]
    with np.errstate(all="ignore"):
        grads[0] = dot * invstd
        grads[1] = sum_dy
        grads[2] = -scale * invstd * invstd * dot / count
        grads[3] = -scale * sum_dy / count - grads[2] * (mean - mean.astype(dtype))
    return grads
