"""How a tensor (N, C, S) is cut into tasks: one policy for both compiled backends.

A. Two ways through memory. *Rows*: a channel's values lie in N rows of S, and those of neighbouring channels side by
   side. *Columns*: S is shorter than a vector (channels last is S = 1), so memory is seen as rows of `columns` values,
   a few pixels wide, whose j-th value always belongs to channel ``j // S % C``.
B. In the first a task is a run of neighbouring channels, finished while it is in cache: statistics, then output. A run
   is one long row, or as many short ones as fill a slab of some kilobytes, which costs far less than rows of 2 KiB
   (32x1280x7x7, 2 threads: training 15.3 to 8.5, backward 24.7 to 13.3 ns for 16 values on a thread). Slabs are of
   whole lines where they can be (32x256x13x13: training 6.3 to 5.7, backward 9.8 to 8.3 ns).
C. Where such tasks would leave threads idle (few channels) the work is *split*: statistics of all blocks, a merge in
   fixed order, then the output. Blocks depend on the shape alone and merge in the same order in both ways, so the
   results are bitwise the same for any number of threads.
D. Output that will not be found in cache again is *streamed* past it, so that a line need not be read before it is
   written, where that pays: always on AMD (Zen 5, 2 threads, inference of 32x64x112x112: 1.0 copies against 1.5), with
   many threads on Intel (Cascade Lake, 2 threads: 1.02 against 0.96). Where output is all there is to do, that is from
   what fills the third-level cache; behind a reduction, whose runs are read from many places, from what fills half of
   it (Zen 4, 32 MiB, ns for 16 values on a thread, streamed and not: inference of 32x2048x7x7, 26 MB, 4.9 and 2.6, of
   32x64x56x56, 51 MB, 3.8 and 4.6; training 32x576x14x14, 29 MB, 5.9 and 7.2; both are alike at 35 and 20 MB).
E. A pass that only makes output *prefetches* its input from memory (2 threads, inference, ns for 16 values on a thread:
   32x512x28x28 on Zen 3 6.3 to 5.0, 32x256x56x56 on Zen 4 3.7 to 3.3), into all caches: without the nearest it takes
   longer than not at all (4.4). So does the output of split work. Output that follows its run's reduction has its input
   in the cache, and prefetches what the next run will read. Within the cache nothing is prefetched: it only costs.
F. Two threads that stream behind a reduction whose input the third-level cache has take *turns*: one writes while the
   other reads. A Zen 4 die writes to memory as fast from one core as from all (28 GB/s: 2.3 ns for 16 values in one
   thread, 4.6 each in two), but two that begin together also read together, and nothing is written meanwhile (ns for 16
   values on a thread: training 32x2048x7x7 6.5 to 5.5, 32x1024x14x14 6.1 to 5.5; backward 8x64x56x56 6.4 to 5.2,
   32x1280x7x7 7.7 to 6.2; beyond that cache, where reading takes longer and the next run's input is asked for, backward
   passes gain nothing). For a while at times, the same two threads write at twice that rate, probably from two dies;
   turns then cost a tenth.
G. Whether D to F pay depends on the hour: on the neighbours of a third-level cache, and on where two threads run. So
   calls beyond the cache have several plans, and which is the fastest is tried out: `_trials`.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbn._engine import cache_bytes, is_intel

LANES = 16  # values in a vector: one AVX-512 register of float32
BLOCK = 1 << 14  # values that a block of the row nest has about: its sums are plain, blocks merge by Chan's formula
COLUMN_BLOCK = 1 << 18  # values of a block of rows in the column nest at most, and BLOCK of a channel
SERIAL = 1 << 15  # values below which a second thread costs more than it saves
SLAB = 1600  # values that a slab is wide, or up to twice as many where they are whole lines
STREAMS = 4  # rows read at a time
COEFFICIENTS = 6  # of every channel or column
PIECE = BLOCK // STREAMS  # values of a piece of a row that is longer
AHEAD = 128  # values by which each of them is prefetched (32x256x56x56, backward: 64 1.95 copies, 128 1.86, 256 2.1)
ONWARD = 512  # and in one stream (Zen 4, inference of 32x64x112x112: 2048 3.4 ns for 16 values on a thread, 512 3.2)
INTEL_THREADS = 4  # threads up to which Intel's cores write faster through the cache
ROW = LANES  # values from which rows are worked on as such
COLUMNS = 256  # values that a folded row should have at least
LONGEST_FOLD = 1024  # and at most: kernels keep one such row on the stack
ROOM = 2048  # float64 values of room for sums and coefficients that kernels have on the stack


class Plan(NamedTuple):
    """One call's sizes and cut, in the order in which kernels take them."""

    n: int
    channels: int
    s: int
    threads: int
    split: bool  # statistics and output apart
    streaming: bool
    run: int  # row nest: channels of a task
    columns: int  # column nest: width of a row; 0 in the row nest
    rows: int  # column nest: number of full rows
    block: int  # column nest: rows of a block
    blocks: int  # blocks of a channel or, in the column nest, of all rows
    ahead: int  # how far to prefetch while output is written, in values; 0 within the cache
    turns: bool  # row nest, not split: threads write in turn


THREADS = Plan._fields.index("threads")


