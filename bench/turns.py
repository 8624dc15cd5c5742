"""Candidates timed in turn, and a clock that hands their times to pytest-benchmark.

pytest-benchmark times one callable until it is done, then the next: on a shared machine the ratio of two such times
carries whatever the neighbours did in between. Here all candidates of a row run in turn, round after round, so that
each meets the same machine; pytest-benchmark then reads the times off a clock that replays them.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

SAMPLE = 3e-4  # seconds: shorter calls are timed in batches that take this long
SETTLE = 1.5e-3  # seconds of untimed calls before a sample: the last candidate's idle threads spin for about so long
ROUNDS = 9  # at least
MANY = 150  # rounds that are enough
SLOW = 4.0  # a call that takes so many times the fastest one
LONG = 5e-3  # and so many seconds is timed
EVERY = 3  # in every third round only


def nothing() -> None:
    """Prepare nothing."""


@dataclass(frozen=True)
class Candidate:
    """One library's way of doing a row's operation.

    Attributes
    ----------
    call : callable
        What is timed; returns the result, or leaves it where `result` finds it.
    before : callable
        Untimed, before every sample (a backward's forward, the number of threads).
    once : bool
        Whether `before` is good for one call only.
    result : callable
        The array that the last call computed, from what it returned.
    """

    call: Callable[[], Any]
    before: Callable[[], Any] = nothing
    once: bool = False
    result: Callable[[Any], Any] = lambda returned: returned


def quoted(samples: Sequence[float]) -> float:
    """The 20th percentile: what the machine does when the neighbours are quiet, and steadier than the least."""
    return quantiles(samples, n=5, method="inclusive")[0]


def in_turn(candidates: dict[str, Candidate], seconds: float) -> dict[str, list[float]]:
    """Seconds a call, of every candidate, sampled in turn for about so long."""
    first = {name: _calibrate(candidate) for name, candidate in candidates.items()}
    repeat = {name: 1 if candidates[name].once else max(1, round(SAMPLE / first[name])) for name in candidates}
    settle = {name: max(1, min(20 * repeat[name], round(SETTLE / first[name]))) for name in candidates}
    slow = {name for name in candidates if first[name] > max(LONG, SLOW * min(first.values()))}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    collecting = gc.isenabled()
    gc.disable()
    deadline = time.perf_counter() + seconds
    turn = 0
    try:
        while turn < ROUNDS or (turn < MANY and time.perf_counter() < deadline):
            for name, candidate in candidates.items():
                if turn % EVERY == 0 or name not in slow:
                    samples[name].append(_sample(candidate, repeat[name], settle[name]))
            turn += 1
    finally:
        if collecting:
            gc.enable()
    return samples


def _calibrate(candidate: Candidate) -> float:
    """Compile, touch all memory, and return about how long a call takes."""
    _sample(candidate, 1, 1)
    return max(min(_sample(candidate, 1, 1) for _ in range(2)), 1e-7)


def _sample(candidate: Candidate, repeat: int, settle: int) -> float:
    call, before = candidate.call, candidate.before
    before()
    for _ in range(1 if candidate.once else settle):  # the caches as its own last call leaves them
        call()
    if candidate.once:
        before()
    rounds = range(repeat)
    start = time.perf_counter()
    for _ in rounds:
        call()
    return (time.perf_counter() - start) / repeat


class Replay:
    """A clock for pytest-benchmark on which every call takes the next of the given times."""

    def __init__(self) -> None:
        self.now = 0.0
        self._left: list[float] = []

    def load(self, samples: Sequence[float]) -> None:
        self._left = list(reversed(samples))

    def call(self) -> None:
        self.now += self._left.pop()

    def read(self) -> float:
        return self.now
