"""The kernels in Numba.

Design
------
A. `_plan` says how a tensor is cut; this file computes. Its parts, in order: channel arithmetic (scalars), points (one
   vector), the row nest, columns, slabs, the column nest, phases, kernels. `fastbn_ext` has the same parts under the
   same names.
B. Inner loops are written with the vectors of `_vectors`; there is no fastmath, so every sum has one order and every
   result is bitwise reproducible. One subtraction and one fused multiply-add a value is all that a normalisation costs.
C. Statistics of a block are sums of deviations from `shift`, one of the block's own values, in float64. Its distance
   from the mean is at most sqrt(m2), so ``m2 = s2 - s1**2 / count`` loses at most log2(count) of 53 bits whatever the
   mean is, and a constant block gives exactly mean = shift, m2 = 0. There is no second pass and no division inside.
D. ``y = (x - high) * scale + low``: `high` is the mean rounded to x's dtype, so that the difference is exact where x is
   near the mean; `low` carries the bias and the mean's rounding error.
E. A row's last, partial vector overlaps the one before it, and is loaded before anything is stored, so that y may be x.
F. Streamed output goes in whole lines; what lies before the first and behind the last of a row is stored by lanes. A
   stage in L1, which would let rows share lines, was tried: 1.25 copies for inference where this costs 1.0, because
   reads and writes no longer overlap.
G. Several rows are read at a time: one stream after the other leaves memory idle. Of long rows it is `STREAMS`, and
   what is `AHEAD` of them in their channel is prefetched (32x256x56x56, Zen 3, statistics: 0.79 copies in one stream,
   0.60 in four; sums of gradients: 1.56 and 1.17). Of rows of columns it is `COLUMN_STREAMS`, far apart, and
   prefetching only costs (56x56x64 channels last, statistics: 0.7 copies in one stream, 0.53 in eight; sums of
   gradients: 1.5 and 1.05).
H. The kernel is one or two phases, and a phase a loop over independent tasks: the only place with threads. To spare the
   compiler, one kernel serves all operations, its arguments are a `Job`, and its parts are compiled `apart`.
I. A run's output goes backwards, row by row, after its reduction: what was read last is still in the nearest cache.
   Split work goes forward: what the third-level cache might still have gains less than order does (65536x256, training:
   backwards 2.2 copies, forward 1.85; backward pass: 3.7 and 3.3).
J. Sums grow by fused multiply-adds by one, and values become float64 as they are loaded: on Zen, additions share their
   units with conversions (Zen 3, sums of 16 values in cache: 1.96 to 1.35 ns, of gradients 4.4 to 1.97).
"""

from __future__ import annotations

import functools
import math
import os
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numba
import numpy as np
from numba import config, njit, prange, types
from numba.core.compiler_lock import global_compiler_lock
from numba.np.numpy_support import from_dtype

from fastbn import _engine
from fastbn._arrays import FLOATS
from fastbn.backends import _buffers, _compiler, _job, _plan, _vectors
from fastbn.backends._buffers import Buffer, entry_of
from fastbn.backends._cache import Cache, digest_of, folders, writable_folder
from fastbn.backends._compiler import apart, loop, parts_of, point
from fastbn.backends._job import ARGUMENTS, Job, copy_of, make_job
from fastbn.backends._operations import Operations
from fastbn.backends._plan import AHEAD, BLOCK, LANES, LONGEST_FOLD, PIECE, SHORT, SLAB, STREAMS, Plan
from fastbn.backends._vectors import (
    ahead_of,
    alias,
    bits,
    fence,
    finite,
    fma,
    foremost,
    given,
    last,
    like,
    load,
    mask_of,
    noinline,
    ones,
    positive,
    prefetch,
    prefetch_part,
    present,
    put,
    rounded,
    same,
    scaled,
    scratch,
    seen_as,
    splat,
    store,
    store_where,
    team,
    to_line,
    total,
    where,
    widen,
)

NAME = "numba"

if config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set, and these kernels are nothing without the compiler")
if any(feature[:1] not in "+-" for feature in (config.CPU_FEATURES or "").split(",")):  # LLVM would end the process
    raise ImportError(f"NUMBA_CPU_FEATURES must be names that begin with + or -, got {config.CPU_FEATURES!r}")

# `stats`, `affine`, `coef` and `grads` are rows of one value a channel (a column, in the column nest).

# Rows of `coef`: per-channel coefficients in x's dtype.
HIGH, LOW, SCALE, MEAN, A, B = range(6)
# Kinds of output: of x alone, behind an activation, with all that there is.
PLAIN, ACTIVATED, ANY = map(np.intp, range(3))
# Phases.
FUSED, REDUCE, APPLY, REDUCE_COLUMNS, APPLY_COLUMNS = map(np.intp, range(5))
ZERO = np.intp(0)  # as an argument: functions are compiled once more for a literal one

CHUNK = 1024  # columns whose sums stay in L1 (32x14x14x1024 channels last, backward: 512 4.0 copies, 1024 3.0)
COLUMN_STREAMS = 8  # rows of one array or two read at a time (32x1024x14x14, backward: 16 4.0 copies, 8 3.2)
GROUP = 1 << 14  # values of a task of the column nest
SAMPLES = 16  # of a task of output alone, in slabs
SLAB_COEF = 6 * SLAB
ROW_COEF = 6 * LANES
WIDEST = max(SLAB, 2 * CHUNK) + LANES  # room for the sums of a slab or a chunk

# --- channel arithmetic -------------------------------------------------------------------------------------------


@loop
def merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """Mean and m2 of two parts together (Chan, Golub and LeVeque 1983); an infinite mean stays infinite."""
    if count_a == 0:
        return mean_b, m2_b
    delta = mean_b - mean_a
    share = count_b / (count_a + count_b)
    if not math.isfinite(delta):
        return mean_a + mean_b, np.nan
    return mean_a + delta * share, m2_a + m2_b + delta * delta * (count_a * share)


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
def finish_statistics(job, c, mean, m2):
    """All that follows from the moments of channel c."""
    var = m2 / (job.n * job.s)
    normalisation(job, c, mean, var)
    job.affine[c] = mean
    if present(job.running_mean):
        update_running(job, c, mean, var)


