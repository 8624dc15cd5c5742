"""The column nest: sums of every column, for channels last, (N, C) and short rows.

Memory is seen as rows of `columns` values, summed in chunks of columns whose sums stay in L1. Those that fill no row
are a last one, padded with zeros, with a part of its own. The columns of a channel share a shift, its first value in a
block, so that their sums add up: 64 channels in 256 columns were 192 merges, a third of the time of (32, 64).

A chunk's rows are `width` columns, the first at `at` and each `stride` behind the one before it; coefficients lie in
rows of `pitch`. Sums have room for whole vectors.
"""

from __future__ import annotations

from fastbn.backends._numba.channels import HIGH, LOW, MEAN, SCALE, greater, lesser
from fastbn.backends._numba.compiler import INDEX, part, point
from fastbn.backends._numba.points import ANY, PLAIN, RELU, SIGNED, kind_to_sum, slope_of, wide_gated
from fastbn.backends._numba.vectors import (
    ahead_of,
    alias,
    finite,
    fma,
    given,
    load,
    ones,
    prefetch,
    rolled,
    scratch,
    splat,
    store,
    where,
    widen,
)
from fastbn.backends._plan import AHEAD, LANES

CHUNK = 1024  # columns whose sums stay in L1 (32x14x14x1024 channels last, backward: 512 4.0 copies, 1024 3.0)
COLUMN_STREAMS = 8  # rows read at a time, four of each of two arrays (32x1024x14x14, backward: 16 4.0 copies, 8 3.2)
WIDEST = 2 * CHUNK + LANES  # room for the sums of a chunk


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
