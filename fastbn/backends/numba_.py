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
H. The kernel is one or two phases, and a phase a loop over independent tasks: the only place with threads. To spare the
   compiler, one kernel serves all operations, its arguments are a `Job`, and its parts are compiled `apart`.
I. An output phase goes backwards: what the reduction before it read last is still in the third-level cache.
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
from fastbn._arrays import EMPTY, Array
from fastbn.backends import _job, _plan, _vectors
from fastbn.backends._cache import Cache, digest_of, folders, writable_folder
from fastbn.backends._job import apart, copy_of, linking, make_job
from fastbn.backends._operations import Operations
from fastbn.backends._plan import BLOCK, LANES
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
    ones,
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

CHUNK = 512  # columns whose sums stay in L1
DEPTH = 8  # rows whose sums stay in registers
GROUP = 1 << 14  # values of a task of the column nest
AHEAD = 2048  # values by which statistics prefetch; 1024 gains less, and none is needed within the cache

inner = functools.partial(njit, nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
loop = inner(forceinline=False)  # said, because a function inherits the options of its first caller
point = inner(forceinline=True)

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
def finish_statistics(job, c, mean, m2):
    """All that follows from the moments of channel c; `affine` holds weight and bias before."""
    var = m2 / (job.n * job.s)
    invstd = 1.0 / math.sqrt(var + job.eps)
    stats, affine, channels = job.stats, job.affine, job.channels
    stats[c], stats[channels + c], stats[2 * channels + c] = mean, var, invstd
    affine[c] = mean
    affine[channels + c] *= invstd


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
    """HIGH, SCALE, LOW of channel c in x's dtype (design, D), at column j."""
    affine, coef = job.affine, job.coef
    center, scale, shift = affine[c], affine[job.channels + c], affine[2 * job.channels + c]
    high = rounded(coef, center)
    coef[HIGH * width + j] = high
    coef[SCALE * width + j] = rounded(coef, scale)
    coef[LOW * width + j] = rounded(coef, shift - (center - high) * scale)


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
def ahead_in(length, stride, far):
    """(before, turn, after): what lies AHEAD values behind value i of a row in its channel, whose rows lie `stride` apart.

    It is `before` values further on in memory where ``i < turn``, and `after` values elsewhere.
    """
    skip, rest = AHEAD // length, AHEAD % length
    before = skip * stride + rest
    return (before, length - rest, before + stride - length) if far else (0, 0, 0)


@loop
def block_moments(job, c, b):
    """Count, mean and m2 of block b of channel c (design, C)."""
    noinline()
    first, rows, column, length = block_of(b, job.n, job.s)
    x, stride = job.x, job.channels * job.s
    before, turn, after = ahead_in(length, stride, job.run == 1)
    start = first * stride + c * job.s + column
    shift = np.float64(x[start])
    if not math.isfinite(shift):
        shift = np.float64(0.0)
    around, zero, one = splat(shift), splat(0.0), ones()
    s1, s2 = zero, zero
    rest = length % LANES
    tail = last(rest)
    for r in range(rows):
        at = start + r * stride
        i = 0
        for end, ahead in ((min(turn, length - LANES + 1), before), (length - LANES + 1, after)):
            while i < end:
                prefetch(x, at + i + ahead)
                d = widen(load(x, at + i)) - around
                s1 = fma(d, one, s1)
                s2 = fma(d, d, s2)
                i += LANES
        if rest:
            d = where(tail, widen(load(x, at + length - LANES)) - around, zero)
            s1 = fma(d, one, s1)
            s2 = fma(d, d, s2)
    count = rows * length
    sum1 = total(s1)
    mean = sum1 / count
    m2 = total(s2) - sum1 * mean
    return count, shift + mean, 0.0 if m2 < 0.0 else m2


@loop
def block_gradients(job, c, b):
    """Sums of gated dy and of dy * (x - MEAN) over block b of channel c."""
    noinline()
    first, rows, column, length = block_of(b, job.n, job.s)
    x, dy, coef, slope, signs = job.x, job.dy, job.coef, job.slope, job.signs
    channels, s = job.channels, job.s
    stride = channels * s
    before, turn, after = ahead_in(length, stride, job.run == 1)
    high, scale = splat(coef[HIGH * channels + c]), splat(coef[SCALE * channels + c])
    low, around = splat(coef[LOW * channels + c]), widen(splat(coef[MEAN * channels + c]))
    sum_dy, dot, one = splat(0.0), splat(0.0), ones()
    words = (s + LANES - 1) // LANES
    rest = length % LANES
    tail = last(rest)
    for row in range(first, first + rows):
        word = (row * channels + c) * words + column // LANES
        at = row * stride + c * s + column
        i = 0
        for end, ahead in ((min(turn, length - LANES + 1), before), (length - LANES + 1, after)):
            if slope == 1.0:
                while i < end:
                    prefetch(x, at + i + ahead)
                    prefetch(dy, at + i + ahead)
                    g = widen(load(dy, at + i))
                    sum_dy = fma(g, one, sum_dy)
                    dot = fma(g, widen(load(x, at + i)) - around, dot)
                    i += LANES
            else:
                while i < end:
                    prefetch(x, at + i + ahead)
                    prefetch(dy, at + i + ahead)
                    value = load(x, at + i)
                    g = widen(gated(load(dy, at + i), value, high, scale, low, slope, signs, word + i // LANES))
                    sum_dy = fma(g, one, sum_dy)
                    dot = fma(g, widen(value) - around, dot)
                    i += LANES
        if rest:
            value = load(x, at + length - LANES)
            g = gated(load(dy, at + length - LANES), value, high, scale, low, slope, signs, word + length // LANES)
            g = widen(where(tail, g, like(g, 0.0)))
            sum_dy = fma(g, one, sum_dy)
            dot = fma(g, widen(value) - around, dot)
    return total(sum_dy), total(dot)


@point
def apply_row(job, at, length, c, word):
    """Output of the `length` values of channel c from `at` on (design, E and F)."""
    x, residual, y, coef, slope, signs = job.x, job.residual, job.y, job.coef, job.slope, job.signs
    channels, ahead = job.channels, job.ahead
    high, scale = splat(coef[HIGH * channels + c]), splat(coef[SCALE * channels + c])
    low = splat(coef[LOW * channels + c])
    zero = like(high, 0.0)
    end = length - LANES
    i = to_line(y, at) if job.streaming else 0
    streaming = job.streaming and not (present(signs) and i > 0)
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
def gradient_row(job, at, length, c, word):
    """dx, and dresidual if wanted, of the `length` values of channel c from `at` on."""
    x, dy, dx, dresidual = job.x, job.dy, job.dx, job.dresidual
    coef, slope, signs, training = job.coef, job.slope, job.signs, job.training
    channels, ahead = job.channels, job.ahead
    high, scale = splat(coef[HIGH * channels + c]), splat(coef[SCALE * channels + c])
    low, mean = splat(coef[LOW * channels + c]), splat(coef[MEAN * channels + c])
    a, b = splat(coef[A * channels + c]), splat(coef[B * channels + c])
    end = length - LANES
    i = to_line(dx, at) if job.streaming else 0
    streaming = job.streaming and not (present(signs) and i > 0)
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
def apply_block(job, c0, c1, first, rows, column, length, backward):
    """Output, or dx and dresidual, of a block of channels c0 to c1."""
    noinline()
    channels, s = job.channels, job.s
    words = (s + LANES - 1) // LANES
    for row in range(first, first + rows):
        for c in range(c0, c1):
            at = (row * channels + c) * s + column
            word = (row * channels + c) * words + column // LANES
            if backward:
                gradient_row(job, at, length, c, word)
            else:
                apply_row(job, at, length, c, word)


@point
def spread_of(job):
    """Channels of a span: as many as lie in a block's length."""
    return 1 if job.s > BLOCK else max(job.run, BLOCK // job.s)


@point
def span_of(job, t):
    """(c0, c1, first, rows, column, length) of span t of the whole tensor, in the order of memory."""
    spread = spread_of(job)
    spans = (job.channels + spread - 1) // spread
    c0 = t % spans * spread
    first, rows, column, length = block_of(t // spans, job.n, job.s) if job.s > BLOCK else (t // spans, 1, 0, job.s)
    return c0, min(c0 + spread, job.channels), first, rows, column, length


# --- column nest --------------------------------------------------------------------------------------------------
# Memory is seen as rows of `columns` values, worked on in chunks of columns whose sums stay in L1. Those that fill no
# row are a last one, padded with zeros; its values have a part each, of count 1.


@point
def chunks_of(columns):
    """Number of chunks of a row; the last takes the rest."""
    return max(1, columns // CHUNK)


@point
def chunk_of(job, t):
    """(first row, last row + 1, first column, last column + 1, sums, sums) of task t over blocks and chunks."""
    columns, chunks = job.columns, chunks_of(job.columns)
    b, q = t // chunks, t % chunks
    j0 = q * CHUNK
    part = ahead_of(job.part, 2 * b * columns)
    end = j0 + CHUNK if q < chunks - 1 else columns
    return b * job.block, min((b + 1) * job.block, job.rows), j0, end, part, ahead_of(part, columns)


@loop
def column_moments(job, t):
    """Mean and m2 of every column of a chunk of a block of rows (design, C), into `part` (blocks, 2, columns)."""
    noinline()
    first, end, j0, j1, s1, s2 = chunk_of(job, t)
    x, columns = job.x, job.columns
    for j in range(j0, j1):
        s1[j] = s2[j] = 0.0
    zero, one = splat(0.0), ones()
    tail = last((j1 - j0) % LANES)
    for row in range(first, end, DEPTH):
        for j in range(j0, j1, LANES):
            k = min(j, j1 - LANES)
            shift = widen(load(x, first * columns + k))
            shift = where(finite(shift), shift, zero)
            sum1, sum2 = load(s1, k), load(s2, k)
            for r in range(row, min(row + DEPTH, end)):
                prefetch(x, r * columns + k + AHEAD)
                d = widen(load(x, r * columns + k)) - shift
                if k < j:
                    d = where(tail, d, zero)
                sum1 = fma(d, one, sum1)
                sum2 = fma(d, d, sum2)
            store(s1, k, sum1)
            store(s2, k, sum2)
    for j in range(j0, j1):
        shift = np.float64(x[first * columns + j])
        mean = s1[j] / (end - first)
        m2 = s2[j] - s1[j] * mean
        s1[j] = mean + (shift if math.isfinite(shift) else 0.0)
        s2[j] = 0.0 if m2 < 0.0 else m2


@loop
def column_gradients(job, t):
    """Sums of gated dy and of dy * (x - MEAN) of every column of a chunk, into `part` (blocks, 2, columns)."""
    noinline()
    first, end, j0, j1, s1, s2 = chunk_of(job, t)
    x, dy, coef, slope, signs, columns = job.x, job.dy, job.coef, job.slope, job.signs, job.columns
    for j in range(j0, j1):
        s1[j] = s2[j] = 0.0
    words = (columns + LANES - 1) // LANES
    one = ones()
    tail = last((j1 - j0) % LANES)
    for row in range(first, end, DEPTH):
        for j in range(j0, j1, LANES):
            k = min(j, j1 - LANES)
            high, scale = load(coef, HIGH * columns + k), load(coef, SCALE * columns + k)
            low, around = load(coef, LOW * columns + k), widen(load(coef, MEAN * columns + k))
            sum_dy, dot = load(s1, k), load(s2, k)
            for r in range(row, min(row + DEPTH, end)):
                prefetch(x, r * columns + k + AHEAD)
                prefetch(dy, r * columns + k + AHEAD)
                value = load(x, r * columns + k)
                g = gated(load(dy, r * columns + k), value, high, scale, low, slope, signs, r * words + j // LANES)
                if k < j:
                    g = where(tail, g, like(g, 0.0))
                sum_dy = fma(widen(g), one, sum_dy)
                dot = fma(widen(g), widen(value) - around, dot)
            store(s1, k, sum_dy)
            store(s2, k, dot)


@point
def apply_columns(job, row):
    """Output of a row (design, E)."""
    x, residual, y, coef, slope, signs = job.x, job.residual, job.y, job.coef, job.slope, job.signs
    columns, streaming = job.columns, job.streaming
    end, at, word = columns - LANES, row * columns, row * ((columns + LANES - 1) // LANES)
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
        put(y, at + k, z, streaming)


@point
def gradient_columns(job, row):
    """dx, and dresidual if wanted, of a row."""
    x, dy, dx, dresidual = job.x, job.dy, job.dx, job.dresidual
    coef, slope, signs, training = job.coef, job.slope, job.signs, job.training
    columns, streaming = job.columns, job.streaming
    end, at, word = columns - LANES, row * columns, row * ((columns + LANES - 1) // LANES)
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
        put(dx, at + k, gradient(g, value, training, scale, mean, a, b), streaming)
        if present(dresidual):
            put(dresidual, at + k, g, streaming)


@point
def group_of(columns):
    """Rows of a task."""
    return max(1, GROUP // columns)


@loop
def apply_group(job, t, backward):
    """Output, or dx and dresidual, of the t-th group of rows."""
    noinline()
    for row in range(t * group_of(job.columns), min((t + 1) * group_of(job.columns), job.rows)):
        if backward:
            gradient_columns(job, row)
        else:
            apply_columns(job, row)


# --- phases -------------------------------------------------------------------------------------------------------


@point
def fused_moments(job, c):
    """Statistics and coefficients of channel c, all its blocks."""
    count, mean, m2 = np.intp(0), 0.0, 0.0
    for b in range(job.blocks):
        size, block_mean, block_m2 = apart(block_moments, (job, c, b))
        mean, m2 = merge(count, mean, m2, size, block_mean, block_m2)
        count += size
    finish_statistics(job, c, mean, m2)
    round_affine(job, c, job.channels, c)


@point
def fused_gradients(job, c):
    """Gradients of weight and bias and coefficients of channel c, all its blocks."""
    sum_dy, dot = 0.0, 0.0
    for b in range(job.blocks):
        block_dy, block_dot = apart(block_gradients, (job, c, b))
        sum_dy += block_dy
        dot += block_dot
    finish_gradient(job, c, sum_dy, dot)
    round_gradient(job, c, job.channels, c)


@point
def can_stream(job):
    """In place the lines are in the cache already; in the column nest rows must begin on a line."""
    out = job.y if present(job.y) else job.dx
    if same(out, job.x) or same(out, job.residual) or same(out, job.dy):
        return False
    return not (job.columns and (to_line(out, 0) or to_line(job.dresidual, 0)))


@loop
def task(job, backward, phase, t):
    """Task t of a phase."""
    noinline()
    if phase == FUSED:
        c0 = t * job.run
        c1 = min(c0 + job.run, job.channels)
        for c in range(c0, c1):
            if backward:
                fused_gradients(job, c)
            else:
                fused_moments(job, c)
        for b in range(job.blocks - 1, -1, -1):  # backwards: the last ones are still in the nearest cache
            first, height, column, length = block_of(b, job.n, job.s)
            apart(apply_block, (job, c0, c1, first, height, column, length, backward))
    elif phase == REDUCE:
        c, b = t // job.blocks, t % job.blocks
        at = 2 * b * job.channels + c
        if backward:
            job.part[at], job.part[at + job.channels] = apart(block_gradients, (job, c, b))
        else:
            _, job.part[at], job.part[at + job.channels] = apart(block_moments, (job, c, b))
    elif phase == APPLY:
        c0, c1, first, height, column, length = span_of(job, t)
        apart(apply_block, (job, c0, c1, first, height, column, length, backward))
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
    tasks = (job.channels + job.run - 1) // job.run
    if phase == REDUCE:
        tasks = job.blocks * job.channels
    elif phase == APPLY:
        tasks = (job.blocks if job.s > BLOCK else job.n) * ((job.channels + spread_of(job) - 1) // spread_of(job))
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
    apply = phase in (APPLY, APPLY_COLUMNS)
    c, k = np.intp(0), 0
    for j in range(width):
        if backward != apply:
            round_affine(job, j, width, c)
        if backward:
            if apply:
                round_gradient(job, j, width, c)
            else:
                job.coef[MEAN * width + j] = rounded(job.coef, job.stats[c])
        k += 1
        if k == length:
            c, k = c + 1, 0
        if c == job.channels:
            c -= job.channels


@point
def size_of(job, b):
    """Number of values behind part b of a channel or column; one in the part of the values that fill no row."""
    if job.columns:
        return min(job.block, job.rows - b * job.block) if b < job.blocks else 1
    _, height, _, length = block_of(b, job.n, job.s)
    return height * length


@loop
def finish(job, backward, apply):
    """What comes after a reduction: the parts of every channel together, in order, and what follows if it is wanted."""
    noinline()
    part, channels = job.part, job.channels
    width, length = (job.columns, job.s) if job.columns else (channels, 1)
    rest = job.n * channels * job.s - job.rows * job.columns if job.columns else 0
    for c in range(channels):
        count, first, second = np.intp(0), 0.0, 0.0  # mean and m2, or sums of dy and dy * (x - MEAN)
        for begin in range(c * length, width, channels * length):
            for j in range(begin, begin + length):
                for b in range(job.blocks + (1 if j < rest else 0)):
                    at = 2 * b * width + j
                    if backward:
                        first += part[at]
                        second += part[at + width]
                    else:
                        first, second = merge(count, first, second, size_of(job, b), part[at], part[at + width])
                        count += size_of(job, b)
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
    row.x = padded(job, job.x, scratch(coef))
    row.dy = padded(job, job.dy, scratch(coef))
    if present(job.signs):
        row.signs = ahead_of(job.signs, job.rows * ((columns + LANES - 1) // LANES))
    if phase == APPLY_COLUMNS:
        row.residual = padded(job, job.residual, scratch(coef))
        row.y, row.dx = padded(job, job.y, scratch(coef)), padded(job, job.dx, scratch(coef))
        row.dresidual = padded(job, job.dresidual, scratch(coef))
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


link = linking(task, block_moments, block_gradients, column_moments, column_gradients, apply_block, apply_group)


def _kernel(
    backward, reduce, apply, threads, split, streaming, run, columns, rows, block, blocks, ahead, n, channels, s,
    training, eps, slope, x, residual, dy, y, dx, dresidual, coef, signs, stats, affine, grads, part,
):  # fmt: skip
    """Reduction (statistics, or sums of gradients) and output, or one of them; `affine` has weight and bias before.

    Sums of gradients alone become the first two rows of `grads`; the output alone takes A and B from the last two.
    """
    job = make_job((
        n, channels, s, run, columns, rows, block, blocks, ahead, streaming, training, eps, slope,
        x, residual, dy, y, dx, dresidual, coef, signs, stats, affine, grads, part,
    ))  # fmt: skip
    link(job)
    if streaming:
        job.streaming = can_stream(job)
    last = columns and rows * columns < n * channels * s
    if backward and not reduce:
        prepare(job, backward, REDUCE)  # for the output too
    fused = reduce and apply and not split
    for step in range(0 if reduce else 1, 2 if apply and not fused else 1):
        if step == 0:
            phase = FUSED if fused else (REDUCE_COLUMNS if columns else REDUCE)
        else:
            phase = APPLY_COLUMNS if columns else APPLY
        if backward or step:
            prepare(job, backward, phase)
        tasks = tasks_of(job, phase)
        if threads == 1:
            for t in range(tasks):
                apart(task, (job, backward, phase, tasks - 1 - t if step else t))
        else:
            before = team(threads)
            for t in prange(tasks):
                apart(task, (job, backward, phase, tasks - 1 - np.intp(t) if step else np.intp(t)))
            team(before)
        if last:
            last_row(job, backward, phase)
        if step == 0 and not fused:
            finish(job, backward, apply)


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

THREADS = {"kernel": 3}  # the kernels with parallel loops, and which argument says on how many threads
_SOURCE = digest_of((sys.modules[__name__], _vectors, _job, _plan))  # all that the kernels are compiled from
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
    given, result = array(real), array(real, 1, False)
    rows, rows_in = array(wide, 2, False), array(wide, 2)
    return {
        "kernel": (
            *(flag, flag, flag, size, flag, flag, *(size,) * 9, flag, wide, wide),
            *(given, given, given, result, result, result, result, array(types.uint16, 1, False)),
            *(rows, rows, rows, array(wide, 1, False)),
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
    signature = types.void(*_argument_types(kernel, from_dtype(real)))
    return prepared(globals()[f"_{kernel}"], f"{kernel}-{real}", _SOURCE, signature, THREADS.get(kernel))


def prepared(python: Any, name: str, source: str | None, signature: Any, threads: int | None) -> Any:
    """Compile a kernel or load it; argument `threads`, if any, says on how many threads its parallel loops run."""
    function = njit(nogil=True, error_model="numpy", parallel=threads is not None)(python)
    if source is not None:
        function._cache = Cache(name, source)
    try:
        function.compile(signature)
    except ValueError as error:
        settings = f"NUMBA_THREADING_LAYER is {config.THREADING_LAYER!r}, NUMBA_THREADING_LAYER_PRIORITY "
        settings += repr(" ".join(config.THREADING_LAYER_PRIORITY))
        raise RuntimeError(f"Numba cannot prepare the kernels ({settings}): {error}") from error
    function.disable_compile()
    return _one_at_a_time(function, threads) if threads is not None and _layer() == "workqueue" else function


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


def _threads() -> int:
    return min(_engine.get_num_threads(), int(config.NUMBA_NUM_THREADS))


def warmup() -> None:
    """Compile every kernel, or load it from the compile cache."""
    for kernel in ("kernel", "fold", "update_running"):
        for dtype in EMPTY:
            _compiled(kernel, dtype)


def _image_kernel_of(dtype: np.dtype[Any]) -> Any:
    from fastbn.backends import _numba_images

    return _numba_images.kernel_of(dtype)


_operations = Operations(functools.partial(_compiled, "kernel"), _threads, lambda _: LANES, _image_kernel_of)
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