def cut(
    n: int, c: int, s: int, itemsize: int, arrays: int, threads: int, signs: bool, reduce: bool
) -> tuple[list[NDArray[np.intp]], int]:
    """The `plans` of these arguments as kernels take them, and how many float64 values of room they need: `part`.

    That is for the sums of every block, and of the values that fill no row of the column nest; and for coefficients.
    Whole vectors are loaded of those. Kernels that need no more than `ROOM` take None (a layer's call on 32x64: 0.25 us
    less).
    """
    made = plans(n, c, s, itemsize, arrays, threads, signs, reduce)
    width = made[0].columns or c
    room = 2 * (made[0].blocks + 1) * width + -(-(COEFFICIENTS * width + LANES) * itemsize // 8)
    return [np.array(each, np.intp) for each in made], room


def plan(
    n: int, c: int, s: int, itemsize: int, arrays: int, threads: int, signs: bool = False, reduce: bool = True
) -> Plan:
    """Cut the work on (n, c, s) values of so many arrays for so many threads.

    With `signs`, slabs are those of `sign_words`, however many threads there are.
    """
    size = n * c * s
    beyond_cache = size * itemsize * arrays > cache_bytes(3) // (2 if reduce else 1)
    streaming = beyond_cache and (threads > INTEL_THREADS or not is_intel())
    ahead = ONWARD if beyond_cache else 0
    if size * arrays <= 2 * SERIAL:
        threads = 1
    turns = streaming and reduce and threads == 2 and size * itemsize * (arrays - 1) <= cache_bytes(3)
    if s < ROW:
        columns = _folded_row(c * s)
        rows = size // columns
        block = _column_block(rows, columns, c)
        return Plan(n, c, s, threads, True, streaming, 1, columns, rows, block, -(-rows // block), ahead, False)
    blocks = _blocks(n, s)
    widest = _widest(c, s)
    run = widest if signs else _evenly(c, s, widest, threads)
    tasks = -(-c // run)
    split = tasks / (-(-tasks // threads) * threads) < 0.8
    if split and not signs:
        run = max(1, min(widest, c * blocks // (4 * threads)))
    return Plan(n, c, s, threads, split, streaming, run, 0, 0, 0, blocks, ahead, turns)


def plans(
    n: int, c: int, s: int, itemsize: int, arrays: int, threads: int, signs: bool = False, reduce: bool = True
) -> list[Plan]:
    """The `plan` of these arguments, and others that may be faster at times (G)."""
    first = plan(n, c, s, itemsize, arrays, threads, signs, reduce)
    made = [first]
    if not first.ahead:
        return made
    streaming = first._replace(streaming=True)
    if not first.streaming:
        made.append(streaming)
    if reduce and not first.split and first.threads == 2:
        made.append(streaming._replace(turns=not first.turns))
    if first.streaming and n * c * s * itemsize * arrays <= cache_bytes(3) * (1 if reduce else 2):
        made.append(first._replace(streaming=False, turns=False, ahead=0))
    return made


def _folded_row(pixel: int) -> int:
    """Width of a row of the column nest: whole pixels, whole vectors where that is cheap, at least `COLUMNS`."""
    vectors = pixel * LANES // gcd(pixel, LANES)
    return pixel if vectors > LONGEST_FOLD else vectors * -(-COLUMNS // vectors)


def _column_block(rows: int, columns: int, c: int) -> int:
    """Rows of a block: as many blocks for each of two or four threads, unless they would be small.

    One block was one thread's (2048x100, ns for 16 values on a thread: training 8.0 to 6.9, backward 10.9 to 8.7).
    """
    least, most = (max(64, values // columns) for values in (SERIAL, min(COLUMN_BLOCK, BLOCK * c)))
    blocks = -(-rows // (4 * most)) * 4
    return max(least, -(-rows // blocks)) if rows else least


def _blocks(n: int, s: int) -> int:
    """Number of blocks of a channel: whole bundles of streams, and pieces of long rows."""
    height = max(1, -(-(BLOCK // s) // STREAMS)) * STREAMS
    return -(-n // height) * max(1, s // PIECE)


def _widest(c: int, s: int) -> int:
    """Channels of the widest run: one long row, or a slab, of whole or half lines where it is about as wide."""
    if s >= 2 * BLOCK:  # such rows are written in pieces, of one channel each
        return 1
    run = max(1, SLAB // s)
    for values in LANES, LANES // 2:
        whole = values // gcd(s, values)
        if 1 < whole <= 2 * run:
            return min(max(whole, run - run % whole), c)
    return min(run, c)


def _evenly(c: int, s: int, widest: int, threads: int) -> int:
    """Channels of runs as many for each thread: the widest that begin on half a line, or else the widest of all."""
    least = -(-c // (threads * widest))
    widths = [-(-c // (each * threads)) for each in range(least, 2 * least + 1)]
    return next((run for run in widths if run * s % (LANES // 2) == 0), widths[0])


def sign_words(n: int, c: int, s: int, lanes: int = LANES) -> int:
    """Number of uint16 words for one bit a value, a word for each vector: every row begins with a word of its own.

    There is one more, for they are read in pairs.
    """
    if s < ROW:
        columns = _folded_row(c * s)
        return (n * c * s // columns + 1) * -(-columns // lanes) + 1
    run = _widest(c, s)
    return n * -(-c // run) * -(-run * s // lanes) + 1
