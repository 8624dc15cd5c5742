"""Results are bitwise the same for any number of threads, and for any number of callers."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cases import CASES, DTYPES, Case
from conftest import CPUS

import fastbn
from fastbn import _engine

pytestmark = pytest.mark.usefixtures("backend", "keep_threads")


def everything(case: Case, dtype) -> list[np.ndarray]:
    """Every result of every kernel."""
    x, dy, _, weight, bias = case.make(dtype)
    y, mean, invstd = fastbn.batch_norm_forward(x, weight, bias, axis=case.axis)
    m = fastbn.moments(x, axis=case.axis)
    return [
        *(y, mean, invstd, m.mean, m.m2),
        fastbn.scale_shift(x, weight, bias, axis=case.axis),
        *fastbn.batch_norm_backward(dy, x, mean, invstd, weight, axis=case.axis),
        *fastbn.batch_norm_backward(dy, x, mean, invstd, weight, axis=case.axis, training=False),
    ]


def assert_identical(got, expected):
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(case, dtype):
    fastbn.set_num_threads(1)
    alone = everything(case, dtype)
    for threads in (CPUS, 1 + CPUS // 2):  # the same number again, where there is one CPU only
        fastbn.set_num_threads(threads)
        assert_identical(everything(case, dtype), alone)


def test_callers_on_their_own_threads_get_their_own_results(backend):
    cases = [Case((4, 32, 30 + k, 30)) for k in range(4)]
    expected = [everything(case, np.float32) for case in cases]

    def work(k):
        with fastbn.use_backend(backend):
            return everything(cases[k % 4], np.float32)

    with ThreadPoolExecutor(8) as pool:
        for k, got in enumerate(pool.map(work, range(32))):
            assert_identical(got, expected[k % 4])


def test_without_room_for_more_threads_one_computes(backend, monkeypatch):
    """OpenMP would end the process."""
    case = Case((4, 32, 60, 30))
    expected = [*everything(case, np.float32), fastbn.moments(np.ones((4, 3, 300, 300), np.uint8)).mean]
    asked = []

    def refused(*_):
        asked.append(1)
        raise RuntimeError("can't start new thread")

    def work():
        with fastbn.use_backend(backend), monkeypatch.context() as patch:
            patch.setattr(_engine, "start_new_thread", refused)
            return [*everything(case, np.float32), fastbn.moments(np.ones((4, 3, 300, 300), np.uint8)).mean]

    fastbn.set_num_threads(CPUS)
    with ThreadPoolExecutor(1) as pool:  # a thread that has not yet computed
        assert_identical(pool.submit(work).result(), expected)
    assert bool(asked) == (CPUS > 1 and backend != "numpy")


@pytest.mark.parametrize("backend", ("numba", "cython"), indirect=True, scope="module")
def test_other_threads_run_meanwhile(backend):
    """Kernels release the interpreter lock: a thread that notes the time finds many times within a call."""
    x = Case((8, 64, 144, 145)).make().x
    y = np.empty_like(x)
    fastbn.set_num_threads(1)
    times, done = [], threading.Event()

    def note():
        while not done.wait(0.0005):
            times.append(time.perf_counter())

    thread = threading.Thread(target=note)
    thread.start()
    try:
        for _ in range(20):
            start = time.perf_counter()
            fastbn.batch_norm_forward(x, out=y)
            end = time.perf_counter()
            if sum(start < t < end for t in times) > 3:
                break
        else:
            pytest.fail(f"no other thread ran during a call of {end - start:.3f} s")
    finally:
        done.set()
        thread.join()