@point
def normalisation(job, c, mean, var):
    """`stats` of channel c, and `affine` around 0 with the bias as its shift."""
    invstd = 1.0 / math.sqrt(var + job.eps)
    stats, affine, channels = job.stats, job.affine, job.channels
    stats[c], stats[channels + c], stats[2 * channels + c] = mean, var, invstd
    affine[c] = 0.0
    affine[channels + c] = parameter(job, job.weight, c, 1.0) * invstd
    affine[2 * channels + c] = parameter(job, job.bias, c, 0.0)


@point
def update_running(job, c, mean, var):
    """Move the running statistics of channel c towards the batch's, the variance unbiased, by `factor`."""
    count, factor = job.n * job.s, job.factor
    var *= count / (count - 1)
    mean_before, var_before = parameter(job, job.running_mean, c, 0.0), parameter(job, job.running_var, c, 0.0)
    set_parameter(job, job.running_mean, c, (1.0 - factor) * mean_before + factor * mean)
    set_parameter(job, job.running_var, c, (1.0 - factor) * var_before + factor * var)


@loop
def fold(job):
    """Inference: `stats` and `affine` from the running statistics; the center is 0."""
    noinline()
    affine, channels = job.affine, job.channels
    for c in range(channels):
        mean = parameter(job, job.running_mean, c, 0.0)
        normalisation(job, c, mean, parameter(job, job.running_var, c, 1.0))
        affine[2 * channels + c] -= mean * affine[channels + c]


@point
def finish_gradient(job, c, sum_dy, dot):
    """All that follows from the sums of dy and dy * (x - MEAN): dweight, dbias, A and B.

    dx = SCALE * dy + A * (x - MEAN) + B
    """
    channels, count = job.channels, job.n * job.s
    mean, invstd, scale = job.stats[c], job.stats[2 * channels + c], job.affine[channels + c]
    low = mean - rounded(job.coef, mean)
    dot -= low * sum_dy
    a = -scale * invstd * invstd * dot / count
    grads = job.grads
    grads[c], grads[channels + c] = dot * invstd, sum_dy
    grads[2 * channels + c], grads[3 * channels + c] = a, -scale * sum_dy / count - a * low


@point
def round_affine(job, j, width, c):
    """HIGH, LOW, SCALE of channel c in x's dtype (design, D), at column j."""
    affine, coef = job.affine, job.coef
    center, scale, shift = affine[c], affine[job.channels + c], affine[2 * job.channels + c]
    high = rounded(coef, center)
    coef[HIGH * width + j] = high
    coef[LOW * width + j] = rounded(coef, shift - (center - high) * scale)
    coef[SCALE * width + j] = rounded(coef, scale)


@point
def round_gradient(job, j, width, c):
    """A and B of channel c in x's dtype, at column j."""
    grads, coef = job.grads, job.coef
    coef[A * width + j] = rounded(coef, grads[2 * job.channels + c])
    coef[B * width + j] = rounded(coef, grads[3 * job.channels + c])


# --- points: one vector -------------------------------------------------------------------------------------------


@point
def activated(z, opened, slope):
    """z where the activation is open, slope * z elsewhere; a slope of 0 gives zero even for an infinite z."""
    return where(opened, z, scaled(z, slope))


@point
def output(x, added, high, scale, low, slope, signs, word):
    """activation((x - center) * scale + shift + residual)."""
    z = fma(x - high, scale, low) + added
    if slope != 1.0:
        opened = positive(z)
        if present(signs):
            signs[word] = bits(opened)
        z = activated(z, opened, slope)
    return z


@point
def gated(dy, x, high, scale, low, slope, signs, word):
    """dy behind an activation, whose sign is read or, without a residual, computed again exactly as in `output`."""
    if present(signs):
        dy = activated(dy, mask_of(signs[word]), slope)
    else:
        dy = activated(dy, positive(fma(x - high, scale, low)), slope)
    return dy


@point
def gradient(dy, x, training, scale, mean, a, b):
    """dx of a gated dy."""
    return fma(scale, dy, fma(a, x - mean, b)) if training else scale * dy


# --- row nest -----------------------------------------------------------------------------------------------------
# A block is `rows` rows of `length` values of a channel, the first one at sample `first`, from `column` on.


