"""The kernels in Numba.

Design
------
A. `_plan` says how a tensor is cut; this file computes. Its parts, in order: channel arithmetic (scalars), points (one
   vector), the row nest, the column nest, phases, kernels. `fastbn_ext` has the same parts under the same names.
B. Inner loops are written with the vectors of `_vectors`; there is no fastmath, so every sum has one order and every
   result is bitwise reproducible. One subtraction and one fused multiply-add a value is all that a normalisation costs.
C. Statistics of a block are sums of deviations from `shift`, one of the block's own values, in float64. Its distance
   from the mean is at most sqrt(m2), so ``m2 = s2 - s1**2 / count`` loses at most log2(count) of 53 bits whatever the
   mean is, and a constant block gives exactly mean = shift, m2 = 0. There is no second pass and no division inside.
D. ``y = (x - high) * scale + low``: `high` is the mean rounded to x's dtype, so that the difference is exact where x is
   near the mean; `low` carries the bias and the mean's rounding error.
E. A row's last, partial vector overlaps the one before it, and is loaded before anything is stored, so that y may be x.
F. Streamed output begins with a plain vector up to the first line of the cache, and goes on in whole lines. A stage in
   L1, which would let short rows be streamed too, was tried: 1.25 copies for inference where this costs 1.0, because
   reads and writes no longer overlap.
G. Statistics prefetch `AHEAD` values of their channel, across rows (32x64x112x112: 0.66 to 0.50 copies). While short
   rows of a task are written, those of the next are prefetched (32x1024x14x14: training 2.7 to 1.7 copies).
H. A kernel is one or two phases, and a phase a loop over independent tasks: the only place with threads. To spare the
   compiler, one kernel serves all forward operations, and everything inside works on pointers.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import threading
from contextlib import nullcontext
from typing import Any

import numba
import numpy as np
from numba import config, njit, prange, types
from numba.core.compiler_lock import global_compiler_lock
from numba.np.numpy_support import from_dtype

from fastbn import _engine
from fastbn._arrays import EMPTY, NO_SIGNS, Array
from fastbn.backends import _plan, _vectors
from fastbn.backends._cache import Cache, digest_of, folders, writable_folder
from fastbn.backends._plan import BLOCK, LANES, Plan, plan, workspace
from fastbn.backends._vectors import (
    ahead_of,
    bits,
    fence,
    finite,
    fma,
    last,
    like,
    load,
    mask_of,
    noinline,
    pointer,
    positive,
    prefetch,
    present,
    put,
    rounded,
    same,
    scratch,
    splat,
    store,
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
HIGH, SCALE, LOW, MEAN, A, B = range(6)
# Phases.
FUSED, REDUCE, APPLY, REDUCE_COLUMNS, APPLY_COLUMNS = range(5)
# What `round_all` rounds: HIGH, SCALE, LOW; these and MEAN; A, B.
ROUND_AFFINE, ROUND_BOTH, ROUND_GRADIENT = range(3)

CHUNK = 512  # columns whose sums stay in L1
GROUP = 1 << 14  # values of a task of the column nest
AHEAD = 2048  # values by which statistics prefetch; 1024 gains less, and none is needed within the cache

loop = njit(nogil=True, error_model="numpy")
point = njit(nogil=True, error_model="numpy", forceinline=True)

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
def finish_statistics(c, channels, mean, m2, count, eps, stats, affine):
    """All that follows from the moments of channel c; `affine` holds weight and bias before."""
    var = m2 / count
    invstd = 1.0 / math.sqrt(var + eps)
    stats[c], stats[channels + c], stats[2 * channels + c] = mean, var, invstd
    affine[c] = mean
    affine[channels + c] *= invstd


@point
def finish_gradient(c, channels, mean_rounded, sum_dy, dot, count, stats, affine, grads):
    """All that follows from the sums of dy and dy * (x - MEAN): dweight, dbias, A and B.

    dx = SCALE * dy + A * (x - MEAN) + B
    """
    mean, invstd, scale = stats[c], stats[2 * channels + c], affine[channels + c]
    low = mean - mean_rounded
    dot -= low * sum_dy
    a = -scale * invstd * invstd * dot / count
    grads[c], grads[channels + c] = dot * invstd, sum_dy
    grads[2 * channels + c], grads[3 * channels + c] = a, -scale * sum_dy / count - a * low


@loop
def round_affine(coef, j, width, c, channels, affine):
    """HIGH, SCALE, LOW of channel c in x's dtype (design, D), at column j."""
    center, scale, shift = affine[c], affine[channels + c], affine[2 * channels + c]
    high = rounded(coef, center)
    coef[HIGH * width + j] = high
    coef[SCALE * width + j] = rounded(coef, scale)
    coef[LOW * width + j] = rounded(coef, shift - (center - high) * scale)


@point
def round_gradient(coef, j, width, c, channels, grads):
    """A and B of channel c in x's dtype, at column j."""
    coef[A * width + j] = rounded(coef, grads[2 * channels + c])
    coef[B * width + j] = rounded(coef, grads[3 * channels + c])


# --- points: one vector -------------------------------------------------------------------------------------------


