"""The kernel: its phases, what comes between them, and the loops that threads share."""

from __future__ import annotations

import numpy as np
from numba import prange

from fastbn.backends._numba.channels import (
    HIGH,
    MEAN,
    SCALE,
    TOGETHER,
    A,
    B,
    columns_of_channel,
    finish_gradients,
    finish_statistics,
    fold,
    greater,
    lesser,
    merge,
    moments_of,
    round_affine,
    round_gradient,
    width_of,
)
from fastbn.backends._numba.columns import chunks_of, column_gradients, column_moments
from fastbn.backends._numba.compiler import FLAG, INDEX, ONE, ZERO, loop, part, point
from fastbn.backends._numba.job import apart, copy_of, make_job
from fastbn.backends._numba.output import apply_group, apply_run, group_of
from fastbn.backends._numba.rows import (
    block_gradients,
    block_moments,
    block_of,
    block_to_reduce,
    blocks_of,
    run_of,
    runs_of,
    shift_of,
)
from fastbn.backends._numba.shares import ROOM_FOR_SHARES, deal, next_task
from fastbn.backends._numba.vectors import (
    ahead_of,
    fence,
    freed,
    noinline,
    present,
    relax,
    rounded,
    same,
    scratch,
    seen_as,
    taken,
    team,
)
from fastbn.backends._plan import BLOCK, LANES, LONGEST_FOLD, ROOM

FUSED, REDUCE, APPLY, REDUCE_COLUMNS, APPLY_COLUMNS = map(np.intp, range(5))  # phases
PATIENCE = 1 << 14  # pauses that a thread waits for its turn at most, some hundred microseconds


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


@point
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


@part(FLAG, INDEX, INDEX)
def work(job, backward, phase, k):
    """Tasks of a phase that thread k does: of its own share first."""
    t, at = next_task(job.shares, k)
    while t >= 0:
        task(job, backward, phase, t)
        t, at = next_task(job.shares, at)


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


def kernel(
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
    job.shares = scratch(job.table, ROOM_FOR_SHARES)
    columns, threads = job.columns, job.threads
    last = columns and rest_of(job)
    if backward and not reduce:
        apart(prepare, (job, backward, REDUCE))  # for the output too
    if not reduce and present(job.running_mean):
        apart(fold, (job,))
    fused = reduce and apply and not job.split
    for step in range(0 if reduce else 1, 2 if apply and not fused else 1):
        if step == 0:
            phase = FUSED if fused else (REDUCE_COLUMNS if columns else REDUCE)
        else:
            phase = APPLY_COLUMNS if columns else APPLY
        if backward or step:
            apart(prepare, (job, backward, phase))
        deal(job.shares, tasks_of(job, phase), threads)
        if threads == 1:
            apart(work, (job, backward, phase, ZERO))
        else:
            before = team(threads)
            for k in prange(threads):
                apart(work, (job, backward, phase, np.intp(k)))
            team(before)
        if last:
            apart(last_row, (job, backward, phase))
        if step == 0 and not fused:
            apart(finish_channels, (job, ZERO, job.channels, backward, apply))
