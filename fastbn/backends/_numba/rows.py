"""The row nest: sums over blocks of rows, each of one channel or of neighbouring ones.

A run is channels c0 to c1, whose rows lie side by side. A block is `rows` rows of `length` values of a channel, the
first one at sample `first`, from `column` on.
"""

from __future__ import annotations

import math

import numpy as np

from fastbn.backends._numba.channels import HIGH, LOW, MEAN, SCALE, greater, lesser, moments_of
from fastbn.backends._numba.compiler import INDEX, part, point
from fastbn.backends._numba.points import (
    ANY,
    PLAIN,
    RELU,
    SIGNED,
    activated,
    gated,
    kind_to_sum,
    signs_of,
    slope_of,
    wide_gated,
)
from fastbn.backends._numba.vectors import (
    ahead_of,
    alias,
    fma,
    given,
    last,
    like,
    load,
    mask_of,
    ones,
    prefetch,
    present,
    rounded,
    scratch,
    splat,
    store,
    total,
    where,
    widen,
)
from fastbn.backends._plan import AHEAD, BLOCK, LANES, PIECE, ROW, SLAB, STREAMS

MOST_CHANNELS = SLAB // ROW  # of a run
SUMS = MOST_CHANNELS * LANES  # room for a vector of sums each


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
def gathered_bits(signs, word, words, streams, bit):
    """One sign of each of so many rows, in one word."""
    found = 0
    for r in range(streams):
        found |= (signs[word + r * words] >> bit & 1) << r
    return np.uint16(found)


@point
def quarter_of(length):
    """Values of a quarter, of whole vectors: a row that no others are left to be read with has a stream in each."""
    return length // STREAMS // LANES * LANES


@point
def ahead_in(job, c0, c1, c, row, column, length):
    """(turn, after): how far ahead of value i of a row of channel c to prefetch.

    That is AHEAD where ``i < turn``, and `after` from there on. The next channel's values follow in memory; but behind
    the last channel of a run, a run goes on in its next STREAMS rows, which are far away, if there are any.
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
                opened = mask_of(gathered_bits(signs, word + bit // LANES, words, streams, bit % LANES))
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