@point
def activated(z, opened, slope):
    """z where the activation is open, slope * z elsewhere; a slope of 0 gives zero even for an infinite z."""
    return where(opened, z, like(z, 0.0) if slope == 0.0 else z * like(z, slope))


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
    """dy behind the activation, whose sign is read or, without a residual, computed again exactly as in `output`."""
    if slope != 1.0:
        opened = mask_of(signs[word]) if present(signs) else positive(fma(x - high, scale, low))
        dy = activated(dy, opened, slope)
    return dy


@point
def gradient(dy, x, training, scale, mean, a, b):
    """dx of a gated dy."""
    return fma(scale, dy, fma(a, x - mean, b)) if training else scale * dy


# --- row nest -----------------------------------------------------------------------------------------------------
# A block is `rows` rows of `length` values of a channel, the first one at sample `first`, from `column` on.


@point
def block_of(b, n, s):
    """(first, rows, column, length) of block b. The last one of a row takes the rest: none is shorter than a vector."""
    if s > BLOCK:
        pieces = s // BLOCK
        column = b % pieces * BLOCK
        return b // pieces, 1, column, (BLOCK if b % pieces < pieces - 1 else s - column)
    rows = BLOCK // s
    return b * rows, min(rows, n - b * rows), 0, s


@point
def far_ahead(x, at, i, length, stride, skip, limit):
    """Prefetch what lies AHEAD values behind x[at + i] in its channel, whose rows of `length` lie `stride` apart.

    `skip` is the number of whole rows in AHEAD; dividing here would be a division for every vector.
    """
    i += AHEAD - skip * length
    at += skip * stride + (i if i < length else i + stride - length)
    if at < limit:
        prefetch(x, at)


@loop
def block_moments(x, c, b, n, channels, s, run):
    """Count, mean and m2 of block b of channel c (design, C)."""
    noinline()
    first, rows, column, length = block_of(b, n, s)
    stride = channels * s
    skip = AHEAD // length
    start = first * stride + c * s + column
    shift = np.float64(x[start])
    if not math.isfinite(shift):
        shift = np.float64(0.0)
    around, zero = splat(shift), splat(0.0)
    s1, s2 = zero, zero
    rest = length % LANES
    tail = last(rest)
    for r in range(rows):
        at = start + r * stride
        for i in range(0, length - LANES + 1, LANES):
            if run == 1:
                far_ahead(x, at, i, length, stride, skip, n * stride)
            d = widen(load(x, at + i)) - around
            s1 = s1 + d
            s2 = fma(d, d, s2)
        if rest:
            d = where(tail, widen(load(x, at + length - LANES)) - around, zero)
            s1 = s1 + d
            s2 = fma(d, d, s2)
    count = rows * length
    sum1 = total(s1)
    mean = sum1 / count
    m2 = total(s2) - sum1 * mean
    return count, shift + mean, 0.0 if m2 < 0.0 else m2


