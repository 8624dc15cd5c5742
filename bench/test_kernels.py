"""Every candidate of every row, timed in turn; one group of pytest-benchmark is one row."""

from __future__ import annotations

import os
from collections import deque
from statistics import median
from typing import Any, NamedTuple

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import fastbn
from bench.candidates import RefusedError, candidate, problem
from bench.probes import FEWEST, Samples, best, shortest_pulse, undisturbed
from bench.rows import COPIES, ROWS, Row
from bench.turns import Candidate, Replay, in_turn

SECONDS = float(os.environ.get("BENCH_SECONDS", "4"))  # for a row, in the usual sweeps
SWEEPS = 6  # over all rows
MOST = 9  # and over rows of which most samples were disturbed
PLACED = 1 << 26  # bytes moved up to which it matters where arrays lie in memory
clock = Replay()


class Times(NamedTuple):
    """What is quoted of a row: seconds a call, of every candidate that does not refuse."""

    seconds: dict[str, list[float]]
    others: float  # share of the machine that other processes had
    undisturbed: dict[str, int]  # samples


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> dict[Row, Times]:
    """`times` of all selected rows."""
    tests = (item for item in request.session.items if isinstance(item, pytest.Function))
    rows: dict[Any, None] = dict.fromkeys(
        test.callspec.params["row"] for test in tests if test.originalname == test_time.__name__
    )
    threads, backend = fastbn.get_num_threads(), fastbn.get_backend()
    try:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            return times(list(rows))
    finally:
        fastbn.set_num_threads(threads)
        fastbn.set_backend(backend)


def times(rows: list[Row]) -> dict[Row, Times]:
    """The best samples of all rows.

    All rows are swept over several times, and the samples put together. A machine that is slower for minutes then is so
    for a part of all rows, and not for all of some; and arrays lie elsewhere each time, which decides on up to twice
    the time of those about as large as the last cache. Rows of which too few samples are undisturbed get more sweeps.
    """
    found: dict[Row, Samples] = {row: {} for row in rows}
    others = dict.fromkeys(rows, 0.0)
    kept: deque[dict[str, Candidate]] = deque(maxlen=SWEEPS)  # what is given back would be the next place
    due = rows
    for sweep in range(MOST):
        if sweep >= SWEEPS:
            pulse = shortest_pulse(found.values())
            due = [row for row in rows if _counts(found[row], pulse) < FEWEST]
        print(f"sweep {sweep + 1} over {len(due)} rows", flush=True)
        problem.cache_clear()
        for row in due:
            ready = _candidates(row)
            if row.nbytes <= PLACED:
                kept.append(ready)
            more, share = in_turn(ready, SECONDS / SWEEPS)
            for name, values in more.items():
                found[row].setdefault(name, []).extend(values)
            others[row] = max(others[row], share)
    pulse = shortest_pulse(found.values())
    return {
        row: Times(
            {name: best(values, pulse) for name, values in samples.items()},
            others[row],
            {name: undisturbed(values, pulse) for name, values in samples.items()},
        )
        for row, samples in found.items()
    }


def _counts(samples: Samples, pulse: float) -> float:
    """Number of undisturbed samples of the middle one of the candidates."""
    return median(undisturbed(values, pulse) for values in samples.values())


def _candidates(row: Row) -> dict[str, Candidate]:
    ready = {}
    for name in row.candidates:
        try:
            ready[name] = candidate(row, name)
        except RefusedError:
            continue
    return ready


def limit(seconds: dict[str, list[float]], threads: str) -> float:
    """Seconds of the better copy, on as many threads where the row compares threads."""
    return min(median(values) for name, values in seconds.items() if name in {f"{copy}{threads}" for copy in COPIES})


@pytest.mark.parametrize("row,name", [pytest.param(r, n, id=f"{r}: {n}") for r in ROWS for n in r.candidates])
@pytest.mark.benchmark(timer=clock.read, disable_gc=True)
def test_time(benchmark: BenchmarkFixture, measured: dict[Row, Times], row: Row, name: str) -> None:
    samples, others, counts = measured[row]
    if name not in samples:
        pytest.skip(f"{name} cannot do this")
    benchmark.group = str(row)
    clock.load(samples[name])
    benchmark.pedantic(clock.call, rounds=len(samples[name]))  # type: ignore[no-untyped-call]
    seconds = median(samples[name])
    threads = name[name.index(", ") :] if "threads" in name else ""
    benchmark.extra_info.update(
        table=row.table,
        op=row.op,
        shape=str(row.case),
        dtype=row.dtype,
        candidate=name,
        bytes=row.nbytes,
        median_us=round(seconds * 1e6, 2),
        gb_per_s=round(row.nbytes / seconds / 1e9, 2),
        copies=round(seconds / limit(samples, threads), 3),
        others=round(others, 3),
        undisturbed=counts[name],
    )
