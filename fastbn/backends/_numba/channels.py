"""Channel arithmetic: what follows from the sums of a channel, and the coefficients of its output. Scalars."""

from __future__ import annotations

import math

import numpy as np

from fastbn.backends._numba.compiler import part, point
from fastbn.backends._numba.vectors import ahead_of, present, rounded, scratch, seen_as

# `stats`, `affine`, `coef` and `grads` are rows of one value a channel (a column, in the column nest). Those of `coef`,
# in x's dtype:
HIGH, LOW, SCALE, MEAN, A, B = range(6)

TOGETHER = 64  # channels finished at a time, in loops that become vectors (32x2048, training: 30 to 17 us)


@point
def lesser(a, b):
    """The smaller of two numbers. Numba's `min` is a function that `compiler` cannot tell what registers to use."""
    return a if a < b else b


@point
def greater(a, b):
    """The larger of two numbers."""
    return a if a > b else b


@point
def merge(count, size_a, mean_a, m2_a, size_b, mean_b, m2_b):
    """Moments of so many channels in two parts together (Chan, Golub and LeVeque 1983); an infinite mean stays so."""
    share = size_b / (size_a + size_b)
    weight = size_a * share
    for k in range(count):
        delta = mean_b[k] - mean_a[k]
        m2, mean = m2_a[k] + m2_b[k] + delta * delta * weight, mean_a[k] + delta * share
        m2_a[k] = m2 if math.isfinite(delta) else np.nan
        mean_a[k] = mean if math.isfinite(delta) else mean_a[k] + mean_b[k]


@point
def moments_of(shift, count, sum1, sum2):
    """Mean and m2 from sums of deviations from `shift` and of their squares (design, C)."""
    mean = sum1 / count
    m2 = sum2 - sum1 * mean
    return shift + mean, 0.0 if m2 < 0.0 else m2


@point
def parameter(job, values, c, otherwise):
    """A parameter of channel c, or what stands for it where there is none."""
    if not present(values):
        return otherwise
    return seen_as(values, np.float64)[c] if job.wide else np.float64(values[c])


@point
def set_parameter(job, values, c, value):
    """Let a parameter of channel c be `value`."""
    if job.wide:
        seen_as(values, np.float64)[c] = value
    else:
        values[c] = rounded(values, value)


@point
def finish_statistics(job, c0, count, mean, m2):
    """All that follows from the moments of so many channels from c0 on."""
    size, var = np.float64(job.n * job.s), scratch(job.stats, TOGETHER)
    for k in range(count):
        var[k] = m2[k] / size
    normalisation(job, c0, count, mean, var)
    for k in range(count):
        job.affine[c0 + k] = mean[k]
    if present(job.running_mean):
        update_running(job, c0, count, mean, var)


@point
def normalisation(job, c0, count, mean, var):
    """`stats` of so many channels from c0 on, and `affine` around 0 with the bias as its shift."""
    invstd = scratch(job.stats, TOGETHER)
    for k in range(count):
        invstd[k] = 1.0 / math.sqrt(var[k] + job.eps)
    stats, affine, channels = ahead_of(job.stats, c0), ahead_of(job.affine, c0), job.channels
    for k in range(count):
        stats[k], stats[channels + k], stats[2 * channels + k] = mean[k], var[k], invstd[k]
        affine[k] = 0.0
        affine[channels + k] = parameter(job, job.weight, c0 + k, 1.0) * invstd[k]
        affine[2 * channels + k] = parameter(job, job.bias, c0 + k, 0.0)


@point
def update_running(job, c0, count, mean, var):
    """Move the running statistics towards the batch's, the variance unbiased, by `factor`."""
    size, factor = np.float64(job.n * job.s), job.factor
    unbiased = size / (size - 1.0)
    for k in range(count):
        c = c0 + k
        mean_before, var_before = parameter(job, job.running_mean, c, 0.0), parameter(job, job.running_var, c, 0.0)
        set_parameter(job, job.running_mean, c, (1.0 - factor) * mean_before + factor * mean[k])
        set_parameter(job, job.running_var, c, (1.0 - factor) * var_before + factor * (unbiased * var[k]))


@part()
def fold(job):
    """Inference: `stats` and `affine` from the running statistics; the center is 0."""
    mean, var = scratch(job.stats, TOGETHER), scratch(job.stats, TOGETHER)
    scale, shift = ahead_of(job.affine, job.channels), ahead_of(job.affine, 2 * job.channels)
    for c0 in range(0, job.channels, TOGETHER):
        count = lesser(TOGETHER, job.channels - c0)
        for k in range(count):
            mean[k] = parameter(job, job.running_mean, c0 + k, 0.0)
            var[k] = parameter(job, job.running_var, c0 + k, 1.0)
        normalisation(job, c0, count, mean, var)
        for k in range(count):
            shift[c0 + k] -= mean[k] * scale[c0 + k]


@point
def finish_gradients(job, c0, count, low, sum_dy, dot):
    """All that follows from the sums of dy and dy * (x - MEAN), where MEAN is `low` less than the mean.

    That is dweight, dbias, A and B: dx = SCALE * dy + A * (x - MEAN) + B
    """
    channels, size = job.channels, np.float64(job.n * job.s)
    invstd, scale = ahead_of(job.stats, 2 * channels + c0), ahead_of(job.affine, channels + c0)
    dweight, a, b = scratch(job.stats, TOGETHER), scratch(job.stats, TOGETHER), scratch(job.stats, TOGETHER)
    for k in range(count):
        total_dot = dot[k] - low[k] * sum_dy[k]
        dweight[k] = total_dot * invstd[k]
        a[k] = -scale[k] * invstd[k] * invstd[k] * total_dot / size
        b[k] = -scale[k] * sum_dy[k] / size - a[k] * low[k]
    grads = ahead_of(job.grads, c0)
    for k in range(count):
        set_parameter(job, job.weight, c0 + k, dweight[k])
        set_parameter(job, job.bias, c0 + k, sum_dy[k])
        grads[2 * channels + k], grads[3 * channels + k] = a[k], b[k]


@point
def width_of(job):
    """Width of `coef` and `part`."""
    return job.columns or job.channels


@point
def columns_of_channel(job):
    """Columns of a channel side by side in `coef` and `part`."""
    return job.s if job.columns else 1


@point
def round_affine(job, c0, c1):
    """HIGH, LOW, SCALE of channels c0 to c1 in x's dtype (design, D), at their first columns."""
    width, length, coef = width_of(job), columns_of_channel(job), job.coef
    for c in range(c0, c1):
        center, scale, shift = job.affine[c], job.affine[job.channels + c], job.affine[2 * job.channels + c]
        high = rounded(coef, center)
        coef[HIGH * width + c * length] = high
        coef[LOW * width + c * length] = rounded(coef, shift - (center - high) * scale)
        coef[SCALE * width + c * length] = rounded(coef, scale)


@point
def round_gradient(job, c0, c1):
    """A and B of channels c0 to c1 in x's dtype, at their first columns."""
    width, length, coef = width_of(job), columns_of_channel(job), job.coef
    for c in range(c0, c1):
        coef[A * width + c * length] = rounded(coef, job.grads[2 * job.channels + c])
        coef[B * width + c * length] = rounded(coef, job.grads[3 * job.channels + c])