@loop
def block_gradients(dy, x, c, b, n, channels, s, run, coef, slope, signs):
    """Sums of gated dy and of dy * (x - MEAN) over block b of channel c."""
    noinline()
    first, rows, column, length = block_of(b, n, s)
    stride = channels * s
    skip = AHEAD // length
    high, scale = splat(coef[HIGH * channels + c]), splat(coef[SCALE * channels + c])
    low, mean = splat(coef[LOW * channels + c]), splat(coef[MEAN * channels + c])
    sum_dy, dot = splat(0.0), splat(0.0)
    words = (s + LANES - 1) // LANES
    rest = length % LANES
    tail = last(rest)
    for row in range(first, first + rows):
        word = (row * channels + c) * words + column // LANES
        at = row * stride + c * s + column
        for i in range(0, length - LANES + 1, LANES):
            if run == 1:
                far_ahead(x, at, i, length, stride, skip, n * stride)
                far_ahead(dy, at, i, length, stride, skip, n * stride)
            value = load(x, at + i)
            g = widen(gated(load(dy, at + i), value, high, scale, low, slope, signs, word + i // LANES))
            sum_dy = sum_dy + g
            dot = fma(g, widen(value - mean), dot)
        if rest:
            value = load(x, at + length - LANES)
            g = gated(load(dy, at + length - LANES), value, high, scale, low, slope, signs, word + length // LANES)
            g = widen(where(tail, g, like(g, 0.0)))
            sum_dy = sum_dy + g
            dot = fma(g, widen(value - mean), dot)
    return total(sum_dy), total(dot)


@point
def apply_row(x, residual, at, length, c, channels, coef, slope, y, signs, word, streaming, ahead):
    """Output of the `length` values of channel c from `at` on (design, E and F)."""
    high, scale = splat(coef[HIGH * channels + c]), splat(coef[SCALE * channels + c])
    low = splat(coef[LOW * channels + c])
    zero = like(high, 0.0)
    end = length - LANES
    i = to_line(y, at) if streaming else 0
    streaming = streaming and not (present(signs) and i > 0)
    i = i if streaming else 0
    last_x = load(x, at + end)
    last_added = load(residual, at + end) if present(residual) else zero
    if i:
        added = load(residual, at) if present(residual) else zero
        store(y, at, output(load(x, at), added, high, scale, low, slope, signs, word))
    if slope == 1.0 and not present(residual):
        while i <= end:
            if ahead:
                prefetch(x, at + i + ahead)
            put(y, at + i, fma(load(x, at + i) - high, scale, low), streaming)
            i += LANES
    else:
        while i <= end:
            added = load(residual, at + i) if present(residual) else zero
            if ahead:
                prefetch(x, at + i + ahead)
            z = output(load(x, at + i), added, high, scale, low, slope, signs, word + i // LANES)
            put(y, at + i, z, streaming)
            i += LANES
    if i < length:
        store(y, at + end, output(last_x, last_added, high, scale, low, slope, signs, word + i // LANES))


@point
def gradient_row(
    dy, x, at, length, c, channels, coef, training, slope, dx, dresidual, signs, word, streaming, ahead
):  # fmt: skip
    """dx, and dresidual if wanted, of the `length` values of channel c from `at` on."""
    high, scale = splat(coef[HIGH * channels + c]), splat(coef[SCALE * channels + c])
    low, mean = splat(coef[LOW * channels + c]), splat(coef[MEAN * channels + c])
    a, b = splat(coef[A * channels + c]), splat(coef[B * channels + c])
    end = length - LANES
    i = to_line(dx, at) if streaming else 0
    streaming = streaming and not (present(signs) and i > 0)
    if present(dresidual):
        streaming = streaming and to_line(dresidual, at) == i
    i = i if streaming else 0
    last_x, last_dy = load(x, at + end), load(dy, at + end)
    if i:
        value = load(x, at)
        g = gated(load(dy, at), value, high, scale, low, slope, signs, word)
        store(dx, at, gradient(g, value, training, scale, mean, a, b))
        if present(dresidual):
            store(dresidual, at, g)
    while i <= end:
        value = load(x, at + i)
        g = gated(load(dy, at + i), value, high, scale, low, slope, signs, word + i // LANES)
        if ahead:
            prefetch(x, at + i + ahead)
            prefetch(dy, at + i + ahead)
        put(dx, at + i, gradient(g, value, training, scale, mean, a, b), streaming)
        if present(dresidual):
            put(dresidual, at + i, g, streaming)
        i += LANES
    if i < length:
        g = gated(last_dy, last_x, high, scale, low, slope, signs, word + i // LANES)
        store(dx, at + end, gradient(g, last_x, training, scale, mean, a, b))
        if present(dresidual):
            store(dresidual, at + end, g)


@loop
def apply_block(
    x, residual, c0, c1, first, rows, column, length, channels, s, coef, slope, y, signs, streaming, ahead
):  # fmt: skip
    """Output of a block of channels c0 to c1."""
    noinline()
    words = (s + LANES - 1) // LANES
    for row in range(first, first + rows):
        for c in range(c0, c1):
            at = (row * channels + c) * s + column
            word = (row * channels + c) * words + column // LANES
            apply_row(x, residual, at, length, c, channels, coef, slope, y, signs, word, streaming, ahead)


@loop
def gradient_block(
    dy, x, c0, c1, first, rows, column, length, channels, s, coef, training, slope,
    dx, dresidual, signs, streaming, ahead,
):  # fmt: skip
    """dx and dresidual of a block of channels c0 to c1."""
    noinline()
    words = (s + LANES - 1) // LANES
    for row in range(first, first + rows):
        for c in range(c0, c1):
            at = (row * channels + c) * s + column
            word = (row * channels + c) * words + column // LANES
            gradient_row(
                dy, x, at, length, c, channels, coef, training, slope, dx, dresidual, signs, word, streaming, ahead
            )  # fmt: skip


@point
def spread_of(run, s):
    """Channels of a span: as many as lie in a block's length."""
    return 1 if s > BLOCK else max(run, BLOCK // s)


@point
def spans_of(run, channels, s):
    """Number of spans of a row of memory."""
    return (channels + spread_of(run, s) - 1) // spread_of(run, s)


@point
def span_of(t, run, n, channels, s):
    """(c0, c1, first, rows, column, length) of span t of the whole tensor, in the order of memory."""
    spans = spans_of(run, channels, s)
    c0 = t % spans * spread_of(run, s)
    first, rows, column, length = block_of(t // spans, n, s) if s > BLOCK else (t // spans, 1, 0, s)
    return c0, min(c0 + spread_of(run, s), channels), first, rows, column, length


# --- column nest --------------------------------------------------------------------------------------------------
# Memory is seen as rows of `columns` values. Those that fill no row are a last one, padded with zeros by the caller;
# its values have a part each, of count 1.


@point
def chunks_of(columns):
    """Number of chunks of a row; the last takes the rest."""
    return max(1, columns // CHUNK)


@point
def chunk_of(t, columns):
    """(block, first column, width) of task t over blocks and chunks."""
    chunks = chunks_of(columns)
    b, q = t // chunks, t % chunks
    return b, q * CHUNK, (CHUNK if q < chunks - 1 else columns - q * CHUNK)


@loop
def column_moments(x, t, rows, block, columns, part):
    """Mean and m2 of every column of a chunk of a block of rows (design, C), into `part` (blocks, 2, columns)."""
    noinline()
    b, j0, width = chunk_of(t, columns)
    first, end = b * block, min((b + 1) * block, rows)
    s1, s2 = ahead_of(part, 2 * b * columns), ahead_of(part, (2 * b + 1) * columns)
    for j in range(j0, j0 + width):
        s1[j] = s2[j] = 0.0
    zero = splat(0.0)
    rest = width % LANES
    tail = last(rest)
    for row in range(first, end):
        for j in range(j0, j0 + width, LANES):
            k = min(j, j0 + width - LANES)
            shift = widen(load(x, first * columns + k))
            d = widen(load(x, row * columns + k)) - where(finite(shift), shift, zero)
            if k < j:
                d = where(tail, d, zero)
            store(s1, k, load(s1, k) + d)
            store(s2, k, fma(d, d, load(s2, k)))
    for j in range(j0, j0 + width):
        shift = np.float64(x[first * columns + j])
        mean = s1[j] / (end - first)
        m2 = s2[j] - s1[j] * mean
        s1[j] = mean + (shift if math.isfinite(shift) else 0.0)
        s2[j] = 0.0 if m2 < 0.0 else m2


@loop
def column_gradients(dy, x, t, rows, block, columns, coef, slope, signs, part):
    """Sums of gated dy and of dy * (x - MEAN) of every column of a chunk, into `part` (blocks, 2, columns)."""
    noinline()
    b, j0, width = chunk_of(t, columns)
    sum_dy, dot = ahead_of(part, 2 * b * columns), ahead_of(part, (2 * b + 1) * columns)
    for j in range(j0, j0 + width):
        sum_dy[j] = dot[j] = 0.0
    words = (columns + LANES - 1) // LANES
    tail = last(width % LANES)
    for row in range(b * block, min((b + 1) * block, rows)):
        for j in range(j0, j0 + width, LANES):
            k = min(j, j0 + width - LANES)
            value, g = load(x, row * columns + k), load(dy, row * columns + k)
            high, scale = load(coef, HIGH * columns + k), load(coef, SCALE * columns + k)
            low, mean = load(coef, LOW * columns + k), load(coef, MEAN * columns + k)
            g = gated(g, value, high, scale, low, slope, signs, row * words + j // LANES)
            if k < j:
                g = where(tail, g, like(g, 0.0))
            store(sum_dy, k, load(sum_dy, k) + widen(g))
            store(dot, k, fma(widen(g), widen(value - mean), load(dot, k)))


@loop
def apply_columns(x, residual, at, columns, coef, slope, y, signs, word):
    """Output of the row that begins at `at` (design, E)."""
    noinline()
    end = columns - LANES
    zero = like(load(coef, 0), 0.0)
    last_x = load(x, at + end)
    last_added = load(residual, at + end) if present(residual) else zero
    for j in range(0, columns, LANES):
        k = min(j, end)
        value, added = last_x, last_added
        if k == j:
            value = load(x, at + j)
            if present(residual):
                added = load(residual, at + j)
        high, scale = load(coef, HIGH * columns + k), load(coef, SCALE * columns + k)
        z = output(value, added, high, scale, load(coef, LOW * columns + k), slope, signs, word + j // LANES)
        store(y, at + k, z)


@loop
def gradient_columns(dy, x, at, columns, coef, training, slope, dx, dresidual, signs, word):
    """dx, and dresidual if wanted, of the row that begins at `at`."""
    noinline()
    end = columns - LANES
    last_x, last_dy = load(x, at + end), load(dy, at + end)
    for j in range(0, columns, LANES):
        k = min(j, end)
        value, g = last_x, last_dy
        if k == j:
            value, g = load(x, at + j), load(dy, at + j)
        high, scale = load(coef, HIGH * columns + k), load(coef, SCALE * columns + k)
        low, mean = load(coef, LOW * columns + k), load(coef, MEAN * columns + k)
        a, b = load(coef, A * columns + k), load(coef, B * columns + k)
        g = gated(g, value, high, scale, low, slope, signs, word + j // LANES)
        store(dx, at + k, gradient(g, value, training, scale, mean, a, b))
        if present(dresidual):
            store(dresidual, at + k, g)


@point
def group_of(columns):
    """Rows of a task."""
    return max(1, GROUP // columns)


# --- phases -------------------------------------------------------------------------------------------------------


@loop
def forward_task(
    phase, t, run, columns, rows, block, blocks, ahead, streaming, x, residual, n, channels, s, eps, slope,
    y, signs, stats, affine, coef, part,
):  # fmt: skip
    """Task t of a phase of the forward kernel."""
    noinline()
    if phase == FUSED:
        c0 = t * run
        c1 = min(c0 + run, channels)
        for c in range(c0, c1):
            count, mean, m2 = 0, 0.0, 0.0
            for b in range(blocks):
                size, block_mean, block_m2 = block_moments(x, c, b, n, channels, s, run)
                mean, m2 = merge(count, mean, m2, size, block_mean, block_m2)
                count += size
            finish_statistics(c, channels, mean, m2, count, eps, stats, affine)
            round_affine(coef, c, channels, c, channels, affine)
        for b in range(blocks - 1, -1, -1):  # backwards: the last ones are still in the nearest cache
            first, height, column, length = block_of(b, n, s)
            apply_block(
                x, residual, c0, c1, first, height, column, length, channels, s, coef, slope, y, signs, streaming, ahead
            )  # fmt: skip
    elif phase == REDUCE:
        c, b = t // blocks, t % blocks
        _, mean, m2 = block_moments(x, c, b, n, channels, s, run)
        part[2 * b * channels + c], part[(2 * b + 1) * channels + c] = mean, m2
    elif phase == APPLY:
        c0, c1, first, height, column, length = span_of(t, run, n, channels, s)
        apply_block(
            x, residual, c0, c1, first, height, column, length, channels, s, coef, slope, y, signs, streaming, ahead
        )  # fmt: skip
    elif phase == REDUCE_COLUMNS:
        column_moments(x, t, rows, block, columns, part)
    else:
        words = (columns + LANES - 1) // LANES
        for row in range(t * group_of(columns), min((t + 1) * group_of(columns), rows)):
            apply_columns(x, residual, row * columns, columns, coef, slope, y, signs, row * words)
    if streaming:
        fence()


@loop
def backward_task(
    phase, t, run, columns, rows, block, blocks, ahead, streaming, dy, x, n, channels, s, training, slope,
    stats, affine, signs, dx, dresidual, grads, coef, part,
):  # fmt: skip
    """Task t of a phase of the backward kernel."""
    noinline()
    if phase == FUSED:
        c0 = t * run
        c1 = min(c0 + run, channels)
        for c in range(c0, c1):
            sum_dy, dot = 0.0, 0.0
            for b in range(blocks):
                block_dy, block_dot = block_gradients(dy, x, c, b, n, channels, s, run, coef, slope, signs)
                sum_dy += block_dy
                dot += block_dot
            finish_gradient(c, channels, rounded(coef, stats[c]), sum_dy, dot, n * s, stats, affine, grads)
            round_gradient(coef, c, channels, c, channels, grads)
        for b in range(blocks - 1, -1, -1):
            first, height, column, length = block_of(b, n, s)
            gradient_block(
                dy, x, c0, c1, first, height, column, length, channels, s, coef, training, slope,
                dx, dresidual, signs, streaming, ahead,
            )  # fmt: skip
    elif phase == REDUCE:
        c, b = t // blocks, t % blocks
        sum_dy, dot = block_gradients(dy, x, c, b, n, channels, s, run, coef, slope, signs)
        part[2 * b * channels + c], part[(2 * b + 1) * channels + c] = sum_dy, dot
    elif phase == APPLY:
        c0, c1, first, height, column, length = span_of(t, run, n, channels, s)
        gradient_block(
            dy, x, c0, c1, first, height, column, length, channels, s, coef, training, slope,
            dx, dresidual, signs, streaming, ahead,
        )  # fmt: skip
    elif phase == REDUCE_COLUMNS:
        column_gradients(dy, x, t, rows, block, columns, coef, slope, signs, part)
    else:
        words = (columns + LANES - 1) // LANES
        for row in range(t * group_of(columns), min((t + 1) * group_of(columns), rows)):
            gradient_columns(
                dy, x, row * columns, columns, coef, training, slope, dx, dresidual, signs, row * words
            )  # fmt: skip
    if streaming:
        fence()


@point
def tasks_of(phase, run, columns, rows, blocks, n, channels, s):
    """Number of independent tasks of a phase."""
    tasks = (channels + run - 1) // run
    if phase == REDUCE:
        tasks = blocks * channels
    elif phase == APPLY:
        tasks = (blocks if s > BLOCK else n) * spans_of(run, channels, s)
    elif phase == REDUCE_COLUMNS:
        tasks = blocks * chunks_of(columns)
    elif phase == APPLY_COLUMNS:
        tasks = (rows + group_of(columns) - 1) // group_of(columns)
    return tasks


# --- between phases -------------------------------------------------------------------------------------------------


@loop
def round_all(columns, channels, s, coef, stats, affine, grads, what):
    """Coefficients for every channel or, repeated as the channels are, every column."""
    noinline()
    repeats, length = (columns // (channels * s), s) if columns else (1, 1)
    width = repeats * channels * length
    j = 0
    for _ in range(repeats):
        for c in range(channels):
            for _ in range(length):
                if what == ROUND_GRADIENT:
                    round_gradient(coef, j, width, c, channels, grads)
                else:
                    round_affine(coef, j, width, c, channels, affine)
                if what == ROUND_BOTH:
                    coef[MEAN * width + j] = rounded(coef, stats[c])
                j += 1


@loop
def merge_moments(x, rows, block, columns, blocks, n, channels, s, part, stats):
    """Mean and m2 of every channel into the first two rows of `stats`: all its parts, in order."""
    noinline()
    rest = n * channels * s - rows * columns
    for c in range(channels):
        count, mean, m2 = 0, 0.0, 0.0
        if not columns:
            for b in range(blocks):
                _, height, _, length = block_of(b, n, s)
                at = 2 * b * channels + c
                mean, m2 = merge(count, mean, m2, height * length, part[at], part[at + channels])
                count += height * length
        for begin in range(c * s, columns, channels * s):
            for j in range(begin, begin + s):
                for b in range(blocks):
                    size = min(block, rows - b * block)
                    at = 2 * b * columns + j
                    mean, m2 = merge(count, mean, m2, size, part[at], part[at + columns])
                    count += size
                if j < rest:
                    mean, m2 = merge(count, mean, m2, 1, np.float64(x[rows * columns + j]), 0.0)
                    count += 1
        stats[c], stats[channels + c] = mean, m2


@loop
def apply_last_row(x, residual, size, rows, columns, coef, slope, y, signs):
    """Output of the values that fill no row: a row of their own, padded with zeros."""
    noinline()
    begin = rows * columns
    last_x, last_y, last_residual = scratch(coef), scratch(coef), scratch(coef)
    for j in range(columns):
        inside = begin + j < size
        last_x[j] = x[begin + j] if inside else rounded(coef, 0.0)
        last_residual[j] = residual[begin + j] if inside and present(residual) else rounded(coef, 0.0)
    word = rows * ((columns + LANES - 1) // LANES)
    apply_columns(last_x, last_residual, 0, columns, coef, slope, last_y, signs, word)
    for j in range(size - begin):
        y[begin + j] = last_y[j]


@loop
def merge_gradients(dy, x, rows, columns, blocks, n, channels, s, slope, signs, part, stats, affine, grads, coef):
    """`grads` of every channel: all its parts, in order; the values that fill no row are the last block."""
    noinline()
    size = n * channels * s
    rest = size - rows * columns if columns else 0
    if rest:
        last_x, last_dy = scratch(coef), scratch(coef)
        for j in range(columns):
            inside = j < rest
            last_x[j] = x[rows * columns + j] if inside else rounded(coef, 0.0)
            last_dy[j] = dy[rows * columns + j] if inside else rounded(coef, 0.0)
        last_signs = ahead_of(signs, rows * ((columns + LANES - 1) // LANES)) if present(signs) else signs
        last_part = ahead_of(part, 2 * blocks * columns)
        for t in range(chunks_of(columns)):
            column_gradients(last_dy, last_x, t, 1, 1, columns, coef, slope, last_signs, last_part)
    for c in range(channels):
        sum_dy, dot = 0.0, 0.0
        if not columns:
            for b in range(blocks):
                sum_dy += part[2 * b * channels + c]
                dot += part[(2 * b + 1) * channels + c]
        for begin in range(c * s, columns, channels * s):
            for j in range(begin, begin + s):
                for b in range(blocks + (1 if j < rest else 0)):
                    sum_dy += part[2 * b * columns + j]
                    dot += part[(2 * b + 1) * columns + j]
        finish_gradient(c, channels, rounded(coef, stats[c]), sum_dy, dot, n * s, stats, affine, grads)


@loop
def gradient_last_row(dy, x, size, rows, columns, coef, training, slope, dx, dresidual, signs):
    """dx and dresidual of the values that fill no row."""
    noinline()
    begin = rows * columns
    last_x, last_dy = scratch(coef), scratch(coef)
    last_dx, last_dresidual = scratch(coef), scratch(coef)
    for j in range(columns):
        inside = begin + j < size
        last_x[j] = x[begin + j] if inside else rounded(coef, 0.0)
        last_dy[j] = dy[begin + j] if inside else rounded(coef, 0.0)
    word = rows * ((columns + LANES - 1) // LANES)
    gradient_columns(last_dy, last_x, 0, columns, coef, training, slope, last_dx, last_dresidual, signs, word)
    for j in range(size - begin):
        dx[begin + j] = last_dx[j]
        if present(dresidual):
            dresidual[begin + j] = last_dresidual[j]


# --- kernels ------------------------------------------------------------------------------------------------------


def _forward(
    reduce, apply, threads, split, streaming, run, columns, rows, block, blocks, ahead, n, channels, s, eps, slope,
    x_, residual_, y_, signs_, stats_, affine_, coef_, part_,
):  # fmt: skip
    """Statistics (reduce) and output (apply), or both at once; `affine` holds weight and bias before."""
    x, residual, y, signs = pointer(x_), pointer(residual_), pointer(y_), pointer(signs_)
    stats, affine, coef, part = pointer(stats_), pointer(affine_), pointer(coef_), pointer(part_)
    streaming = streaming and not same(x, y) and not same(residual, y)  # in place the lines are in the cache already
    fused = reduce and apply and not split
    for step in range(0 if reduce else 1, 2 if apply and not fused else 1):
        if step == 0:
            phase = FUSED if fused else (REDUCE_COLUMNS if columns else REDUCE)
        else:
            phase = APPLY_COLUMNS if columns else APPLY
            round_all(columns, channels, s, coef, stats, affine, affine, ROUND_AFFINE)
        tasks = tasks_of(phase, run, columns, rows, blocks, n, channels, s)
        if threads == 1:
            for t in range(tasks):
                forward_task(
                    phase, t, run, columns, rows, block, blocks, ahead, streaming, x, residual, n, channels, s, eps,
                    slope, y, signs, stats, affine, coef, part,
                )  # fmt: skip
        else:
            before = team(threads)
            for t in prange(tasks):
                forward_task(
                    phase, t, run, columns, rows, block, blocks, ahead, streaming, x, residual, n, channels, s, eps,
                    slope, y, signs, stats, affine, coef, part,
                )  # fmt: skip
            team(before)
        if step == 0 and not fused:
            merge_moments(x, rows, block, columns, blocks, n, channels, s, part, stats)
            if apply:
                for c in range(channels):
                    finish_statistics(c, channels, stats[c], stats[channels + c], n * s, eps, stats, affine)
    if apply and columns and rows * columns < n * channels * s:
        apply_last_row(x, residual, n * channels * s, rows, columns, coef, slope, y, signs)


def _backward(
    threads, split, streaming, run, columns, rows, block, blocks, ahead, n, channels, s, training, slope,
    dy_, x_, stats_, affine_, signs_, dx_, dresidual_, grads_, coef_, part_,
):  # fmt: skip
    """Sums of the gradients, then dx and dresidual, or both at once."""
    dy, x, signs, dx, dresidual = pointer(dy_), pointer(x_), pointer(signs_), pointer(dx_), pointer(dresidual_)
    stats, affine, grads, coef, part = (
        pointer(stats_),
        pointer(affine_),
        pointer(grads_),
        pointer(coef_),
        pointer(part_),
    )
    streaming = streaming and not same(x, dx) and not same(dy, dx)
    round_all(columns, channels, s, coef, stats, affine, grads, ROUND_BOTH)
    for step in range(2 if split else 1):
        if step == 0:
            phase = FUSED if not split else (REDUCE_COLUMNS if columns else REDUCE)
        else:
            phase = APPLY_COLUMNS if columns else APPLY
            round_all(columns, channels, s, coef, stats, affine, grads, ROUND_GRADIENT)
        tasks = tasks_of(phase, run, columns, rows, blocks, n, channels, s)
        if threads == 1:
            for t in range(tasks):
                backward_task(
                    phase, t, run, columns, rows, block, blocks, ahead, streaming, dy, x, n, channels, s, training,
                    slope, stats, affine, signs, dx, dresidual, grads, coef, part,
                )  # fmt: skip
        else:
            before = team(threads)
            for t in prange(tasks):
                backward_task(
                    phase, t, run, columns, rows, block, blocks, ahead, streaming, dy, x, n, channels, s, training,
                    slope, stats, affine, signs, dx, dresidual, grads, coef, part,
                )  # fmt: skip
            team(before)
        if step == 0 and split:
            merge_gradients(
                dy, x, rows, columns, blocks, n, channels, s, slope, signs, part, stats, affine, grads, coef
            )  # fmt: skip
    if columns and rows * columns < n * channels * s:
        gradient_last_row(dy, x, n * channels * s, rows, columns, coef, training, slope, dx, dresidual, signs)


def _fold(running_mean, running_var, weight, bias, eps, stats, affine):
    """Inference: statistics and one scale and shift a channel from the running ones."""
    for c in range(len(running_mean)):
        mean, var = np.float64(running_mean[c]), np.float64(running_var[c])
        stats[0, c], stats[1, c], stats[2, c] = mean, var, 1.0 / math.sqrt(var + eps)
        scale = (weight[c] if weight.size else 1.0) * stats[2, c]
        shift = (bias[c] if bias.size else 0.0) - mean * scale
        affine[0, c], affine[1, c], affine[2, c] = 0.0, scale, shift


def _update_running(running_mean, running_var, stats, count, factor):
    """Move the running statistics towards the batch's, the variance unbiased, by `factor`."""
    unbiased = count / (count - 1)
    for c in range(len(running_mean)):
        running_mean[c] = (1 - factor) * running_mean[c] + factor * stats[0, c]
        running_var[c] = (1 - factor) * running_var[c] + factor * (unbiased * stats[1, c])


# --- adapters: what `fastbn.backends` promises ------------------------------------------------------------------------

_NOTHING = np.empty(0)

THREADS = {"forward": 2, "backward": 0}  # the kernels with parallel loops, and which argument says on how many threads
_SOURCE = digest_of((sys.modules[__name__], _vectors, _plan))  # all that the kernels are compiled from
_workqueue = threading.RLock()  # a signal's handler may interrupt a call, and call

if hasattr(os, "register_at_fork"):  # a child of a thread that compiles would wait for ever for the lock
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


def _argument_types(kernel: str, real: types.Type) -> tuple[types.Type, ...]:
    """Numba types of a kernel's arguments; read-only inputs take writable arrays too, with one compilation."""

    def array(dtype: types.Type, ndim: int = 1, readonly: bool = True) -> types.Array:
        return types.Array(dtype, ndim, "C", readonly=readonly)

    flag, size, wide = types.boolean, types.intp, types.float64
    given, result, signs = array(real), array(real, 1, False), types.uint16
    rows, rows_in, part = array(wide, 2, False), array(wide, 2), array(wide, 1, False)
    cut = (size, flag, flag, size, size, size, size, size, size, size, size, size)
    return {
        "forward": (
            *(flag, flag, *cut, wide, wide, given, given, result),
            *(array(signs, 1, False), rows, rows, result, part),
        ),
        "backward": (
            *(*cut, flag, wide, given, given, rows_in, rows_in, array(signs), result, result),
            *(rows, result, part),
        ),
        "fold": (given, given, given, given, wide, rows, rows),
        "update_running": (result, result, rows_in, size, wide),
    }[kernel]


@functools.cache
def _compiled(kernel: str, real: np.dtype[Any]) -> Any:
    """The kernel for this dtype: from the compile cache, or compiled now and put there if it can be written."""
    with global_compiler_lock:  # other threads wait for it, instead of compiling it once more
        return _compiled_once(kernel, real)


@functools.cache
def _compiled_once(kernel: str, real: np.dtype[Any]) -> Any:
    parallel = kernel in THREADS
    function = njit(nogil=True, error_model="numpy", parallel=parallel)(globals()[f"_{kernel}"])
    if _SOURCE is not None:
        function._cache = Cache(f"{kernel}-{real}", _SOURCE)
    try:
        function.compile(types.void(*_argument_types(kernel, from_dtype(real))))
    except ValueError as error:
        settings = f"NUMBA_THREADING_LAYER is {config.THREADING_LAYER!r}, NUMBA_THREADING_LAYER_PRIORITY "
        settings += repr(" ".join(config.THREADING_LAYER_PRIORITY))
        raise RuntimeError(f"Numba cannot prepare the kernels ({settings}): {error}") from error
    function.disable_compile()
    return _one_at_a_time(function, THREADS[kernel]) if parallel and _layer() == "workqueue" else function


def _one_at_a_time(kernel: Any, position: int) -> Any:
    """A kernel whose parallel loops wait for each other: two at once in `workqueue` end the process.

    Loops of other packages on that layer cannot be held up, nor held off.
    """

    def wait(*arguments: Any) -> None:
        with _workqueue if arguments[position] > 1 else nullcontext():
            kernel(*arguments)

    return wait


def _layer() -> str:
    """Numba's threading layer, once a parallel kernel has been compiled or loaded."""
    try:
        return str(numba.threading_layer())
    except ValueError:
        return "not started"


def _cut(n: int, c: int, s: int, itemsize: int, reads: int, arrays: int) -> Plan:
    return plan(n, c, s, itemsize, reads, arrays, min(_engine.get_num_threads(), config.NUMBA_NUM_THREADS))


def warmup() -> None:
    """Compile every kernel, or load it from the compile cache."""
    for kernel in ("forward", "backward", "fold", "update_running"):
        for dtype in EMPTY:
            _compiled(kernel, dtype)


def sign_words(n: int, c: int, s: int, itemsize: int) -> int:
    """Number of uint16 words that `signs` needs."""
    return _plan.sign_words(n, c, s)


def moments(x: Array, n: int, c: int, s: int, mean: Array, m2: Array) -> None:
    """Mean and sum of squared deviations of every channel."""
    cut = _cut(n, c, s, x.itemsize, 1, 1)._replace(split=True)
    _, part = workspace(cut, c, 0, x.dtype)
    none, stats = EMPTY[x.dtype], np.empty((2, c))
    kernel = _compiled("forward", x.dtype)
    kernel(True, False, *cut, n, c, s, 0.0, 1.0, x, none, none, NO_SIGNS, stats, stats, none, part)
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
    kernel = _compiled("forward", x.dtype)
    kernel(True, True, *cut, n, c, s, eps, slope, x, residual, y, signs, stats, affine, coef, part)


def transform(
    x: Array, residual: Array, affine: Array, slope: float, n: int, c: int, s: int, y: Array, signs: Array
) -> None:
    """y = activation((x - center) * scale + shift + residual)."""
    cut = _cut(n, c, s, x.itemsize, 1, 3 if residual.size else 2)
    coef, _ = workspace(cut, c, 3, x.dtype)
    kernel = _compiled("forward", x.dtype)
    kernel(False, True, *cut, n, c, s, 0.0, slope, x, residual, y, signs, affine, affine, coef, _NOTHING)


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
    kernel = _compiled("backward", x.dtype)
    kernel(*cut, n, c, s, training, slope, dy, x, stats, affine, signs, dx, dresidual, grads, coef, part)
    dweight[:] = grads[0]
    dbias[:] = grads[1]


def fold(
    running_mean: Array, running_var: Array, weight: Array, bias: Array, eps: float, stats: Array, affine: Array
) -> None:
    """Inference: statistics and one scale and shift a channel from the running ones."""
    _compiled("fold", running_mean.dtype)(running_mean, running_var, weight, bias, eps, stats, affine)


def update_running(running_mean: Array, running_var: Array, stats: Array, count: int, factor: float) -> None:
    """Move the running statistics towards the batch's, the variance unbiased, by `factor`."""
    _compiled("update_running", running_mean.dtype)(running_mean, running_var, stats, count, factor)


def describe() -> list[tuple[str, str]]:
    """What `show_config` says about this backend."""
    folder = writable_folder()
    cache = str(folder) if folder else f"none, for {' and '.join(map(str, folders()))} cannot be written"
    return [
        ("Numba", f"{numba.__version__}, threading layer: {_layer()}, at most {config.NUMBA_NUM_THREADS} threads"),
        ("compile cache", cache if _SOURCE else "none, for the kernels' code cannot be read again"),
    ]
