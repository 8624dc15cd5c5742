"""Plans that are tried: the fastest is used, and that a plan has become the fastest is noticed."""

from __future__ import annotations

import pytest

from fastbn.backends import _trials
from fastbn.backends._trials import EVERY, ROUND, Trials


class Clock:
    """A clock that stands still but while kernels run."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Kernel:
    """A kernel that takes the time said for a plan."""

    def __init__(self, clock: Clock, **seconds: float) -> None:
        self.clock, self.seconds, self.called = clock, seconds, []

    def __call__(self, plan: str) -> None:
        self.called.append(plan)
        self.clock.now += self.seconds[plan]


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(_trials, "perf_counter", clock)
    return clock


def run(trials: Trials, calls: int) -> None:
    for _ in range(calls):
        trials(trials.plan)


def test_every_plan_has_a_round_and_the_fastest_goes_on(clock):
    kernel = Kernel(clock, first=3.0, second=1.0, third=2.0)
    run(Trials(kernel, ["first", "second", "third"]), 6 * ROUND)
    assert kernel.called == ["first"] * ROUND + ["second"] * ROUND + ["third"] * ROUND + ["second"] * 3 * ROUND


def test_a_plan_that_becomes_slow_is_left_after_its_round(clock):
    kernel = Kernel(clock, first=1.0, second=2.0)
    trials = Trials(kernel, ["first", "second"])
    run(trials, 3 * ROUND)
    kernel.seconds["first"] = 3.0
    run(trials, 2 * ROUND)
    assert kernel.called[-2 * ROUND :] == ["first"] * ROUND + ["second"] * ROUND


def test_a_plan_that_becomes_fast_is_found(clock):
    kernel = Kernel(clock, first=1.0, second=2.0, third=3.0)
    trials = Trials(kernel, ["first", "second", "third"])
    run(trials, 2 * EVERY * ROUND)
    kernel.seconds["third"] = 0.5
    run(trials, 3 * EVERY * ROUND)
    assert kernel.called[-ROUND:] == ["third"] * ROUND
    assert kernel.called.count("second") < 4 * ROUND  # trying costs little


def test_one_slow_call_is_not_the_plan_s(clock):
    kernel = Kernel(clock, first=1.0, second=2.0)
    trials = Trials(kernel, ["first", "second"])
    run(trials, 3 * ROUND)
    kernel.seconds["first"] = 100.0
    run(trials, 1)
    kernel.seconds["first"] = 1.0
    run(trials, 2 * ROUND - 1)
    assert trials.plan == "first"


def test_an_error_passes_and_counts_nothing(clock):
    kernel = Kernel(clock, first=1.0, second=2.0)
    trials = Trials(kernel, ["first", "second"])
    for _ in range(2 * ROUND):
        with pytest.raises(KeyError):
            trials("none")
    assert trials.plan == "first"
