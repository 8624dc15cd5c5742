"""Every candidate of every row, timed in turn; one group of pytest-benchmark is one row."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import fastbn
from bench.candidates import RefusedError, candidate, problem
from bench.rows import COPIES, ROWS, Row
from bench.turns import Candidate, Replay, Samples, in_turn, quoted

SECONDS = float(os.environ.get("BENCH_SECONDS", "4"))  # for a row; ratios of two runs differ by 4 %, with 1.5 by 6
PLACES = 4  # in memory: where arrays about as large as the last cache lie decides on up to twice the time
PLACED = 1 << 26  # bytes moved up to which that is so
clock = Replay()


@pytest.fixture(autouse=True)
def _keep_settings() -> Iterator[None]:
    threads, backend = fastbn.get_num_threads(), fastbn.get_backend()
    yield
    fastbn.set_num_threads(threads)
    fastbn.set_backend(backend)


@functools.lru_cache(maxsize=1)
def times(row: Row) -> tuple[Samples, float]:
    """Seconds a call, of every candidate of a row that does not refuse; others' share of the machine.

    Arrays that may fit in a cache are made several times, and samples of all places are put together.
    """
    places = PLACES if row.nbytes <= PLACED else 1
    samples: Samples = {}
    others, kept = 0.0, []
    for place in range(places):
        if place:
            problem.cache_clear()
        ready = _candidates(row)
        kept.append(ready)  # what is given back would be the next place
        more, share = in_turn(ready, SECONDS / places)
        others = max(others, share)
        for name, values in more.items():
            samples.setdefault(name, []).extend(values)
    return samples, others


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
def test_time(benchmark: BenchmarkFixture, row: Row, name: str) -> None:
    samples, others = times(row)
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
        p20_us=round(seconds * 1e6, 2),
        gb_per_s=round(row.nbytes / seconds / 1e9, 2),
        copies=round(seconds / limit(samples, threads), 3),
        others=round(others, 3),
    )
