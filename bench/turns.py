"""Candidates timed in turn, and a clock that hands their times to pytest-benchmark.

pytest-benchmark times one callable until it is done, then the next: on a shared machine the ratio of two such times
carries whatever the neighbours did in between. Here all candidates of a row run in turn, round after round, so that
each meets the same machine, and in another order every time, so that each meets what all the others leave behind (in
one order, the same call took up to a tenth longer after PyTorch than after itself). pytest-benchmark then reads the
times off a clock that replays them.
"""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.probes import Sample, Samples, probe, worse

SAMPLE = 3e-4  # seconds: shorter calls are timed in batches that take this long
SETTLE = 1.5e-3  # seconds of untimed calls before a sample: the last candidate's idle threads spin for about so long
ROUNDS = 3  # at least
MANY = 150  # rounds that are enough
SLOW = 4.0  # a call that takes so many times the fastest one
LONG = 5e-3  # and so many seconds is timed
EVERY = 6  # in every sixth round only
BLOCK = 0.2  # seconds of rounds that are kept or dropped together
QUIET = 0.05  # share of the machine that other processes may have had in a block that is kept
PATIENCE = 2.0  # times the usual time to wait for enough such blocks


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


def in_turn(candidates: dict[str, Candidate], seconds: float) -> tuple[Samples, float]:
    """Samples of every candidate, taken in turn for about so long; and what share other processes had of the machine.

    What was sampled while they were busy is dropped, where enough is left.
    """
    first = {name: _calibrate(candidate) for name, candidate in candidates.items()}
    repeat = {name: 1 if candidates[name].once else max(1, round(SAMPLE / first[name])) for name in candidates}
    settle = {name: max(1, min(20 * repeat[name], round(SETTLE / first[name]))) for name in candidates}
    slow = {name for name in candidates if first[name] > max(LONG, SLOW * min(first.values()))}

    names, shuffled = list(candidates), random.Random(0)

    def sample_round(turn: int, samples: Samples) -> None:
        earlier = probe()
        for name in shuffled.sample(names, len(names)):
            if turn % EVERY == 0 or name not in slow:
                seconds, later = _sample(candidates[name], repeat[name], settle[name]), probe()
                samples[name].append(Sample(seconds, worse(earlier, later)))
                earlier = later

    blocks: list[Block] = []
    start = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()
    try:
        while not _enough(blocks, time.perf_counter() - start, seconds):
            blocks.append(_block(names, sample_round))
    finally:
        if collecting:
            gc.enable()
    return _quietest(blocks)


class Block(NamedTuple):
    """A few rounds, and the share of the machine that other processes had meanwhile."""

    others: float
    rounds: int
    samples: Samples


def _block(names: list[str], sample_round: Callable[[int, Samples], None]) -> Block:
    samples: Samples = {name: [] for name in names}
    others, start = _others(), time.perf_counter()
    turn = 0
    while turn < EVERY or time.perf_counter() - start < BLOCK:
        sample_round(turn, samples)
        turn += 1
    return Block((_others() - others) / (time.perf_counter() - start) / (os.cpu_count() or 1), turn, samples)


def _others() -> float:
    """Seconds of CPU that other processes and virtual machines have had, as far as the system tells."""
    try:
        with Path("/proc/stat").open() as file:
            user, nice, system, _, _, irq, softirq, steal, *_ = map(int, file.readline().split()[1:])
    except OSError:
        return 0.0
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()


def _enough(blocks: list[Block], elapsed: float, seconds: float) -> bool:
    quiet = sum(block.rounds for block in blocks if block.others <= QUIET)
    if quiet >= ROUNDS and (elapsed >= seconds or quiet >= MANY):
        return True
    return elapsed >= PATIENCE * seconds and sum(block.rounds for block in blocks) >= ROUNDS


def _quietest(blocks: list[Block]) -> tuple[Samples, float]:
    """The quiet blocks' samples, or those of the least disturbed ones too where they are too few; others' share."""
    samples: Samples = {name: [] for name in blocks[0].samples}
    rounds, others = 0, 0.0
    for block in sorted(blocks, key=lambda block: block.others):
        if block.others > QUIET and rounds >= ROUNDS:
            break
        rounds += block.rounds
        others = max(others, block.others)
        for name, values in block.samples.items():
            samples[name] += values
    return samples, others


def _calibrate(candidate: Candidate) -> float:
    """Compile, touch all memory, and return about how long a call takes."""
    first = _sample(candidate, 1, 1)
    return first if first > LONG else max(min(_sample(candidate, 1, 1) for _ in range(2)), 1e-7)


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