@point
def pieces_of(s, piece):
    """Pieces of so many values that a row is cut into; the last takes the rest: none is shorter than a vector."""
    return max(1, s // piece)


@point
def blocks_of(n, s, height, piece):
    """Number of blocks of a channel, of so many rows of a piece."""
    return (n + height - 1) // height * pieces_of(s, piece)


@point
def block_of(b, n, s, height, piece):
    """(first, rows, column, length) of block b."""
    pieces = pieces_of(s, piece)
    first, p = b // pieces * height, b % pieces
    return first, min(height, n - first), p * piece, (piece if p < pieces - 1 else s - p * piece)


@point
def block_to_reduce(job, b):
    """(first, rows, column, length) of block b of a reduction: of long rows whole bundles of streams."""
    s = job.s
    height = BLOCK // s if s < SHORT else max(1, (BLOCK // s + STREAMS - 1) // STREAMS) * STREAMS
    return block_of(b, job.n, s, height, PIECE)


@point
def shift_of(x, i):
    """x[i], or zero where it is not finite."""
    return np.float64(x[i]) if math.isfinite(x[i]) else np.float64(0.0)


@point
def ahead_in(job, row, column, length):
    """(turn, after): how far away value i of a row has what is AHEAD of it in its channel.

    It is AHEAD where ``i < turn``, and `after` elsewhere; rows are read STREAMS at a time, from `row` on.
    """
    if column + length < job.s:
        return length, AHEAD
    after = STREAMS * job.channels * job.s - job.s + AHEAD
    return length - AHEAD, (after if row + STREAMS < job.n else 0)


@point
def over_rows(add, job, c, first, rows, column, length, coef, sum1, sum2):
    """Two sums over rows of a channel, to which `add` adds STREAMS rows at a time, and what is left one by one.

    Their number is known when `add` is compiled: where it was not, sums went through the stack (of gradients in cache:
    10.2 ns for 16 values, 5.3 so).
    """
    row, end, four, single = first, first + rows, np.intp(STREAMS), np.intp(1)
    while row + STREAMS <= end:
        sum1, sum2 = add(job, c, row, four, column, length, coef, sum1, sum2)
        row += STREAMS
    while row < end:
        sum1, sum2 = add(job, c, row, single, column, length, coef, sum1, sum2)
        row += 1
    return sum1, sum2


@point
def row_moments(job, c, row, streams, column, length, around, s1, s2):
    """Add so many rows at a time, from `row` on, to the sums of x - around and of its square."""
    x, stride, zero, one = job.x, job.channels * job.s, splat(0.0), ones()
    begin, whole = row * stride + c * job.s + column, length - length % LANES
    turn, after = ahead_in(job, row, column, length)
    i = 0
    for stop, ahead in ((min(turn, whole), AHEAD), (whole, after)):
        while i < stop:
            at = begin + i
            for _ in range(streams):
                prefetch(x, at + ahead)
                d = widen(load(x, at)) - around
                s1 = fma(d, one, s1)
                s2 = fma(d, d, s2)
                at += stride
            i += LANES
    if i < length:
        tail, at = last(length - i), begin + length - LANES
        for _ in range(streams):
            d = where(tail, widen(load(x, at)) - around, zero)
            s1 = fma(d, one, s1)
            s2 = fma(d, d, s2)
            at += stride
    return s1, s2


@loop
def block_moments(job, c, b):
    """Mean and m2 of block b of channel c (design, C)."""
    noinline()
    first, rows, column, length = block_to_reduce(job, b)
    shift = shift_of(job.x, (first * job.channels + c) * job.s + column)
    around, s1, s2 = splat(shift), splat(0.0), splat(0.0)
    s1, s2 = over_rows(row_moments, job, c, first, rows, column, length, around, s1, s2)
    return moments_of(shift, rows * length, total(s1), total(s2))


@point
def row_gradients(job, c, row, streams, column, length, coef, sum_dy, dot):
    """Add so many rows at a time, from `row` on, to the sums of gated dy and of dy * (x - MEAN)."""
    x, dy, slope, signs, one = job.x, job.dy, job.slope, job.signs, ones()
    high, scale, low, around = coef
    again = alias(x)  # values become float64 as they are loaded (design, J)
    stride, words = job.channels * job.s, (job.s + LANES - 1) // LANES
    begin, word = row * stride + c * job.s + column, (row * job.channels + c) * words + column // LANES
    on, whole = job.channels * words, length - length % LANES
    turn, after = ahead_in(job, row, column, length)
    i = 0
    for stop, ahead in ((min(turn, whole), AHEAD), (whole, after)):
        if slope == 1.0:
            while i < stop:
                at = begin + i
                for _ in range(streams):
                    prefetch(x, at + ahead)
                    prefetch(dy, at + ahead)
                    g = widen(load(dy, at))
                    sum_dy = fma(g, one, sum_dy)
                    dot = fma(g, widen(load(x, at)) - around, dot)
                    at += stride
                i += LANES
        else:
            while i < stop:
                at, sign = begin + i, word + i // LANES
                for _ in range(streams):
                    prefetch(x, at + ahead)
                    prefetch(dy, at + ahead)
                    g = widen(gated(load(dy, at), load(x, at), high, scale, low, slope, signs, sign))
                    sum_dy = fma(g, one, sum_dy)
                    dot = fma(g, widen(load(again, at)) - around, dot)
                    at += stride
                    sign += on
                i += LANES
    if i < length:
        tail, at, sign = last(length - i), begin + length - LANES, word + i // LANES
        for _ in range(streams):
            value, g = load(x, at), load(dy, at)
            if slope != 1.0:
                g = gated(g, value, high, scale, low, slope, signs, sign)
            g = widen(where(tail, g, like(g, 0.0)))
            sum_dy = fma(g, one, sum_dy)
            dot = fma(g, widen(value) - around, dot)
            at += stride
            sign += on
    return sum_dy, dot


@loop
def block_gradients(job, c, b):
    """Sums of gated dy and of dy * (x - MEAN) over block b of channel c."""
    noinline()
    first, rows, column, length = block_to_reduce(job, b)
    channels, coef, sum_dy, dot = job.channels, job.coef, splat(0.0), splat(0.0)
    coefs = (
        splat(coef[HIGH * channels + c]), splat(coef[SCALE * channels + c]), splat(coef[LOW * channels + c]),
        widen(splat(coef[MEAN * channels + c])),
    )  # fmt: skip
    sum_dy, dot = over_rows(row_gradients, job, c, first, rows, column, length, coefs, sum_dy, dot)
    return total(sum_dy), total(dot)


# --- columns ------------------------------------------------------------------------------------------------------
# Rows of `width` columns, the first at `at` and each `stride` behind the one before it, with coefficients in rows of
# `pitch` for every column. Rows of one channel have coefficients too, which are loaded again and again (`step` 0): no
# slower than from registers, and one function less. Sums have room for whole vectors.


@point
def first_of(j, width):
    """First column of the vector of sums at j: the last one overlaps the one before it (design, E)."""
    return min(j, width - LANES)


@point
def settle(sums, width):
    """Put the sums of the last vector, which overlaps, where its columns belong."""
    rest = width % LANES
    for j in range(width - rest, width):
        sums[j] = sums[j + LANES - rest]


@point
def bundles_of(rows, streams):
    """Number of bundles: rows are read so many at a time, each from a stream of its own."""
    return (rows + streams - 1) // streams


@point
def bundle_at(b, rows, streams):
    """(first row, distance to the next, rows) of bundle b.

    It has row b of every stream, which are equal parts of all rows; what is left over is the last bundle.
    """
    whole = rows // streams
    if b < whole:
        return b, whole, streams
    return whole * streams, 1, rows - whole * streams


@loop
def sum_moments(job, at, stride, rows, width, shift, s1, s2):
    """Sums of x - shift and of its square for every column."""
    noinline()
    x, zero, one = job.x, splat(0.0), ones()
    for b in range(bundles_of(rows, COLUMN_STREAMS)):
        first, distance, streams = bundle_at(b, rows, COLUMN_STREAMS)
        for j in range(0, width, LANES):
            k = first_of(j, width)
            around = widen(load(shift, k))
            around = where(finite(around), around, zero)
            sum1, sum2 = (load(s1, j), load(s2, j)) if b else (zero, zero)
            i = at + first * stride + k
            for _ in range(streams):
                d = widen(load(x, i)) - around
                sum1 = fma(d, one, sum1)
                sum2 = fma(d, d, sum2)
                i += distance * stride
            store(s1, j, sum1)
            store(s2, j, sum2)
    settle(s1, width)
    settle(s2, width)


@loop
def sum_gradients(job, at, stride, rows, width, coef, pitch, word, words, s1, s2):
    """Sums of gated dy and of dy * (x - MEAN) for every column; signs of a row are `words`, the first at `word`."""
    noinline()
    x, dy, slope, signs, zero, one = job.x, job.dy, job.slope, job.signs, splat(0.0), ones()
    again = alias(x)  # values become float64 as they are loaded (design, J)
    for b in range(bundles_of(rows, COLUMN_STREAMS // 2)):
        first, distance, streams = bundle_at(b, rows, COLUMN_STREAMS // 2)
        for j in range(0, width, LANES):
            k = first_of(j, width)
            i = at + first * stride + k
            around = widen(load(coef, MEAN * pitch + k))
            sum_dy, dot = (load(s1, j), load(s2, j)) if b else (zero, zero)
            if slope == 1.0:
                for _ in range(streams):
                    value = widen(load(dy, i))
                    sum_dy = fma(value, one, sum_dy)
                    dot = fma(value, widen(load(x, i)) - around, dot)
                    i += distance * stride
            else:
                high, scale = load(coef, HIGH * pitch + k), load(coef, SCALE * pitch + k)
                low, sign = load(coef, LOW * pitch + k), word + first * words + j // LANES
                for _ in range(streams):
                    value = widen(gated(load(dy, i), load(x, i), high, scale, low, slope, signs, sign))
                    sum_dy = fma(value, one, sum_dy)
                    dot = fma(value, widen(load(again, i)) - around, dot)
                    i += distance * stride
                    sign += distance * words
            store(s1, j, sum_dy)
            store(s2, j, dot)
    settle(s1, width)
    settle(s2, width)


@point
def finish_row(y, at, rest, value, streaming):
    """Store a row's last vector, of which `rest` values are new.

    A line that is streamed is not touched by plain stores, which would read it again from memory, twice a row
    (32x1024x14x14, training: 2.5 to 1.9 copies; 32x512x28x28, backward: 3.0 to 2.4).
    """
    if streaming:
        store_where(y, at, last(rest), value)
    else:
        store(y, at, value)


@point
def output_column(x, added, coef, pitch, j, slope, signs, word):
    """Output of the vector at column j."""
    high, scale, low = load(coef, HIGH * pitch + j), load(coef, SCALE * pitch + j), load(coef, LOW * pitch + j)
    return output(x, added, high, scale, low, slope, signs, word)


@point
def apply_columns(job, at, width, coef, pitch, step, word, ahead, beyond, kind):
    """Output of a row (design, E and F). `kind` is known when this is compiled: loops need not ask for what is not.

    What lies `ahead` in x and `beyond` in the residual is prefetched.
    """
    x, y, slope = job.x, job.y, 1.0 if kind == PLAIN else job.slope
    residual, signs = given(job.residual, kind == ANY), given(job.signs, kind == ANY)
    zero, end = like(load(coef, 0), 0.0), width - LANES
    i = to_line(y, at) if job.streaming else 0
    streaming = job.streaming and not (present(signs) and i > 0)
    i = i if streaming else 0
    last_x = load(x, at + end)
    last_added = load(residual, at + end) if present(residual) else zero
    if i:
        added = load(residual, at) if present(residual) else zero
        store_where(y, at, foremost(i), output_column(load(x, at), added, coef, pitch, ZERO, slope, signs, word))
    while i <= end:
        if ahead:
            prefetch(x, at + i + ahead)
        if present(residual) and beyond:
            prefetch(residual, at + i + beyond)
        added = load(residual, at + i) if present(residual) else zero
        z = output_column(load(x, at + i), added, coef, pitch, i * step, slope, signs, word + i // LANES)
        put(y, at + i, z, streaming)
        i += LANES
    if i < width:
        z = output_column(last_x, last_added, coef, pitch, end * step, slope, signs, word + i // LANES)
        finish_row(y, at + end, width - i, z, streaming)


@point
def gradient_column(dy, x, coef, pitch, j, slope, signs, word, training):
    """dx of the vector at column j."""
    high, scale = load(coef, HIGH * pitch + j), load(coef, SCALE * pitch + j)
    low, mean = load(coef, LOW * pitch + j), load(coef, MEAN * pitch + j)
    a, b = load(coef, A * pitch + j), load(coef, B * pitch + j)
    if slope != 1.0:
        dy = gated(dy, x, high, scale, low, slope, signs, word)
    return gradient(dy, x, training, scale, mean, a, b)


@point
def gradient_columns(job, at, width, coef, pitch, step, word, ahead, kind):
    """dx of a row."""
    x, dy, dx, slope = job.x, job.dy, job.dx, 1.0 if kind == PLAIN else job.slope
    signs, training, end = given(job.signs, kind == ANY), job.training if kind == ANY else True, width - LANES
    i = to_line(dx, at) if job.streaming else 0
    streaming = job.streaming and not (present(signs) and i > 0)
    i = i if streaming else 0
    last_x, last_dy = load(x, at + end), load(dy, at + end)
    if i:
        d = gradient_column(load(dy, at), load(x, at), coef, pitch, ZERO, slope, signs, word, training)
        store_where(dx, at, foremost(i), d)
    while i <= end:
        if ahead:
            prefetch(x, at + i + ahead)
            prefetch(dy, at + i + ahead)
        value, g = load(x, at + i), load(dy, at + i)
        d = gradient_column(g, value, coef, pitch, i * step, slope, signs, word + i // LANES, training)
        put(dx, at + i, d, streaming)
        i += LANES
    if i < width:
        d = gradient_column(last_dy, last_x, coef, pitch, end * step, slope, signs, word + i // LANES, training)
        finish_row(dx, at + end, width - i, d, streaming)


@point
def residual_columns(job, at, width, word):
    """dresidual of a row: the gated dy, whose signs are there if it has an activation.

    A pass of its own: where two outputs are streamed line by line, and lie as far apart as neighbouring lines but for
    whole pages, they cost up to 6 copies (32x256x56x56; their distance is the allocator's), and 1.9 row by row.
    """
    dy, dresidual, signs, slope = job.dy, job.dresidual, job.signs, job.slope
    i, end = (to_line(dresidual, at) if job.streaming else 0), width - LANES
    streaming = job.streaming and not (present(signs) and i > 0)
    i = i if streaming else 0
    last_dy = load(dy, at + end)
    if i:
        store_where(dresidual, at, foremost(i), load(dy, at))
    while i <= end:
        g = load(dy, at + i)
        if present(signs):
            g = activated(g, mask_of(signs[word + i // LANES]), slope)
        put(dresidual, at + i, g, streaming)
        i += LANES
    if i < width:
        g = activated(last_dy, mask_of(signs[word + i // LANES]), slope) if present(signs) else last_dy
        finish_row(dresidual, at + end, width - i, g, streaming)


@loop
def apply_rows(job, at, stride, rows, width, coef, pitch, step, word, words, ahead, backward):
    """Output, or dx and dresidual, of rows of columns; what lies `ahead` is prefetched.

    Each row is `stride` behind the one before it, or ahead of it if that is negative.
    """
    noinline()
    simple = not (present(job.signs) or present(job.residual)) and job.training
    plain, activated = simple and job.slope == 1.0, simple and job.slope != 1.0
    beyond = ahead if ahead or not job.ahead else stride  # after a reduction only the residual is out of the cache
    out = job.dx if backward else job.y
    for r in range(rows):
        if job.streaming:  # a store that waits for its line holds up all behind it
            prefetch_part(out, at + width)
            if r + 1 < rows:
                prefetch_part(out, at + stride)
        if backward and present(job.dresidual):  # first: dx may lie over dy
            residual_columns(job, at, width, word)
        if backward and plain:
            gradient_columns(job, at, width, coef, pitch, step, word, ahead, PLAIN)
        elif backward and activated:
            gradient_columns(job, at, width, coef, pitch, step, word, ahead, ACTIVATED)
        elif backward:
            gradient_columns(job, at, width, coef, pitch, step, word, ahead, ANY)
        elif plain:
            apply_columns(job, at, width, coef, pitch, step, word, ahead, ZERO, PLAIN)
        elif activated:
            apply_columns(job, at, width, coef, pitch, step, word, ahead, ZERO, ACTIVATED)
        else:
            apply_columns(job, at, width, coef, pitch, step, word, ahead, beyond, ANY)
        at += stride
        word += words


@loop
def apply_block(job, c0, c1, first, rows, column, length, backward, fused):
    """Output, or dx and dresidual, of a block of channels c0 to c1, whose coefficients are the same in every column.

    After their reduction from the last row to the first (design, I).
    """
    noinline()
    channels, s, words = job.channels, job.s, (job.s + LANES - 1) // LANES
    first, on, ahead = (first + rows - 1, -channels, 0) if fused else (first, channels, job.ahead)
    coef = scratch(job.coef, ROW_COEF)
    for c in range(c0, c1):
        row = first * channels + c
        for r in range(B + 1 if backward else SCALE + 1):
            store(coef, r * LANES, splat(job.coef[r * channels + c]))
        at, word = row * s + column, row * words + column // LANES
        apart(apply_rows, (job, at, on * s, rows, length, coef, LANES, 0, word, on * words, ahead, backward))


# --- slabs --------------------------------------------------------------------------------------------------------
# Rows shorter than SHORT lie side by side: a slab is the rows of channels c0 to c1 in the samples of a block, and
# vectors run over the ends of rows. The columns of a channel share a shift, so that their sums add up to its own.


@point
def slab_of(job, c0, c1, first):
    """(at, stride, width, word, words) of the slab of channels c0 to c1 from sample `first` on.

    Its rows of `width` values begin at `at`, `stride` apart; their signs begin at `word`, `words` apart. With signs,
    all slabs but the last are of one width.
    """
    s, stride, slab = job.s, job.channels * job.s, (job.run * job.s + LANES - 1) // LANES
    words = runs_of(job, job.run) * slab
    return first * stride + c0 * s, stride, (c1 - c0) * s, first * words + c0 // job.run * slab, words


@point
def repeat(value, length, row, j):
    """row[j : j + length] = value, of at least a vector."""
    for i in range(j, j + length - LANES, LANES):
        store(row, i, value)
    store(row, j + length - LANES, value)


@point
def total_of(sums, j, length):
    """Sum of sums[j : j + length], at least a vector of them."""
    both = splat(0.0)
    for i in range(j, j + length - LANES + 1, LANES):
        both = both + load(sums, i)
    if length % LANES:
        both = both + where(last(length % LANES), load(sums, j + length - LANES), splat(0.0))
    return total(both)


@loop
def slab_moments(job, c0, c1, b):
    """Mean and m2 of block b of channels c0 to c1, into `part`."""
    noinline()
    first, rows, _, s = block_to_reduce(job, b)
    at, stride, width, _, _ = slab_of(job, c0, c1, first)
    channels, part = job.channels, ahead_of(job.part, 2 * b * job.channels + c0)
    shifts, s1, s2 = scratch(job.coef, WIDEST), scratch(part, WIDEST), scratch(part, WIDEST)
    for c in range(c1 - c0):
        repeat(splat(rounded(shifts, shift_of(job.x, at + c * s))), s, shifts, c * s)
    apart(sum_moments, (job, at, stride, rows, width, shifts, s1, s2))
    for c in range(c1 - c0):
        sums = total_of(s1, c * s, s), total_of(s2, c * s, s)
        part[c], part[c + channels] = moments_of(np.float64(shifts[c * s]), rows * s, sums[0], sums[1])


@point
def signs_again(job):
    """Whether a backward pass computes the activation's signs again."""
    return job.slope != 1.0 and not present(job.signs)


@point
def slab_coef(job, c0, c1, coef, first, end):
    """Rows `first` to `end` of the coefficients of channels c0 to c1, for every column."""
    for r in range(first, end):
        for c in range(c0, c1):
            repeat(splat(job.coef[r * job.channels + c]), job.s, coef, r * SLAB + (c - c0) * job.s)


@loop
def slab_gradients(job, c0, c1, b):
    """Sums of gated dy and of dy * (x - MEAN) over block b of channels c0 to c1, into `part`."""
    noinline()
    first, rows, _, s = block_to_reduce(job, b)
    at, stride, width, word, words = slab_of(job, c0, c1, first)
    channels, part = job.channels, ahead_of(job.part, 2 * b * job.channels + c0)
    coef, s1, s2 = scratch(job.coef, SLAB_COEF), scratch(part, WIDEST), scratch(part, WIDEST)
    slab_coef(job, c0, c1, coef, HIGH if signs_again(job) else MEAN, MEAN + 1)
    apart(sum_gradients, (job, at, stride, rows, width, coef, SLAB, word, words, s1, s2))
    for c in range(c1 - c0):
        part[c], part[c + channels] = total_of(s1, c * s, s), total_of(s2, c * s, s)


@loop
def apply_slab(job, c0, c1, first, rows, backward, fused):
    """Output, or dx and dresidual, of channels c0 to c1 in so many samples: after their reduction the last first."""
    noinline()
    first, on, ahead = (first + rows - 1, -1, 0) if fused else (first, 1, job.ahead)
    at, stride, width, word, words = slab_of(job, c0, c1, first)
    coef = scratch(job.coef, SLAB_COEF)
    first_coef = SCALE if backward and not signs_again(job) else HIGH
    slab_coef(job, c0, c1, coef, first_coef, B + 1 if backward else SCALE + 1)
    apart(apply_rows, (job, at, on * stride, rows, width, coef, SLAB, 1, word, on * words, ahead, backward))


# --- column nest --------------------------------------------------------------------------------------------------
# Memory is seen as rows of `columns` values, summed in chunks of columns whose sums stay in L1. Those that fill no
# row are a last one, padded with zeros, with a part of its own. The columns of a channel share a shift, its first value
# in a block, so that their sums add up: 64 channels in 256 columns were 192 merges, a third of the time of (32, 64).


@point
def chunks_of(columns):
    """Number of chunks of a row; the last takes the rest."""
    return max(1, columns // CHUNK)


@point
def chunk_of(job, t):
    """(first row, rows, first column, width, part) of task t over blocks and chunks."""
    columns, chunks = job.columns, chunks_of(job.columns)
    b, q = t // chunks, t % chunks
    first, j0 = b * job.block, q * CHUNK
    width = CHUNK if q < chunks - 1 else columns - j0
    return first, min(job.block, job.rows - first), j0, width, ahead_of(job.part, 2 * b * columns + j0)


@point
def shifts_of(job, row, j0, width, shifts):
    """The shifts of so many columns from j0 on, whose block begins at `row`."""
    channels, length = job.channels, job.s
    pixel, c, k = channels * length, j0 // length % channels, j0 % length
    for j in range(min(pixel, width)):
        shifts[j] = row[c * length]
        k += 1
        if k == length:
            c, k = c + 1, 0
        if c == channels:
            c -= channels
    for j in range(pixel, width):
        shifts[j] = shifts[j - pixel]


@loop
def column_moments(job, t):
    """Sums of x - shift and of its square for every column of a chunk, into `part` (blocks, 2, columns)."""
    noinline()
    first, rows, j0, width, part = chunk_of(job, t)
    columns, at = job.columns, first * job.columns + j0
    s1, s2, shifts = scratch(part, WIDEST), scratch(part, WIDEST), scratch(job.x, WIDEST)
    if columns == job.channels:
        shifts = ahead_of(job.x, at)
    else:
        shifts_of(job, ahead_of(job.x, at - j0), j0, width, shifts)
    apart(sum_moments, (job, at, columns, rows, width, shifts, s1, s2))
    for j in range(width):
        part[j], part[j + columns] = s1[j], s2[j]


@loop
def column_gradients(job, t):
    """Sums of gated dy and of dy * (x - MEAN) of every column of a chunk, into `part` (blocks, 2, columns)."""
    noinline()
    first, rows, j0, width, part = chunk_of(job, t)
    columns, words = job.columns, (job.columns + LANES - 1) // LANES
    at, word, coef = first * columns + j0, first * words + j0 // LANES, ahead_of(job.coef, j0)
    s1, s2 = scratch(part, WIDEST), scratch(part, WIDEST)
    apart(sum_gradients, (job, at, columns, rows, width, coef, columns, word, words, s1, s2))
    for j in range(width):
        part[j], part[j + columns] = s1[j], s2[j]


@point
def group_of(columns):
    """Rows of a task."""
    return max(1, GROUP // columns)


@loop
def apply_group(job, t, backward):
    """Output, or dx and dresidual, of the t-th group of rows."""
    noinline()
    columns, first = job.columns, t * group_of(job.columns)
    rows, words = min(group_of(columns), job.rows - first), (columns + LANES - 1) // LANES
    at, word = first * columns, first * words
    apart(apply_rows, (job, at, columns, rows, columns, job.coef, columns, 1, word, words, job.ahead, backward))


# --- phases -------------------------------------------------------------------------------------------------------


@point
def can_stream(job):
    """In place the lines are in the cache already."""
    out = job.y if present(job.y) else job.dx
    return not (same(out, job.x) or same(out, job.residual) or same(out, job.dy))


@point
def spread_of(job):
    """Channels of a task of output alone: as many as lie in a block's length."""
    return job.run if job.s < SHORT or job.s > BLOCK else BLOCK // job.s


@point
def runs_of(job, run):
    """Number of runs of so many neighbouring channels."""
    return (job.channels + run - 1) // run


@point
def run_of(job, t, run):
    """Channels c0 to c1 of run t."""
    return t * run, min(t * run + run, job.channels)


@point
def sums_of(job, c, b):
    """(count, first, second) of channel c in part b, its columns together."""
    part, channels = job.part, job.channels
    if not job.columns:
        at = 2 * b * channels + c
        return size_of(job, b), part[at], part[at + channels]
    width, length, count, first, second = job.columns, job.s, np.intp(0), 0.0, 0.0
    end = width if b < job.blocks else job.n * channels * length - job.rows * width
    for begin in range(c * length, end, channels * length):
        count += length * size_of(job, b)
        for at in range(2 * b * width + begin, 2 * b * width + begin + length):
            first += part[at]
            second += part[at + width]
    return count, first, second


@point
def size_of(job, b):
    """Number of values behind part b of a channel or column; one in the part of the values that fill no row."""
    if job.columns:
        return min(job.block, job.rows - b * job.block) if b < job.blocks else 1
    _, height, _, length = block_to_reduce(job, b)
    return height * length


@loop
def finish_channel(job, c, backward, apply):
    """The parts of channel c together, in order, and what follows from them if output is wanted."""
    noinline()
    channels, columns, s = job.channels, job.columns, job.s
    rest = job.n * channels * s - job.rows * columns if columns else 0
    count, first, second = np.intp(0), 0.0, 0.0  # mean and m2, or sums of dy and dy * (x - MEAN)
    for b in range(job.blocks + (1 if c * s < rest else 0)):
        size, one, two = sums_of(job, c, b)
        if backward:
            first += one
            second += two
        else:
            if columns:
                shift = shift_of(job.x, min(b * job.block, job.rows) * columns + c * s)
                one, two = moments_of(shift, size, one, two)
            first, second = merge(count, first, second, size, one, two)
            count += size
    if apply and backward:
        finish_gradient(job, c, first, second)
    elif apply:
        finish_statistics(job, c, first, second)
    elif backward:
        mean = job.stats[c]
        job.grads[c], job.grads[channels + c] = first, second - (mean - rounded(job.coef, mean)) * first
    else:
        job.stats[c], job.stats[channels + c] = first, second


@loop
def reduce_run(job, c0, c1, b, backward):
    """Mean and m2, or sums of gradients, of block b of channels c0 to c1, into `part` (blocks, 2, channels)."""
    noinline()
    part = ahead_of(job.part, 2 * b * job.channels)
    if job.s < SHORT:
        if backward:
            apart(slab_gradients, (job, c0, c1, b))
        else:
            apart(slab_moments, (job, c0, c1, b))
    else:
        for c in range(c0, c1):
            if backward:
                part[c], part[c + job.channels] = apart(block_gradients, (job, c, b))
            else:
                part[c], part[c + job.channels] = apart(block_moments, (job, c, b))


@loop
def apply_run(job, c0, c1, first, rows, column, length, backward, fused):
    """Output, or dx and dresidual, of a block of channels c0 to c1."""
    noinline()
    if job.s < SHORT:
        apart(apply_slab, (job, c0, c1, first, rows, backward, fused))
    else:
        apart(apply_block, (job, c0, c1, first, rows, column, length, backward, fused))


@point
def run_at_once(job, t, backward):
    """Reduction and output of run t."""
    c0, c1 = run_of(job, t, job.run)
    for b in range(job.blocks):
        apart(reduce_run, (job, c0, c1, b, backward))
    for c in range(c0, c1):
        apart(finish_channel, (job, c, backward, True))
        if backward:
            round_gradient(job, c, job.channels, c)
        else:
            round_affine(job, c, job.channels, c)
    height = BLOCK // job.s if job.s < SHORT else 1
    for b in range(blocks_of(job.n, job.s, height, BLOCK) - 1, -1, -1):  # the last first: it is in the nearest cache
        first, rows, column, length = block_of(b, job.n, job.s, height, BLOCK)
        apart(apply_run, (job, c0, c1, first, rows, column, length, backward, True))


@point
def samples_of(job):
    """Samples of a task of output alone."""
    return 1 if job.s >= SHORT else SAMPLES


@loop
def task(job, backward, phase, t):
    """Task t of a phase."""
    noinline()
    if phase == FUSED:
        run_at_once(job, t, backward)
    elif phase == REDUCE:
        c0, c1 = run_of(job, t // job.blocks, job.run)
        apart(reduce_run, (job, c0, c1, t % job.blocks, backward))
    elif phase == APPLY:
        runs = runs_of(job, spread_of(job))  # in the order of memory
        c0, c1 = run_of(job, t % runs, spread_of(job))
        first, height, column, length = block_of(t // runs, job.n, job.s, samples_of(job), BLOCK)
        apart(apply_run, (job, c0, c1, first, height, column, length, backward, False))
    elif phase == APPLY_COLUMNS:
        apart(apply_group, (job, t, backward))
    elif backward:
        apart(column_gradients, (job, t))
    else:
        apart(column_moments, (job, t))
    if job.streaming:
        fence()


@point
def tasks_of(job, phase):
    """Number of independent tasks of a phase."""
    tasks = runs_of(job, job.run)
    if phase == REDUCE:
        tasks *= job.blocks
    elif phase == APPLY:
        tasks = blocks_of(job.n, job.s, samples_of(job), BLOCK) * runs_of(job, spread_of(job))
    elif phase == REDUCE_COLUMNS:
        tasks = job.blocks * chunks_of(job.columns)
    elif phase == APPLY_COLUMNS:
        tasks = (job.rows + group_of(job.columns) - 1) // group_of(job.columns)
    return tasks


# --- between phases -------------------------------------------------------------------------------------------------


@loop
def prepare(job, backward, phase):
    """What comes before a phase: coefficients for every channel or, repeated as the channels are, every column."""
    noinline()
    width, length = (job.columns, job.s) if job.columns else (job.channels, 1)
    apply, pixel = phase in (APPLY, APPLY_COLUMNS), job.channels * length
    for c in range(job.channels):
        j = c * length
        if backward != apply:
            round_affine(job, j, width, c)
        if backward:
            if apply:
                round_gradient(job, j, width, c)
            else:
                job.coef[MEAN * width + j] = rounded(job.coef, job.stats[c])
    first, end = (A, B + 1) if backward and apply else (HIGH, MEAN + 1 if backward else SCALE + 1)
    for r in range(first, end):
        row = ahead_of(job.coef, r * width)
        for c in range(job.channels if length > 1 else 0):
            for j in range(c * length + 1, c * length + length):
                row[j] = row[c * length]
        for j in range(pixel, width):
            row[j] = row[j - pixel]


@loop
def padded(job, values, row):
    """The values that fill no row, in a row padded with zeros; null if there are no values at all."""
    noinline()
    if not present(values):
        return values
    begin = job.rows * job.columns
    for j in range(job.columns):
        row[j] = values[begin + j] if begin + j < job.n * job.channels * job.s else rounded(job.coef, 0.0)
    return row


@loop
def unpadded(job, row, values):
    """Copy the values that fill no row from their padded row."""
    noinline()
    begin = job.rows * job.columns
    for j in range(job.n * job.channels * job.s - begin if present(values) else 0):
        values[begin + j] = row[j]


@loop
def last_row(job, backward, phase):
    """A phase of the column nest for the values that fill no row: a job of one row, and its parts are the last."""
    noinline()
    row, columns, coef = copy_of(job), job.columns, job.coef
    row.rows, row.block, row.streaming = 1, 1, False
    row.part = ahead_of(job.part, 2 * job.blocks * columns)
    row.x = padded(job, job.x, scratch(coef, LONGEST_FOLD))
    row.dy = padded(job, job.dy, scratch(coef, LONGEST_FOLD))
    if present(job.signs):
        row.signs = ahead_of(job.signs, job.rows * ((columns + LANES - 1) // LANES))
    if phase == APPLY_COLUMNS:
        row.residual = padded(job, job.residual, scratch(coef, LONGEST_FOLD))
        row.y = padded(job, job.y, scratch(coef, LONGEST_FOLD))
        row.dx = padded(job, job.dx, scratch(coef, LONGEST_FOLD))
        row.dresidual = padded(job, job.dresidual, scratch(coef, LONGEST_FOLD))
        apart(apply_group, (row, 0, backward))
        unpadded(job, row.y, job.y)
        unpadded(job, row.dx, job.dx)
        unpadded(job, row.dresidual, job.dresidual)
    else:
        for t in range(chunks_of(columns)):
            if backward:
                apart(column_gradients, (row, t))
            else:
                apart(column_moments, (row, t))


# --- kernel -------------------------------------------------------------------------------------------------------


def _kernel(
    backward, reduce, apply, plan, training, wide, eps, slope, factor, x, residual, dy, y, dx, dresidual, signs,
    weight, bias, running_mean, running_var, norm, grads, part,
):  # fmt: skip
    """Reduction (statistics, or sums of gradients) and output, or one of them.

    Sums of gradients alone become the first two rows of `grads`; the output alone takes A and B from the last two, or
    `norm` from the running statistics if they are given.
    """
    job = make_job(plan, (
        training, wide, eps, slope, factor, x, residual, dy, y, dx, dresidual, signs,
        weight, bias, running_mean, running_var, norm, grads, part,
    ))  # fmt: skip
    job.affine = ahead_of(job.stats, 3 * job.channels)
    job.coef = seen_as(ahead_of(part, 2 * (job.blocks + 1) * (job.columns or job.channels)), x)
    job.streaming = job.streaming and can_stream(job)
    columns, threads = job.columns, job.threads
    last = columns and job.rows * columns < job.n * job.channels * job.s
    if backward and not reduce:
        prepare(job, backward, REDUCE)  # for the output too
    if not reduce and present(job.running_mean):
        fold(job)
    once = reduce and apply and not job.split
    for step in range(0 if reduce else 1, 2 if apply and not once else 1):
        if step == 0:
            phase = FUSED if once else (REDUCE_COLUMNS if columns else REDUCE)
        else:
            phase = APPLY_COLUMNS if columns else APPLY
        if backward or step:
            prepare(job, backward, phase)
        tasks = tasks_of(job, phase)
        if threads == 1:
            for t in range(tasks):
                apart(task, (job, backward, phase, t))
        else:
            before = team(threads)
            for t in prange(tasks):
                apart(task, (job, backward, phase, np.intp(t)))
            team(before)
        if last:
            last_row(job, backward, phase)
        if step == 0 and not once:
            for c in range(job.channels):
                apart(finish_channel, (job, np.intp(c), backward, apply))


# --- adapters: what `fastbn.backends` promises ------------------------------------------------------------------------

# All that kernels are compiled from.
_SOURCE = digest_of((sys.modules[__name__], _vectors, _compiler, _buffers, _job, _plan))
_THREADS = Plan._fields.index("threads")
_functions: list[Any] = []  # whose compiled forms are called: they go with the last reference to them
_workqueue = threading.RLock()  # a signal's handler may interrupt a call, and call

if hasattr(os, "register_at_fork"):  # a child of a thread that compiles would wait for ever for the lock
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


@functools.cache
def _compiled(real: np.dtype[Any]) -> Any:
    """The kernel for this dtype: from the compile cache, or compiled now and put there if it can be written."""
    with global_compiler_lock:  # other threads wait for it, instead of compiling it once more
        return _compiled_once(real)


@functools.cache
def _compiled_once(real: np.dtype[Any]) -> Any:
    kinds = _job.kinds_of(from_dtype(real))
    arguments = (Buffer(kind.dtype) if isinstance(kind, types.CPointer) else kind for kind in map(kinds.get, ARGUMENTS))
    steps = (types.boolean,) * 3
    signature = types.void(*steps, Buffer(types.intp), *arguments)
    function = prepared(
        _kernel, f"kernel-{real}", _SOURCE, signature, functools.partial(parts_of, Job(from_dtype(real))), parallel=True
    )
    return one_at_a_time(function, lambda arguments: arguments[3][_THREADS])


def prepared(
    python: Any, name: str, source: str | None, signature: Any, parts: Any = tuple, *, parallel: bool = False
) -> Any:
    """A Numba function with one signature, and the `parts` that it calls, compiled or loaded."""
    function = njit(nogil=True, error_model="numpy", parallel=parallel)(python)
    if source is not None:
        function._cache = Cache(name, source, parts)
    try:
        function.compile(signature)
    except ValueError as error:
        settings = f"NUMBA_THREADING_LAYER is {config.THREADING_LAYER!r}, NUMBA_THREADING_LAYER_PRIORITY "
        settings += repr(" ".join(config.THREADING_LAYER_PRIORITY))
        raise RuntimeError(f"Numba cannot prepare the kernels ({settings}): {error}") from error
    function.disable_compile()
    return function


def one_at_a_time(function: Any, threads_of: Callable[[tuple[Any, ...]], int]) -> Any:
    """The compiled form of a function, whose parallel loops wait for each other where two at once end the process.

    That is on the layer `workqueue`. Loops of other packages cannot be held up there, nor held off.
    """
    _functions.append(function)
    kernel = entry_of(function)
    if _layer() != "workqueue":
        return kernel

    def wait(*arguments: Any) -> None:
        with _workqueue if threads_of(arguments) > 1 else nullcontext():
            kernel(*arguments)

    return wait


def _layer() -> str:
    """Numba's threading layer, once a parallel kernel has been compiled or loaded."""
    try:
        return str(numba.threading_layer())
    except ValueError:
        return "not started"


@functools.cache
def _most_threads() -> int:
    return int(config.NUMBA_NUM_THREADS)


def _threads() -> int:
    return min(_engine.get_num_threads(), _most_threads())


def warmup() -> None:
    """Compile every kernel, or load it from the compile cache."""
    for dtype in FLOATS:
        _compiled(dtype)


def _image_kernel_of(dtype: np.dtype[Any]) -> Any:
    from fastbn.backends import _numba_images

    return _numba_images.kernel_of(dtype)


_operations = Operations(_compiled, _threads, lambda _: LANES, _image_kernel_of)
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
    folder = writable_folder()
    cache = str(folder) if folder else f"none, for {' and '.join(map(str, folders()))} cannot be written"
    return [
        ("Numba", f"{numba.__version__}, threading layer: {_layer()}, at most {config.NUMBA_NUM_THREADS} threads"),
        ("compile cache", cache if _SOURCE else "none, for the kernels' code cannot be read again"),
    ]
