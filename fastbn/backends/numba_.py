"""The kernels in Numba.

Design
------
A. `_plan` says how a tensor is cut; this file computes. Its parts, in order: channel arithmetic (scalars), points (one
   vector), the row nest, columns, output, the column nest, phases, kernels. `fastbn_ext` has the same parts under the
   same names.
B. Inner loops are written with the vectors of `_vectors`; there is no fastmath, so every sum has one order and every
   result is bitwise reproducible. One subtraction and one fused multiply-add a value is all that a normalisation costs.
C. Statistics of a block are sums of deviations from `shift`, one of the block's own values, in float64. Its distance
   from the mean is at most sqrt(m2), so ``m2 = s2 - s1**2 / count`` loses at most log2(count) of 53 bits whatever the
   mean is, and a constant block gives exactly mean = shift, m2 = 0. There is no second pass and no division inside.
D. ``y = (x - high) * scale + low``: `high` is the mean rounded to x's dtype, so that the difference is exact where x is
   near the mean; `low` carries the bias and the mean's rounding error.
E. What is left of a row behind its last whole vector is loaded and stored by lanes. A vector that overlaps the one
   before it would touch a line that has just been streamed, which is read again from memory then, even where none of
   its lanes are stored (ns for 16 values on a thread: 32x64x55x55, training 7.2 to 5.3; 64x300x15x15 8.4 to 4.7).
F. Streamed output goes in whole lines; what lies before the first and behind the last of a row is stored by lanes. A
   stage in L1, which would let rows share lines, was tried: 1.25 copies for inference where this costs 1.0, because
   reads and writes no longer overlap.
G. Several rows are read at a time: one stream after the other leaves memory idle. Of channels it is `STREAMS`, whose
   sums stay in registers, and what is `AHEAD` of them is prefetched (32x256x56x56, Zen 3, statistics: 0.79 copies in
   one stream, 0.60 in four; sums of gradients: 1.56 and 1.17; in cache too: 8x64x56x56, training: 5.5 to 4.6 ns), in
   every line (float64, 32x64x56x56: in every other one training took 1.50 and inference 1.18 copies, now 1.38, 1.06). A
   row that is left over is four streams by itself (1x64x56x56, training: 6.1 to 5.0, backward 7.6 to 7.0 ns). Of
   rows of columns it is `COLUMN_STREAMS` (56x56x64 channels last, statistics: 0.7 copies in one stream, 0.53 in eight;
   sums of gradients: 1.5 and 1.05), an odd number of rows apart: whole pages apart, they would share their places in
   the nearest cache (Zen 4, ns for 16 values on a thread: 4096x256, training 4.35 to 4.2, backward 5.9 to 5.5).
   Prefetching helps sums of gradients from memory (65536x256, backward 12.3 to 11.6), and costs elsewhere.
H. The kernel is one or two phases, and a phase a loop over independent tasks: the only place with threads. To spare the
   compiler, one kernel serves all operations, its arguments are a `Job`, and each `part` is compiled by itself.
I. A run's output goes backwards, row by row, after its reduction: what was read last is still in the nearest cache.
   Split work goes forward: what the third-level cache might still have gains less than order does (65536x256, training:
   backwards 2.2 copies, forward 1.85; backward pass: 3.7 and 3.3).
   Meanwhile the same row of the next run is asked for where data come from memory, which would only be written to: it
   reads and writes at the same time (Zen 4, ns for 16 values on a thread: 32x512x28x28, training 7.6 to 6.5, backward
   11.8 to 10.5; 32x256x56x56, 5.7 to 5.2 and 9.6 to 8.4; 32x64x112x112, of which a channel does not fit the
   second-level cache, nothing; into the nearest cache too it costs up to 15 %). One channel's output in the same loop
   as the sums of the next was tried (Zen 3): 0 to 11 % less, and a second form of both loops. So was asking for the
   output's lines while sums are made, in the cache (Zen 4): nothing.
J. Sums grow by fused multiply-adds by one, and values become float64 as they are loaded: on Zen, additions share their
   units with conversions (Zen 3, sums of 16 values in cache: 1.96 to 1.35 ns, of gradients 4.4 to 1.97). A ReLU closes
   behind the conversion, which AVX-512 does in the same instruction (Zen 4, in cache, 8x64x56x56, sums of gradients 3.3
   to 2.7 ns, in C 3.5 to 2.6; 4096x64, 4.8 to 3.6, 4.4 to 3.7). A threshold of x for every channel was tried, compared
   in float64 without the output's arithmetic: 2.2 as long as it need not change sides, else 2.6, and a search for it.
K. Coefficients stay in registers: rows of neighbouring channels are written as one, and a vector that two of them
   share takes lanes from both. They were loaded for every column (inference in cache: 32x256x13x13 4.5 to 2.2 ns for 16
   values on a thread, 8x64x56x56 3.2 to 2.1), and sums kept for every column of short rows (training 8.2 to 5.5 ns).
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
from numba.core.registry import cpu_target
from numba.np.numpy_support import from_dtype

from fastbn._arrays import FLOATS
from fastbn.backends import _buffers, _compiler, _job, _plan, _vectors
from fastbn.backends._buffers import Buffer, entry_of
from fastbn.backends._cache import Cache, digest_of, file_name, folders, writable_folder
from fastbn.backends._compiler import PARTS, loop, part, point
from fastbn.backends._job import ARGUMENTS, Job, apart, copy_of, make_job
from fastbn.backends._operations import Operations
from fastbn.backends._parts import Parts
from fastbn.backends._plan import AHEAD, BLOCK, LANES, LONGEST_FOLD, PIECE, ROOM, ROW, SLAB, STREAMS, Plan
from fastbn.backends._vectors import (
    ahead_of,
    alias,
    bits,
    fence,
    finite,
    fma,
    foremost,
    freed,
    given,
    last,
    like,
    load,
    load_where,
    mask_of,
    noinline,
    ones,
    positive,
    prefetch,
    prefetch_later,
    prefetch_part,
    present,
    put,
    relax,
    rolled,
    rounded,
    same,
    scaled,
    scratch,
    seen_as,
    splat,
    store,
    store_where,
    taken,
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
# What is written: y, dx or dresidual. Kinds: of x and dy alone, with a ReLU, with that and its signs, or with anything.
OUTPUT, GRADIENT, RESIDUAL = map(np.intp, range(3))
PLAIN, RELU, SIGNED, ANY = map(np.intp, range(4))
# Whether memory is seen as rows of channels or of columns.
CHANNELS, COLUMNS = map(np.intp, range(2))
# Phases.
FUSED, REDUCE, APPLY, REDUCE_COLUMNS, APPLY_COLUMNS = map(np.intp, range(5))
INDEX, FLAG = types.intp, types.boolean  # arguments of parts
ZERO, ONE = map(np.intp, range(2))  # as arguments: functions are compiled once more for literal ones

CHUNK = 1024  # columns whose sums stay in L1 (32x14x14x1024 channels last, backward: 512 4.0 copies, 1024 3.0)
COLUMN_STREAMS = 8  # rows of one array or two read at a time (32x1024x14x14, backward: 16 4.0 copies, 8 3.2)
GROUP = 1 << 14  # values of a task of the column nest
PATIENCE = 1 << 14  # pauses that a thread waits for its turn at most, some hundred microseconds
TOGETHER = 64  # channels finished at a time, in loops that become vectors (32x2048, training: 30 to 17 us)
WIDEST = 2 * CHUNK + LANES  # room for the sums of a chunk
MOST_CHANNELS = SLAB // ROW  # of a run
SUMS = MOST_CHANNELS * LANES  # room for a vector of sums each


@point
def lesser(a, b):
    """The smaller of two numbers. Numba's `min` is a function that `_compiler` cannot tell what registers to use."""
    return a if a < b else b


