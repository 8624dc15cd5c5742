"""Which thread does which task: the tasks of its own share first, then what the others have not begun."""

import numpy as np
import pytest

pytest.importorskip("numba")
from numba import intp, njit

from fastbn.backends._numba.buffers import Buffer, entry_of
from fastbn.backends._numba.shares import ROOM_FOR_SHARES, deal, next_task
from fastbn.backends._numba.vectors import scratch, seen_as


@pytest.fixture(scope="module")
def tasks_of():
    """Tasks that are done when threads come for one in a given order."""

    @njit((intp, intp, intp, Buffer(intp)))
    def take(tasks, threads, count, threads_then_tasks):
        dealt = scratch(seen_as(threads_then_tasks, np.intp), ROOM_FOR_SHARES)
        deal(dealt, tasks, threads)
        for i in range(count):
            threads_then_tasks[i], _ = next_task(dealt, threads_then_tasks[i])

    def tasks_of(tasks, threads, order):
        taken = np.array(order, np.intp)
        entry_of(take)(tasks, threads, len(taken), taken)
        return taken.tolist()

    return tasks_of


def test_a_thread_does_its_own_tasks_and_then_those_of_others(tasks_of):
    assert tasks_of(5, 2, [0] * 6) == [0, 1, 2, 3, 4, -1]
    assert tasks_of(5, 2, [1] * 6) == [3, 4, 0, 1, 2, -1]
    assert tasks_of(7, 3, [2, 1, 2, 2, 0, 1, 1, 0]) == [5, 3, 6, 0, 1, 4, 2, -1]


@pytest.mark.parametrize("threads", (1, 2, 7, 64, 65, 300))
@pytest.mark.parametrize("tasks", (0, 1, 2, 13, 64, 1000))
def test_every_task_is_done_once_whoever_comes(tasks_of, tasks, threads):
    order = np.random.default_rng(tasks + threads).integers(0, threads, tasks + 5)
    taken = tasks_of(tasks, threads, order)
    assert sorted(taken) == [-1] * 5 + list(range(tasks))


@pytest.mark.parametrize("threads", (2, 5, 64))
def test_shares_differ_by_one_task_at_most(tasks_of, threads):
    """Each thread in turn takes tasks of its own for as long as there are as many as threads."""
    taken = np.reshape(tasks_of(3 * threads + 1, threads, list(range(threads)) * 3), (3, threads))
    np.testing.assert_array_equal(np.diff(taken, axis=0), 1)
