"""Output: y, dx and dresidual in rows of columns, or of neighbouring channels."""

from __future__ import annotations

import numpy as np

from fastbn.backends._numba.channels import HIGH, LOW, MEAN, SCALE, A, B, greater, lesser
from fastbn.backends._numba.compiler import FLAG, INDEX, ZERO, part, point
from fastbn.backends._numba.points import ANY, PLAIN, RELU, gated, gradient, output, slope_of
from fastbn.backends._numba.rows import slab_of
from fastbn.backends._numba.vectors import (
    ahead_of,
    foremost,
    given,
    like,
    load,
    load_where,
    prefetch,
    prefetch_later,
    prefetch_part,
    present,
    put,
    splat,
    store_where,
    to_line,
    where,
)
from fastbn.backends._plan import LANES

# What is written: y, dx or dresidual; and whether memory is seen as rows of channels or of columns.
OUTPUT, GRADIENT, RESIDUAL = map(np.intp, range(3))
CHANNELS, COLUMNS = map(np.intp, range(2))

GROUP = 1 << 14  # values of a task of the column nest


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
    two = what != OUTPUT or present(other)  # inputs: of dx it is known (in cache, 32x64x13x13: 3.6 to 3.2 ns a vector)
    nothing, end, q = like(load(x, at), -0.0), width - LANES, 0  # x + -0 is x
    i = to_line(out, at) if job.streaming else 0
    streaming = job.streaming and not (present(signs) and i > 0)
    i, edge = i if streaming else 0, width if columns == COLUMNS or what == RESIDUAL else length
    coefs = coefs_at(coef, pitch, ZERO, columns)
    if i:
        added = load(other, at) if two else nothing
        z = value_of(load(x, at), added, coefs, slope, signs, word, training, what)
        store_where(out, at, foremost(i), z)
    while i <= end:
        while i <= edge - LANES:
            prefetch_onward(x, at + i, ahead, fused)
            if two:
                prefetch_onward(other, at + i, beyond, fused)
            if columns == COLUMNS:
                coefs = coefs_at(coef, pitch, i, columns)
            added = load(other, at + i) if two else nothing
            z = value_of(load(x, at + i), added, coefs, slope, signs, word + i // LANES, training, what)
            put(out, at + i, z, streaming)
            i += LANES
        if edge < width:  # the next channel, and a vector that it shares with this one
            q += 1
            following = coefs_at(coef, pitch, q, columns)
            if i < edge:
                added, both = load(other, at + i) if two else nothing, joined(coefs, following, edge - i)
                z = value_of(load(x, at + i), added, both, slope, signs, word + i // LANES, training, what)
                put(out, at + i, z, streaming)
                i += LANES
            coefs = following
            edge += length
    if i < width:  # what is left, by lanes
        rest = foremost(width - i)
        if columns == COLUMNS:
            coefs = coefs_at(coef, pitch, i, columns)
        added = load_where(other, at + i, rest) if two else nothing
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