@point
def greater(a, b):
    """The larger of two numbers."""
    return a if a > b else b


# --- channel arithmetic -------------------------------------------------------------------------------------------


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


# --- points: one vector -------------------------------------------------------------------------------------------


@point
def slope_of(job, kind):
    """Slope of the activation, as far as it is known when this is compiled."""
    return 1.0 if kind == PLAIN else (job.slope if kind == ANY else 0.0)


@point
def kind_to_sum(job):
    """Kind of the sums of gradients."""
    if job.slope == 1.0:
        return PLAIN
    if job.slope != 0.0:
        return ANY
    return SIGNED if present(job.signs) else RELU


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
def mask_at(signs, word, bit):
    """Signs of the vector whose first one is so many bits behind the first of a word."""
    return mask_of(np.uint16((np.uint32(signs[word]) | np.uint32(signs[word + 1]) << LANES) >> bit))


@point
def signs_of(x, high, scale, low):
    """Signs without a residual, computed again exactly as in `output`."""
    return positive(fma(x - high, scale, low))


@point
def gated(dy, x, high, scale, low, slope, signs, word, bit):
    """dy behind an activation, whose sign is read or computed again."""
    if present(signs):
        dy = activated(dy, mask_at(signs, word, bit), slope)
    else:
        dy = activated(dy, signs_of(x, high, scale, low), slope)
    return dy


@point
def wide_gated(dy, x, at, high, scale, low, slope, signs, word, bit, kind):
    """`gated` as W, from ``x[at]`` and ``dy[at]`` on; a ReLU chooses what becomes float64 as it is loaded: see J."""
    if kind == PLAIN:
        return widen(load(dy, at))
    if kind == ANY:
        return widen(gated(load(dy, at), load(x, at), high, scale, low, slope, signs, word, bit))
    opened = mask_at(signs, word, bit) if kind == SIGNED else signs_of(load(x, at), high, scale, low)
    return where(opened, widen(load(dy, at)), splat(0.0))


@point
def gradient(dy, x, training, scale, mean, a, b):
    """dx of a gated dy."""
    return fma(scale, dy, fma(a, x - mean, b)) if training else scale * dy


# --- row nest -----------------------------------------------------------------------------------------------------
# A run is channels c0 to c1, whose rows lie side by side. A block is `rows` rows of `length` values of a channel, the
# first one at sample `first`, from `column` on.


