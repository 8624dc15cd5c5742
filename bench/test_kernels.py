"""Every candidate of every row, timed in turn; one group of pytest-benchmark is one row."""

from __future__ import annotations

import os
from collections import deque
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import fastbn
from bench.candidates import RefusedError, candidate, problem
from bench.rows import COPIES, ROWS, Row
from bench.turns import Candidate, Replay, Samples, in_turn, quoted

SECONDS = float(os.environ.get("BENCH_SECONDS", "4"))  # for a row, in all sweeps
SWEEPS = 6  # over all rows
PLACED = 1 << 26  # bytes moved up to which it matters where arrays lie in memory
clock = Replay()


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> dict[Row, tuple[Samples, float]]:
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


def times(rows: list[Row]) -> dict[Row, tuple[Samples, float]]:
    """Seconds a call, of every candidate of these rows that does not refuse; others' share of the machine.

    All rows are swept over several times, and the samples put together. A machine that is slower for minutes then is so
    for a part of all rows, and not for all of some; and arrays lie elsewhere each time, which decides on up to twice
    the time of those about as large as the last cache. Twelve restless rows: ratios to peers differ by 5.6 % at the
    median and a tenth of them by 18.5 % with four sweeps, by 4.7 and 14.3 % with six. Two whole runs of all rows: 4.8 %
    at the median; 7.6 % when it was the 20th percentiles of four sweeps.
    """
    found: dict[Row, tuple[Samples, float]] = {row: ({}, 0.0) for row in rows}
    kept: deque[dict[str, Candidate]] = deque(maxlen=SWEEPS)  # what is given back would be the next place
    for sweep in range(SWEEPS):
        print(f"sweep {sweep + 1} of {SWEEPS} over {len(rows)} rows", flush=True)
        problem.cache_clear()
        for row in rows:
            ready = _candidates(row)
            if row.nbytes <= PLACED:
                kept.append(ready)
            samples, others = found[row]
            more, share = in_turn(ready, SECONDS / SWEEPS)
            for name, values in more.items():
                samples.setdefault(name, []).extend(values)
            found[row] = samples, max(others, share)
    return found


def _candidates(row: Row) -> dict[str, Candidate]:
    ready = {}
    for name in row.candidates:
        try:
            ready[name] = candidate(row, name)
        except RefusedError:
            continue
    return ready


def limit(samples: Samples, threads: str) -> float:
    """Seconds of the better copy, on as many threads where the row compares threads."""
    return min(quoted(values) for name, values in samples.items() if name in {f"{copy}{threads}" for copy in COPIES})


@pytest.mark.parametrize("row,name", [pytest.param(r, n, id=f"{r}: {n}") for r in ROWS for n in r.candidates])
@pytest.mark.benchmark(timer=clock.read, disable_gc=True)
def test_time(benchmark: BenchmarkFixture, measured: dict[Row, tuple[Samples, float]], row: Row, name: str) -> None:
    samples, others = measured[row]
    if name not in samples:
        pytest.skip(f"{name} cannot do this")
    benchmark.group = str(row)
    clock.load(samples[name])
    benchmark.pedantic(clock.call, rounds=len(samples[name]))  # type: ignore[no-untyped-call]
    seconds = quoted(samples[name])
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
    )
