"""How the statistics of image data are cut into tasks and put together: for both compiled backends.

Image data are channels first or last, of few channels, and of 8 or 16 bits. Their statistics are a pass of their own,
of reading only, that must keep up with memory on few cores.

A. Every task sees a piece of memory as rows of `width` values and adds up columns; a column is a vector wide, so that
   both layouts have one inner loop, whose sums stay in registers. Channels last: `width` is a few pixels long, and a
   column belongs to one channel. Channels first with long rows: a piece lies in one row, `width` is one vector, and the
   columns are added up at the end of the task.
B. Integers: sums and sums of squares are integers and exact, however they are cut. They become mean and m2 in Python,
   whose integers do not overflow and whose division rounds once.
C. Floats: a column's sums are around its first value, in float64 (see `_numba`, design C), and become m2 and the mean's
   distance from that value at the end of the task; pieces depend on the shape alone and are merged in a fixed order.
D. A tile of rows stays in the nearest cache while its columns are added up, and has at most `TILE` of them, so that 8
   bits are summed in 16, and their squares in 32.
"""

from __future__ import annotations

from math import lcm
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbn._merge import merge_all

Array = NDArray[Any]

INTEGERS = tuple(np.dtype(name) for name in ("uint8", "int8", "uint16", "int16"))
HALF = np.dtype(np.float16)

TILE = 256  # rows of a tile: 256 * 255 < 2**16
SHORT = 2048  # values below which rows of channels first are folded as pixels are
LONGEST = 1024  # values of a folded row beyond which it need not be whole vectors
TILE_BYTES = 1 << 13  # and bytes: while it is added up, the next one is prefetched
PIECE = 1 << 16  # values of a task, at least where pixels are folded,
ROWS = 1 << 14  # and rows at most
SERIAL = 1 << 16  # bytes below which a second thread costs more than it saves


class Cut(NamedTuple):
    """How a kernel takes its work: `segments` of `length` values each, every one in `pieces` of `piece` values."""

    threads: int
    tasks: int
    length: int
    pieces: int
    piece: int
    width: int  # of a row
    tile: int  # rows of a tile
    whole: bool  # whether a piece belongs to one channel


def lanes(itemsize: int) -> int:
    """Values in a column of vectors: a multiple of what any instruction set takes at once."""
    return 32 if itemsize == 1 else 16


def takes(dtype: np.dtype[Any], c: int, s: int) -> bool:
    """Whether these kernels measure such data: all of 16 bits or less, and what is shaped as images are."""
    return dtype.itemsize < 4 or _in_one_channel(c, s) or c * s <= LONGEST


def _in_one_channel(c: int, s: int) -> bool:
    return c == 1 or s >= SHORT


def cut(n: int, c: int, s: int, itemsize: int, threads: int) -> Cut:
    """Cut the work on (n, c, s) values for so many threads."""
    if c == 1:
        n, s = 1, n * s
    size, vector = n * c * s, lanes(itemsize)
    whole = _in_one_channel(c, s) or (c * s > LONGEST and s >= 2 * vector)
    segments, length = (n * c, s) if whole else (1, size)
    if whole:
        width = vector
    else:
        width = lcm(c * s, vector)
        if width > LONGEST:
            width = c * s * -(-vector // (c * s))
    rows = PIECE // width if whole else min(max(PIECE, size // 32) // width + 1, ROWS)
    piece = min(rows, -(-length // width)) * width
    pieces = -(-length // piece)
    tile = min(TILE, max(16, TILE_BYTES // (width * itemsize)))
    threads = 1 if size * itemsize < SERIAL else threads
    return Cut(threads, segments * pieces, length, pieces, piece, width, tile, whole)


def room(cut: Cut, dtype: np.dtype[Any]) -> Array:
    """Where the tasks leave what they find in integers, (tasks, 2, columns), or in floats, (tasks, 3, columns)."""
    columns = 1 if cut.whole else cut.width
    return np.empty((cut.tasks, 2, columns), np.int64) if dtype in INTEGERS else np.empty((cut.tasks, 3, columns))


def finish(part: Array, cut: Cut, n: int, c: int, s: int, mean: Array, rest: Array, m2: Array) -> None:
    """Mean, its rest and m2 of every channel from what the tasks left."""
    (_finish_integers if part.dtype == np.int64 else _finish_floats)(part, cut, n, c, s, mean, rest, m2)


def _finish_integers(part: Array, cut: Cut, n: int, c: int, s: int, mean: Array, rest: Array, m2: Array) -> None:
    """The same from the sums and sums of squares of the columns of every task."""
    count = n * s
    sums = [_sum(part[:, i], cut, c, s) for i in (0, 1)]
    for j, (total, squares) in enumerate(zip(*sums, strict=True)):
        mean[j] = total / count
        numerator, denominator = mean[j].as_integer_ratio()
        rest[j] = (total * denominator - numerator * count) / (denominator * count)
        m2[j] = (count * squares - total * total) / count


def _sum(part: Array, cut: Cut, c: int, s: int) -> list[int]:
    """Exact sum of every channel, 32 bits at a time where a sum could overflow otherwise."""
    if cut.tasks * cut.piece < 1 << 31:
        return _by_channel(part, cut, c, s).sum((0, 2)).tolist()  # type: ignore[no-any-return]
    high, low = (_by_channel(half, cut, c, s).sum((0, 2)) for half in (part >> 32, part & 0xFFFFFFFF))
    return [(upper << 32) + lower for upper, lower in zip(high.tolist(), low.tolist(), strict=True)]


def _finish_floats(part: Array, cut: Cut, n: int, c: int, s: int, mean: Array, rest: Array, m2: Array) -> None:
    """The same from a first value, the mean's distance from it and m2, of the columns of every task."""
    tasks = np.arange(cut.tasks) % cut.pieces
    sizes = np.minimum(cut.piece, cut.length - tasks * cut.piece)[:, None]
    counts = sizes if cut.whole else sizes // cut.width + (np.arange(cut.width) < sizes % cut.width)
    columns = (np.moveaxis(_by_channel(a, cut, c, s), 1, 2).reshape(-1, c) for a in (counts, *part.swapaxes(0, 1)))
    mean[:], rest[:], m2[:] = merge_all(*columns)


def _by_channel(part: Array, cut: Cut, c: int, s: int) -> Array:
    """(tasks, columns) as (parts, C, parts)."""
    if cut.whole:
        return part.reshape(-1, c, cut.pieces)
    return part.reshape(-1, c, s)