@point
def pieces_of(s, piece):
    """Pieces of so many values that a row is cut into; the last takes the rest: none is shorter than a vector."""
    return greater(1, s // piece)


@point
def blocks_of(n, s, height, piece):
    """Number of blocks of a channel, of so many rows of a piece."""
    return (n + height - 1) // height * pieces_of(s, piece)


@point
def block_of(b, n, s, height, piece):
    """(first, rows, column, length) of block b."""
    pieces = pieces_of(s, piece)
    first, p = b // pieces * height, b % pieces
    return first, lesser(height, n - first), p * piece, (piece if p < pieces - 1 else s - p * piece)


@point
def block_to_reduce(job, b):
    """(first, rows, column, length) of block b of a reduction: whole bundles of streams."""
    height = greater(1, (BLOCK // job.s + STREAMS - 1) // STREAMS) * STREAMS
    return block_of(b, job.n, job.s, height, PIECE)


@point
def runs_of(job, run):
    """Number of runs of so many neighbouring channels."""
    return (job.channels + run - 1) // run


@point
def run_of(job, t, run):
    """Channels c0 to c1 of run t."""
    return t * run, lesser(t * run + run, job.channels)


@point
def slab_of(job, c0, first):
    """(at, stride, word, words) of the rows of a run from sample `first` on.

    They begin at `at`, `stride` apart; their signs begin at `word`, `words` apart. With signs, all runs but the last
    are of one width.
    """
    stride, slab = job.channels * job.s, (job.run * job.s + LANES - 1) // LANES
    words = runs_of(job, job.run) * slab
    return first * stride + c0 * job.s, stride, first * words + c0 // job.run * slab, words


@point
def shift_of(x, i):
    """x[i], or zero where it is not finite."""
    return np.float64(x[i]) if math.isfinite(x[i]) else np.float64(0.0)


@point
def gathered(x, at, stride, streams, rest):
    """V of one value of each of so many rows, and `rest` in the lanes left."""
    row = scratch(x, LANES)
    store(row, 0, splat(rest))
    for r in range(streams):
        row[r] = x[at + r * stride]
    return load(row, 0)


@point
def gathered_mask(signs, word, words, streams, bit):
    """M of one sign of each of so many rows."""
    gathered_bits = 0
    for r in range(streams):
        gathered_bits |= (signs[word + r * words] >> bit & 1) << r
    return mask_of(np.uint16(gathered_bits))


@point
def quarter_of(length):
    """Values of a quarter, of whole vectors: a row that no others are left to be read with has a stream in each."""
    return length // STREAMS // LANES * LANES


@point
def ahead_in(job, c0, c1, c, row, column, length):
    """(turn, after): how far away value i of a row of channel c has what is AHEAD of it.

    It is AHEAD where ``i < turn``, and `after` elsewhere; rows are read STREAMS at a time, from `row` on. Behind the
    last channel of a run it is in the next rows.
    """
    if c < c1 - 1 or column + length < job.s:
        return length, AHEAD
    after = (STREAMS * job.channels - c1 + c0) * job.s + AHEAD
    return length - AHEAD, (after if row + STREAMS < job.n else 0)


@point
def row_moments(job, c, rows, streams, length, far, shift, s1, s2, kind):
    """Add so many rows of channel c at a time to the sums of x - shift and of its square.

    Their number is known when this is compiled: where it was not, sums went through the stack (of gradients in cache:
    10.2 ns for 16 values, 5.3 so). There is but one `kind`.
    """
    x, around, zero, one = job.x, splat(shift), splat(0.0), ones()
    begin, stride, whole = rows[0], rows[1], length - length % LANES
    i = 0
    for stop, ahead in ((lesser(far[0], whole), AHEAD), (whole, far[1])):
        while i < stop:
            at = begin + i
            for _ in range(streams):
                prefetch(x, at + ahead)
                d = widen(load(x, at)) - around
                s1 = fma(d, one, s1)
                s2 = fma(d, d, s2)
                at += stride
            i += LANES
    if i == length - 1:  # as odd squares leave it (32x1280x7x7: 4.5 ns for 16 values with a vector a row, 3.5 so)
        d = widen(gathered(x, begin + i, stride, streams, rounded(x, shift))) - around
        s1 = fma(d, one, s1)
        s2 = fma(d, d, s2)
    elif i < length:
        tail, at = last(length - i), begin + length - LANES
        for _ in range(streams):
            d = where(tail, widen(load(x, at)) - around, zero)
            s1 = fma(d, one, s1)
            s2 = fma(d, d, s2)
            at += stride
    return s1, s2


@point
def row_gradients(job, c, rows, streams, length, far, mean, sum_dy, dot, kind):
    """Add so many rows of channel c at a time to the sums of gated dy and of dy * (x - mean).

    `kind` is known when this is compiled: where it was not, all that any kind needs was made ready for each of the
    short rows (32x32x7x7, in cache: 4.4 ns for 16 values, 3.5 so; with a ReLU 8.1 and 6.1).
    """
    x, dy, coef, channels, one = job.x, job.dy, job.coef, job.channels, ones()
    slope, signs = slope_of(job, kind), given(job.signs, kind >= SIGNED)
    high, scale = splat(coef[HIGH * channels + c]), splat(coef[SCALE * channels + c])
    low, around, again = splat(coef[LOW * channels + c]), splat(mean), x if kind == PLAIN else alias(x)  # design, J
    (begin, stride, word, bit, words), whole = rows, length - length % LANES
    i = 0
    for stop, ahead in ((lesser(far[0], whole), AHEAD), (whole, far[1])):
        while i < stop:
            at, sign = begin + i, word + i // LANES
            for _ in range(streams):
                prefetch(x, at + ahead)
                prefetch(dy, at + ahead)
                g = wide_gated(dy, x, at, high, scale, low, slope, signs, sign, bit, kind)
                sum_dy = fma(g, one, sum_dy)
                dot = fma(g, widen(load(again, at)) - around, dot)
                at += stride
                sign += words
            i += LANES
    if i == length - 1:
        nothing, bit = rounded(x, 0.0), bit + i
        value, g = gathered(x, begin + i, stride, streams, nothing), gathered(dy, begin + i, stride, streams, nothing)
        if slope != 1.0:
            if present(signs):
                opened = gathered_mask(signs, word + bit // LANES, words, streams, bit % LANES)
            else:
                opened = signs_of(value, high, scale, low)
            g = activated(g, opened, slope)
        sum_dy = fma(widen(g), one, sum_dy)
        dot = fma(widen(g), widen(value) - around, dot)
    elif i < length:
        end = length - LANES
        tail, at, sign, bit = last(length - i), begin + end, word + (bit + end) // LANES, (bit + end) % LANES
        for _ in range(streams):
            value, g = load(x, at), load(dy, at)
            if slope != 1.0:
                g = gated(g, value, high, scale, low, slope, signs, sign, bit)
            g = widen(where(tail, g, like(g, 0.0)))
            sum_dy = fma(g, one, sum_dy)
            dot = fma(g, widen(where(tail, value, like(value, mean))) - around, dot)  # 0 times infinity would be NaN
            at += stride
            sign += words
    return sum_dy, dot


@point
def sum_run(add, job, c0, c1, b, around, sums1, sums2, kind):
    """Two sums over block b for every channel of a run, as vectors, where x is taken around a value.

    `add` adds STREAMS rows of a channel at a time; or quarters of one row, and then what is left of it. They begin at a
    value of x, so many apart, and at a bit of a word of signs, so many words apart.
    """
    first, rows, column, length = block_to_reduce(job, b)
    start, stride, word, words = slab_of(job, c0, first)
    four, single, row = np.intp(STREAMS), np.intp(1), 0
    for q in range(c1 - c0):
        store(sums1, q * LANES, splat(0.0))
        store(sums2, q * LANES, splat(0.0))
    while row < rows:
        bundle = row + STREAMS <= rows
        each = length if bundle else quarter_of(length)
        distance = (stride, words) if bundle else (each, each // LANES)
        left = 0 if bundle else length - STREAMS * each
        for q in range(c1 - c0):
            j, mean = q * job.s + column, np.float64(around[q])
            at, sign = start + row * stride, word + row * words
            sum1, sum2 = load(sums1, q * LANES), load(sums2, q * LANES)
            if each:
                begin = at + j, distance[0], sign + j // LANES, j % LANES, distance[1]
                far = ahead_in(job, c0, c1, c0 + q, first + row, column, length)
                sum1, sum2 = add(job, c0 + q, begin, four, each, far, mean, sum1, sum2, kind)
            if left:
                j += length - left
                begin = at + j, stride, sign + j // LANES, j % LANES, words
                sum1, sum2 = add(job, c0 + q, begin, single, left, (left, AHEAD), mean, sum1, sum2, kind)
            store(sums1, q * LANES, sum1)
            store(sums2, q * LANES, sum2)
        row += STREAMS if bundle else 1


@part(INDEX, INDEX, INDEX)
def block_moments(job, c0, c1, b):
    """Mean and m2 of block b of a run of channels, into `part` (design, C and G)."""
    first, rows, column, length = block_to_reduce(job, b)
    start, part = slab_of(job, c0, first)[0] + column, ahead_of(job.part, 2 * b * job.channels + c0)
    s1, s2, shifts = scratch(part, SUMS), scratch(part, SUMS), scratch(job.coef, MOST_CHANNELS)
    for q in range(c1 - c0):
        shifts[q] = rounded(shifts, shift_of(job.x, start + q * job.s))
    sum_run(row_moments, job, c0, c1, b, shifts, s1, s2, PLAIN)
    for q in range(c1 - c0):
        sums = total(load(s1, q * LANES)), total(load(s2, q * LANES))
        part[q], part[q + job.channels] = moments_of(np.float64(shifts[q]), rows * length, sums[0], sums[1])


@part(INDEX, INDEX, INDEX)
def block_gradients(job, c0, c1, b):
    """Sums of gated dy and of dy * (x - MEAN) over block b of a run of channels, into `part`."""
    part, mean = ahead_of(job.part, 2 * b * job.channels + c0), ahead_of(job.coef, MEAN * job.channels + c0)
    dys, dots = scratch(part, SUMS), scratch(part, SUMS)
    kind = kind_to_sum(job)
    if kind == PLAIN:
        sum_run(row_gradients, job, c0, c1, b, mean, dys, dots, PLAIN)
    elif kind == RELU:
        sum_run(row_gradients, job, c0, c1, b, mean, dys, dots, RELU)
    elif kind == SIGNED:
        sum_run(row_gradients, job, c0, c1, b, mean, dys, dots, SIGNED)
    else:
        sum_run(row_gradients, job, c0, c1, b, mean, dys, dots, ANY)
    for q in range(c1 - c0):
        part[q], part[q + job.channels] = total(load(dys, q * LANES)), total(load(dots, q * LANES))


# --- columns ------------------------------------------------------------------------------------------------------
# Rows of `width` columns, the first at `at` and each `stride` behind the one before it, with coefficients in rows of
# `pitch` for every column. Sums have room for whole vectors.


@point
def first_of(j, width):
    """First column of the vector of sums at j: the last one overlaps the one before it."""
    return lesser(j, width - LANES)


@point
def settle(sums, width):
    """Put the sums of the last vector, which overlaps, where its columns belong."""
    rest = width % LANES
    for j in range(width - rest, width):
        sums[j] = sums[j + LANES - rest]


@point
def rows_of_stream(rows, streams):
    """Rows of each of so many streams: an odd number (design, G)."""
    most = rows // streams
    return most if most % 2 else greater(0, most - 1)


@point
def bundles_of(rows, streams):
    """Number of bundles: rows are read so many at a time, each from a stream of its own."""
    whole = rows_of_stream(rows, streams)
    return whole + (1 if whole * streams < rows else 0)


@point
def bundle_at(b, rows, streams):
    """(first row, distance to the next, rows) of bundle b.

    It has row b of every stream; what is left over is the last bundle.
    """
    whole = rows_of_stream(rows, streams)
    if b < whole:
        return b, whole, streams
    return whole * streams, 1, rows - whole * streams


@point
def sum_moments(job, at, stride, rows, width, shift, s1, s2):
    """Sums of x - shift and of its square for every column."""
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
                rolled()
                d = widen(load(x, i)) - around
                sum1 = fma(d, one, sum1)
                sum2 = fma(d, d, sum2)
                i += distance * stride
            store(s1, j, sum1)
            store(s2, j, sum2)
    settle(s1, width)
    settle(s2, width)


@point
def sum_gradients(job, at, stride, rows, width, coef, pitch, word, words, s1, s2, kind):
    """Sums of gated dy and of dy * (x - MEAN) for every column; signs of a row are `words`, the first at `word`."""
    x, dy, zero, one = job.x, job.dy, splat(0.0), ones()
    slope, signs = slope_of(job, kind), given(job.signs, kind >= SIGNED)
    again = x if kind == PLAIN else alias(x)  # values become float64 as they are loaded (design, J)
    far = job.ahead != 0  # in the cache prefetching costs
    for b in range(bundles_of(rows, COLUMN_STREAMS // 2)):
        first, distance, streams = bundle_at(b, rows, COLUMN_STREAMS // 2)
        for j in range(0, width, LANES):
            k = first_of(j, width)
            i = at + first * stride + k
            around = widen(load(coef, MEAN * pitch + k))
            sum_dy, dot = (load(s1, j), load(s2, j)) if b else (zero, zero)
            for r in range(streams if far else 0):
                prefetch(x, i + r * distance * stride + AHEAD)
                prefetch(dy, i + r * distance * stride + AHEAD)
            high, scale = load(coef, HIGH * pitch + k), load(coef, SCALE * pitch + k)
            low, sign, bit = load(coef, LOW * pitch + k), word + first * words + k // LANES, k % LANES
            for _ in range(streams):
                rolled()
                value = wide_gated(dy, x, i, high, scale, low, slope, signs, sign, bit, kind)
                sum_dy = fma(value, one, sum_dy)
                dot = fma(value, widen(load(again, i)) - around, dot)
                i += distance * stride
                sign += distance * words
            store(s1, j, sum_dy)
            store(s2, j, dot)
    settle(s1, width)
    settle(s2, width)


# --- output -------------------------------------------------------------------------------------------------------


@point
def coefs_at(coef, pitch, j, columns):
    """(HIGH, LOW, SCALE, MEAN, A, B) of a vector: of column j, or of channel j in every lane; unused ones are free."""
    if columns == COLUMNS:
        return (
            load(coef, HIGH * pitch + j), load(coef, LOW * pitch + j), load(coef, SCALE * pitch + j),
            load(coef, MEAN * pitch + j), load(coef, A * pitch + j), load(coef, B * pitch + j),
        )  # fmt: skip
    return (
        splat(coef[HIGH * pitch + j]), splat(coef[LOW * pitch + j]), splat(coef[SCALE * pitch + j]),
        splat(coef[MEAN * pitch + j]), splat(coef[A * pitch + j]), splat(coef[B * pitch + j]),
    )  # fmt: skip


@point
def joined(first, second, k):
    """Coefficients of `first` in the foremost k lanes, and of `second` in the others."""
    mask = foremost(k)
    return (
        where(mask, first[0], second[0]), where(mask, first[1], second[1]), where(mask, first[2], second[2]),
        where(mask, first[3], second[3]), where(mask, first[4], second[4]), where(mask, first[5], second[5]),
    )  # fmt: skip


@point
def value_of(x, other, coefs, slope, signs, word, training, what):
    """A vector of y, dx or dresidual, from x and the residual or dy."""
    high, low, scale, mean, a, b = coefs
    if what == OUTPUT:
        return output(x, other, high, scale, low, slope, signs, word)
    dy = gated(other, x, high, scale, low, slope, signs, word, ZERO) if slope != 1.0 else other
    return gradient(dy, x, training, scale, mean, a, b) if what == GRADIENT else dy


@point
def prefetch_onward(x, i, ahead, later):
    """Prefetch what lies `ahead`, if at all: what the next run will read first does not go to the nearest cache."""
    if ahead and later:
        prefetch_later(x, i + ahead)
    elif ahead:
        prefetch(x, i + ahead)


@point
def write_row(job, at, width, coef, pitch, length, word, ahead, beyond, fused, what, kind, columns):
    """A row of y, dx or dresidual: of columns, or of neighbouring channels of `length` values each (design, E, F, K).

    `what`, `kind` and `columns` are known when this is compiled: loops need not ask for what is not.
    """
    x, other = job.x, given(job.residual, kind == ANY) if what == OUTPUT else job.dy
    out = job.y if what == OUTPUT else (job.dx if what == GRADIENT else job.dresidual)
    slope, signs = slope_of(job, kind), given(job.signs, kind == ANY)
    training = job.training if kind == ANY else True
    nothing, end, q = like(load(x, at), -0.0), width - LANES, 0  # x + -0 is x
    i = to_line(out, at) if job.streaming else 0
    streaming = job.streaming and not (present(signs) and i > 0)
    i, edge = i if streaming else 0, width if columns == COLUMNS or what == RESIDUAL else length
    coefs = coefs_at(coef, pitch, ZERO, columns)
    if i:
        added = load(other, at) if present(other) else nothing
        z = value_of(load(x, at), added, coefs, slope, signs, word, training, what)
        store_where(out, at, foremost(i), z)
    while i <= end:
        while i <= edge - LANES:
            prefetch_onward(x, at + i, ahead, fused)
            if present(other):
                prefetch_onward(other, at + i, beyond, fused)
            if columns == COLUMNS:
                coefs = coefs_at(coef, pitch, i, columns)
            added = load(other, at + i) if present(other) else nothing
            z = value_of(load(x, at + i), added, coefs, slope, signs, word + i // LANES, training, what)
            put(out, at + i, z, streaming)
            i += LANES
        if edge < width:  # the next channel, and a vector that it shares with this one
            q += 1
            following = coefs_at(coef, pitch, q, columns)
            if i < edge:
                added, both = load(other, at + i) if present(other) else nothing, joined(coefs, following, edge - i)
                z = value_of(load(x, at + i), added, both, slope, signs, word + i // LANES, training, what)
                put(out, at + i, z, streaming)
                i += LANES
            coefs = following
            edge += length
    if i < width:  # what is left, by lanes
        rest = foremost(width - i)
        if columns == COLUMNS:
            coefs = coefs_at(coef, pitch, i, columns)
        added = load_where(other, at + i, rest) if present(other) else nothing
        z = value_of(load_where(x, at + i, rest), added, coefs, slope, signs, word + i // LANES, training, what)
        store_where(out, at + i, rest, z)


@point
def write_rows(job, at, stride, rows, width, coef, pitch, length, word, words, ahead, fused, backward, columns):
    """Output, or dx and dresidual, of rows of columns, or of channels of `length` values.

    Each row is `stride` behind the one before it, or ahead of it if that is negative; what lies `ahead` is prefetched.
    dresidual is a pass of its own: where two outputs are streamed line by line, and lie as far apart as neighbouring
    lines but for whole pages, they cost up to 6 copies (32x256x56x56; their distance is the allocator's), and 1.9 so.
    """
    simple = not (present(job.signs) or present(job.residual)) and job.training
    plain, relu = simple and job.slope == 1.0, simple and job.slope == 0.0
    beyond = stride if ahead and fused else ahead  # the residual has not been read yet
    out = job.dx if backward else job.y
    for r in range(rows):
        if job.streaming:  # a store that waits for its line holds up all behind it
            prefetch_part(out, at + width)
            if r + 1 < rows:
                prefetch_part(out, at + stride)
        if backward and present(job.dresidual):  # first: dx may lie over dy
            write_row(job, at, width, coef, pitch, length, word, ZERO, ZERO, fused, RESIDUAL, ANY, columns)
        if backward and plain:
            write_row(job, at, width, coef, pitch, length, word, ahead, ahead, fused, GRADIENT, PLAIN, columns)
        elif backward and relu:
            write_row(job, at, width, coef, pitch, length, word, ahead, ahead, fused, GRADIENT, RELU, columns)
        elif backward:
            write_row(job, at, width, coef, pitch, length, word, ahead, ahead, fused, GRADIENT, ANY, columns)
        elif plain:
            write_row(job, at, width, coef, pitch, length, word, ahead, ZERO, fused, OUTPUT, PLAIN, columns)
        elif relu:
            write_row(job, at, width, coef, pitch, length, word, ahead, ZERO, fused, OUTPUT, RELU, columns)
        else:
            write_row(job, at, width, coef, pitch, length, word, ahead, beyond, fused, OUTPUT, ANY, columns)
        at += stride
        word += words


@part(INDEX, INDEX, INDEX, INDEX, INDEX, INDEX, FLAG, FLAG)
def apply_run(job, c0, c1, first, rows, column, length, backward, fused):
    """Output, or dx and dresidual, of a block of channels c0 to c1.

    After their reduction from the last row to the first (design, I).
    """
    first, on = (first + rows - 1, -1) if fused else (first, 1)
    ahead = (c1 - c0) * job.s if fused and job.ahead else job.ahead
    at, stride, word, words = slab_of(job, c0, first)
    at, word, width, coef = at + column, word + column // LANES, (c1 - c0) * length, ahead_of(job.coef, c0)
    write_rows(
        job,
        at,
        on * stride,
        rows,
        width,
        coef,
        job.channels,
        length,
        word,
        on * words,
        ahead,
        fused,
        backward,
        CHANNELS,
    )


# --- column nest --------------------------------------------------------------------------------------------------
# Memory is seen as rows of `columns` values, summed in chunks of columns whose sums stay in L1. Those that fill no
# row are a last one, padded with zeros, with a part of its own. The columns of a channel share a shift, its first value
# in a block, so that their sums add up: 64 channels in 256 columns were 192 merges, a third of the time of (32, 64).


@point
def chunks_of(columns):
    """Number of chunks of a row; the last takes the rest."""
    return greater(1, columns // CHUNK)


@point
def chunk_of(job, t):
    """(first row, rows, first column, width, part) of task t over blocks and chunks."""
    columns, chunks = job.columns, chunks_of(job.columns)
    b, q = t // chunks, t % chunks
    first, j0 = b * job.block, q * CHUNK
    width = CHUNK if q < chunks - 1 else columns - j0
    return first, lesser(job.block, job.rows - first), j0, width, ahead_of(job.part, 2 * b * columns + j0)


@point
def shifts_of(job, row, j0, width, shifts):
    """The shifts of so many columns from j0 on, whose block begins at `row`."""
    channels, length = job.channels, job.s
    pixel, c, k = channels * length, j0 // length % channels, j0 % length
    for j in range(lesser(pixel, width)):
        shifts[j] = row[c * length]
        k += 1
        if k == length:
            c, k = c + 1, 0
        if c == channels:
            c -= channels
    for j in range(pixel, width):
        shifts[j] = shifts[j - pixel]


@part(INDEX)
def column_moments(job, t):
    """Sums of x - shift and of its square for every column of a chunk, into `part` (blocks, 2, columns)."""
    first, rows, j0, width, part = chunk_of(job, t)
    columns, at = job.columns, first * job.columns + j0
    s1, s2, shifts = scratch(part, WIDEST), scratch(part, WIDEST), scratch(job.x, WIDEST)
    if columns == job.channels:
        shifts = ahead_of(job.x, at)
    else:
        shifts_of(job, ahead_of(job.x, at - j0), j0, width, shifts)
    sum_moments(job, at, columns, rows, width, shifts, s1, s2)
    for j in range(width):
        part[j], part[j + columns] = s1[j], s2[j]


@part(INDEX)
def column_gradients(job, t):
    """Sums of gated dy and of dy * (x - MEAN) of every column of a chunk, into `part` (blocks, 2, columns)."""
    first, rows, j0, width, part = chunk_of(job, t)
    columns, words = job.columns, (job.columns + LANES - 1) // LANES
    at, word, coef = first * columns + j0, first * words + j0 // LANES, ahead_of(job.coef, j0)
    s1, s2 = scratch(part, WIDEST), scratch(part, WIDEST)
    kind = kind_to_sum(job)
    if kind == PLAIN:
        sum_gradients(job, at, columns, rows, width, coef, columns, word, words, s1, s2, PLAIN)
    elif kind == RELU:
        sum_gradients(job, at, columns, rows, width, coef, columns, word, words, s1, s2, RELU)
    elif kind == SIGNED:
        sum_gradients(job, at, columns, rows, width, coef, columns, word, words, s1, s2, SIGNED)
    else:
        sum_gradients(job, at, columns, rows, width, coef, columns, word, words, s1, s2, ANY)
    for j in range(width):
        part[j], part[j + columns] = s1[j], s2[j]


@point
def group_of(columns):
    """Rows of a task."""
    return greater(1, GROUP // columns)


@part(INDEX, FLAG)
def apply_group(job, t, backward):
    """Output, or dx and dresidual, of the t-th group of rows."""
    columns, first = job.columns, t * group_of(job.columns)
    rows, words = lesser(group_of(columns), job.rows - first), (columns + LANES - 1) // LANES
    at, word = first * columns, first * words
    write_rows(
        job, at, columns, rows, columns, job.coef, columns, ZERO, word, words, job.ahead, False, backward, COLUMNS
    )


# --- phases -------------------------------------------------------------------------------------------------------


@point
def can_stream(job):
    """In place the lines are in the cache already."""
    out = job.y if present(job.y) else job.dx
    return not (same(out, job.x) or same(out, job.residual) or same(out, job.dy))


@point
def spread_of(job):
    """Channels of a task of output alone.

    As many as have words together, with signs; else as many as lie in a block's length, in whole lines where they are
    enough (32x1280x7x7, inference: 3 to 13 % less time).
    """
    channels = BLOCK // job.s
    if job.s > BLOCK or present(job.signs):
        return job.run
    return channels if channels < LANES else channels - channels % LANES


@point
def rest_of(job):
    """Values that fill no row of the column nest: whole pixels."""
    return job.n * job.channels * job.s - job.rows * job.columns


@point
def number_of_parts(job):
    """Parts of every channel: blocks, and what fills no row."""
    return job.blocks + (1 if job.columns and rest_of(job) else 0)


@point
def size_of(job, b):
    """Number of values of a channel in part b."""
    if not job.columns:
        _, height, _, length = block_to_reduce(job, b)
        return height * length
    if b == job.blocks:
        return rest_of(job) // job.channels
    return job.columns // job.channels * lesser(job.block, job.rows - b * job.block)


@point
def sums_of(job, c0, count, b, first, second):
    """Two sums (mean and m2 in the row nest) of so many channels from c0 on in part b, their columns together."""
    width, length = width_of(job), columns_of_channel(job)
    end, pixel = rest_of(job) if job.columns and b == job.blocks else width, job.channels * length
    for k in range(count):
        first[k] = second[k] = 0.0
    for begin in range(0, end, pixel):
        for j in range(length):
            part = ahead_of(job.part, 2 * b * width + begin + c0 * length + j)
            for k in range(count):
                first[k] += part[k * length]
                second[k] += part[k * length + width]


@point
def part_of(job, c0, count, b, backward, first, second):
    """Mean and m2 of so many channels from c0 on in part b; or sums of dy and dy * (x - MEAN)."""
    sums_of(job, c0, count, b, first, second)
    if job.columns and not backward:
        size, at = size_of(job, b), lesser(b * job.block, job.rows) * job.columns + c0 * job.s
        for k in range(count):
            first[k], second[k] = moments_of(shift_of(job.x, at + k * job.s), size, first[k], second[k])


@point
def finish_together(job, c0, count, backward, apply):
    """The parts of so many channels from c0 on together, in order, and what follows from them if output is wanted."""
    first, second, low = scratch(job.stats, TOGETHER), scratch(job.stats, TOGETHER), scratch(job.stats, TOGETHER)
    one, two = scratch(job.stats, TOGETHER), scratch(job.stats, TOGETHER)
    part_of(job, c0, count, 0, backward, first, second)
    size = size_of(job, 0)
    for b in range(1, number_of_parts(job)):
        part_of(job, c0, count, b, backward, one, two)
        if backward:
            for k in range(count):
                first[k] += one[k]
                second[k] += two[k]
        else:
            merge(count, size, first, second, size_of(job, b), one, two)
        size += size_of(job, b)
    for k in range(count if backward else 0):
        low[k] = job.stats[c0 + k] - rounded(job.coef, job.stats[c0 + k])
    if apply and backward:
        finish_gradients(job, c0, count, low, first, second)
    elif apply:
        finish_statistics(job, c0, count, first, second)
    else:
        sums = ahead_of(job.grads if backward else job.stats, c0)
        for k in range(count):
            sums[k] = first[k]
            sums[job.channels + k] = second[k] - low[k] * first[k] if backward else second[k]


@part(INDEX, INDEX, FLAG, FLAG)
def finish_channels(job, c0, c1, backward, apply):
    """`finish_together` for channels c0 to c1. One alone has no loops (1x64x56x56, training and backward: 4 % less)."""
    if c1 - c0 == 1:
        finish_together(job, c0, ONE, backward, apply)
    else:
        for c in range(c0, c1, TOGETHER):
            finish_together(job, c, lesser(TOGETHER, c1 - c), backward, apply)


@point
def reduce_run(job, c0, c1, b, backward):
    """Mean and m2, or sums of gradients, of block b of channels c0 to c1, into `part` (blocks, 2, channels)."""
    if backward:
        apart(block_gradients, (job, c0, c1, b))
    else:
        apart(block_moments, (job, c0, c1, b))


@point
def take_turn(job):
    """Wait for this thread's turn to write; whether it came, for who has waited too long writes without."""
    for _ in range(PATIENCE):
        if taken(job.writing):
            return True
        relax()
    return False


@point
def end_turn(job):
    """Let the other thread write."""
    freed(job.writing)


@point
def run_at_once(job, t, backward):
    """Reduction and output of run t."""
    c0, c1 = run_of(job, t, job.run)
    for b in range(job.blocks):
        reduce_run(job, c0, c1, b, backward)
    apart(finish_channels, (job, c0, c1, backward, True))
    if backward:
        round_gradient(job, c0, c1)
    else:
        round_affine(job, c0, c1)
    turns = job.turns and job.streaming
    height = greater(1, lesser(BLOCK // job.s, job.n // 8 if turns else job.n))
    blocks = blocks_of(job.n, job.s, height, BLOCK)
    mine = turns and take_turn(job)
    for b in range(blocks - 1, -1, -1):  # the last first: it is in the nearest cache
        first, rows, column, length = block_of(b, job.n, job.s, height, BLOCK)
        apart(apply_run, (job, c0, c1, first, rows, column, length, backward, True))
        if mine and b == blocks // 8:  # the next one may begin before this one ends
            end_turn(job)


@part(FLAG, INDEX, INDEX)
def task(job, backward, phase, t):
    """Task t of a phase."""
    if phase == FUSED:
        run_at_once(job, t, backward)
    elif phase == REDUCE:
        c0, c1 = run_of(job, t // job.blocks, job.run)
        reduce_run(job, c0, c1, t % job.blocks, backward)
    elif phase == APPLY:
        runs = runs_of(job, spread_of(job))  # in the order of memory
        c0, c1 = run_of(job, t % runs, spread_of(job))
        first, height, column, length = block_of(t // runs, job.n, job.s, 1, BLOCK)
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
        tasks = blocks_of(job.n, job.s, 1, BLOCK) * runs_of(job, spread_of(job))
    elif phase == REDUCE_COLUMNS:
        tasks = job.blocks * chunks_of(job.columns)
    elif phase == APPLY_COLUMNS:
        tasks = (job.rows + group_of(job.columns) - 1) // group_of(job.columns)
    return tasks


# --- between phases -------------------------------------------------------------------------------------------------


@part(FLAG, INDEX)
def prepare(job, backward, phase):
    """What comes before a phase: coefficients for every channel or, repeated as the channels are, every column."""
    width, length, apply = width_of(job), columns_of_channel(job), phase in (APPLY, APPLY_COLUMNS)
    pixel = job.channels * length
    if backward != apply:
        round_affine(job, 0, job.channels)
    if backward and apply:
        round_gradient(job, 0, job.channels)
    for c in range(job.channels if backward and not apply else 0):
        job.coef[MEAN * width + c * length] = rounded(job.coef, job.stats[c])
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
    begin, rest = job.rows * job.columns, rest_of(job)
    for j in range(job.columns):
        row[j] = values[begin + j] if j < rest else rounded(job.coef, 0.0)
    return row


@loop
def unpadded(job, row, values):
    """Copy the values that fill no row from their padded row."""
    noinline()
    begin = job.rows * job.columns
    for j in range(rest_of(job) if present(values) else 0):
        values[begin + j] = row[j]


@part(FLAG, INDEX)
def last_row(job, backward, phase):
    """A phase of the column nest for the values that fill no row: a job of one row, and its parts are the last."""
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
    table, backward, reduce, apply, plan, training, wide, eps, slope, factor, x, residual, dy, y, dx, dresidual, signs,
    weight, bias, running_mean, running_var, norm, grads, part,
):  # fmt: skip
    """Reduction (statistics, or sums of gradients) and output, or one of them.

    A backward pass writes the gradients of weight and bias into `weight` and `bias`, and A and B into the last two rows
    of `grads`. Sums of gradients alone become its first two; the output alone takes A and B from it, or `norm` from the
    running statistics if they are given.
    """
    job = make_job(plan, (
        training, wide, eps, slope, factor, x, residual, dy, y, dx, dresidual, signs,
        weight, bias, running_mean, running_var, norm, grads, part, table,
    ))  # fmt: skip
    job.affine = ahead_of(job.stats, 3 * job.channels)
    if not present(job.part):
        job.part = scratch(job.part, ROOM)
    job.coef = seen_as(ahead_of(job.part, 2 * (job.blocks + 1) * width_of(job)), x)
    job.streaming = job.streaming and can_stream(job)
    job.writing = scratch(job.table, 1)
    job.writing[0] = 0
    columns, threads = job.columns, job.threads
    last = columns and rest_of(job)
    if backward and not reduce:
        apart(prepare, (job, backward, REDUCE))  # for the output too
    if not reduce and present(job.running_mean):
        apart(fold, (job,))
    once = reduce and apply and not job.split
    for step in range(0 if reduce else 1, 2 if apply and not once else 1):
        if step == 0:
            phase = FUSED if once else (REDUCE_COLUMNS if columns else REDUCE)
        else:
            phase = APPLY_COLUMNS if columns else APPLY
        if backward or step:
            apart(prepare, (job, backward, phase))
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
            apart(last_row, (job, backward, phase))
        if step == 0 and not once:
            apart(finish_channels, (job, ZERO, job.channels, backward, apply))


# --- adapters: what `fastbn.backends` promises ------------------------------------------------------------------------

# All that kernels are compiled from.
_SOURCE = digest_of((sys.modules[__name__], _vectors, _compiler, _buffers, _job, _plan))
_THREADS = Plan._fields.index("threads")
_kept: list[Any] = []  # functions and parts whose machine code is called: it goes with the last reference to them
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
    pointed = (Buffer(kind.dtype) if isinstance(kind, types.CPointer) else kind for kind in map(kinds.get, ARGUMENTS))
    *arguments, table = pointed
    signature = types.void(table, FLAG, FLAG, FLAG, Buffer(types.intp), *arguments)
    with _parts_of(real) as parts:
        function = prepared(_kernel, f"kernel-{real}", _SOURCE, signature, parts, parallel=True)
        parts.finish()
    _kept.append(parts)
    return functools.partial(one_at_a_time(function, lambda arguments: arguments[4][_THREADS]), parts.table)


def _parts_of(real: np.dtype[Any]) -> Parts:
    job = Job(from_dtype(real))
    functions = [(function, (job, *kinds)) for function, kinds in PARTS]
    return Parts(
        functions, lambda folder: f"import {__name__} as n; n.help_with({real.name!r}, {folder!r}, {_key()!r})"
    )


def _key() -> str:
    """What all that is compiled follows from."""
    return file_name("part", "", cpu_target.target_context.codegen(), str(_SOURCE))


def help_with(dtype: str, folder: str, key: str) -> None:
    """Compile parts of a kernel for another process, whose `_key` is this."""
    if key == _key():
        _parts_of(np.dtype(dtype)).help_with(folder)


def prepared(
    python: Any, name: str, source: str | None, signature: Any, parts: Parts | None = None, *, parallel: bool = False
) -> Any:
    """A Numba function with one signature, compiled or loaded, and with it the `parts` that it calls."""
    function = njit(nogil=True, error_model="numpy", parallel=parallel)(python)
    if source is not None:
        function._cache = Cache(name, source, parts or Parts())
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
    _kept.append(function)
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


def warmup() -> None:
    """Compile every kernel, or load it from the compile cache."""
    for dtype in FLOATS:
        _compiled(dtype)


def _image_kernel_of(dtype: np.dtype[Any]) -> Any:
    from fastbn.backends import _numba_images

    return _numba_images.kernel_of(dtype)


_operations = Operations(_compiled, _most_threads, lambda _: LANES, _image_kernel_of)
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
