"""Which of several plans of a call is the fastest here and now: found by trying.

Past the cache, that is decided by what cannot be known beforehand: how much of the third-level cache neighbours leave,
and whether two threads share their way to memory (`_plan`, D and F). It changes from hour to hour: a plan that took
20 % less in one took 25 % more in another. Calls that have more than one plan take milliseconds; two readings of a
clock are free there. Whatever the plan, the results are the same, bit by bit. (Zen 4, steady calls in an hour that
changed, ns for 16 values on a thread with one plan and with trials: training 32x512x28x28 6.3 and 5.5, 32x256x56x56 6.6
and 5.9, 32x64x56x56 4.4 and 4.0; inference 32x3x224x224 4.8 and 3.45; backward 8x64x56x56 6.5 and 5.7; of 27 rows none
with several plans took more than 5 % longer.)
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

ROUND = 4  # calls in a row with one plan: the first ones find in the caches what the plan before left there
EVERY = 32  # rounds of which one is another plan's than the fastest one's


class Trials:
    """A kernel that is called with one of several plans, and measures how long it takes.

    Every plan has a round at the beginning, in order. Then the fastest goes on for as long as it is, and now and then
    another one has a round. Threads that call at once may count a call for the wrong plan, but no plan is lost by that.

    Parameters
    ----------
    kernel : callable
    plans : list
        Two or more; `plan` is the one to call the kernel with.
    """

    def __init__(self, kernel: Callable[..., None], plans: list[Any]) -> None:
        self.plan = plans[0]
        self._kernel, self._plans = kernel, plans
        self._now, self._rounds = 0, 0
        self._calls, self._least = 0, float("inf")  # of this round
        self._seconds = [0.0] * len(plans)  # the shortest call of every plan's latest round; 0 before there was one

    def __call__(self, *arguments: Any) -> None:
        """Call the kernel."""
        begin = perf_counter()
        self._kernel(*arguments)
        self._least = min(self._least, perf_counter() - begin)
        self._calls += 1
        if self._calls >= ROUND:
            self._end_round()

    def _end_round(self) -> None:
        if self._least < float("inf"):  # else another thread has ended this round just now
            self._seconds[self._now] = self._least
        self._rounds += 1
        self._now = self._seconds.index(min(self._seconds))
        if self._rounds % EVERY == 0:
            self._now = (self._now + 1 + self._rounds // EVERY % (len(self._plans) - 1)) % len(self._plans)
        self._calls, self._least = 0, float("inf")
        self.plan = self._plans[self._now]
