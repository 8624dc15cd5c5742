"""Which thread does which task (design, L): the twin of `Shares` in fastbn_ext/common.h.

Shares are integers, a line of the cache for each, so that threads which count their own tasks do not disturb each
other: the next task and the end. How many shares there are lies behind the last.
"""

from __future__ import annotations

from fastbn.backends._numba.compiler import point
from fastbn.backends._numba.vectors import counted

SHARES = 64  # of tasks, at most: threads beyond have one together
LINE = 8  # integers
ROOM_FOR_SHARES = SHARES * LINE + 1


@point
def deal(shares, tasks, threads):
    """Deal the tasks of a phase: neighbours to one thread, and to the first ones what is left over."""
    count = threads if threads < SHARES else SHARES
    shares[SHARES * LINE] = count
    for k in range(count):
        shares[k * LINE] = shares[(k - 1) * LINE + 1] if k else 0
        shares[k * LINE + 1] = ((k + 1) * tasks + count - 1) // count


@point
def next_task(shares, at):
    """A task that no thread has begun, of share `at` or, where that is done, of those behind it; and which share's.

    -1 where all are.
    """
    count = shares[SHARES * LINE]
    for _ in range(count):
        share = at % count * LINE
        t = counted(shares, share)
        if t < shares[share + 1]:
            return t, at
        at += 1
    return -1, at
