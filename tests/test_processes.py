"""Forked children and threads, under every threading layer: right and bitwise the same results, no hang, no abort."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from subprocesses import python

# Numba's layers; which one works is decided once in a process. TBB, where it is installed, is one more.
LAYERS = {"cython": {"FASTBN_BACKEND": "cython"}} | {
    layer: {"FASTBN_BACKEND": "numba", "NUMBA_THREADING_LAYER": layer}
    for layer in ("omp", "workqueue", *os.environ.get("FASTBN_TEST_LAYERS", "").split())
}
layers = pytest.mark.parametrize("layer", LAYERS)

STEPS = """
import multiprocessing, os, signal, sys, threading
from concurrent.futures import ThreadPoolExecutor
import numpy as np
rng = np.random.default_rng(0)
X = [rng.standard_normal((8, 16, 40 + k, 40), np.float32) for k in range(8)]
def steps(k):
    import fastbn
    bn, results = fastbn.BatchNorm2d(16, activation="relu"), []
    for _ in range(4):
        results = [bn(X[k]), bn.backward(X[k]), bn.running_var.copy(), bn.grads["weight"]]
    return [result.tobytes() for result in results]
def wait(child):
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
def in_child(function):
    if child := os.fork():
        return wait(child)
    signal.alarm(60)
    try:
        function()
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)
"""

THREADS = """
import fastbn
def same():
    assert [steps(k) for k in range(2)] == expected[:2]
expected = [steps(k) for k in range(8)]
with ThreadPoolExecutor(8) as pool:
    for _ in range(3):
        assert list(pool.map(steps, range(8))) == expected

bn = fastbn.BatchNorm2d(16).eval()
bn.running_mean[:], bn.running_var[:] = rng.standard_normal(16), rng.uniform(1, 2, 16)
alone = [bn(x).tobytes() for x in X]
with ThreadPoolExecutor(2) as pool:
    assert list(pool.map(lambda k: bn(X[k % 8]).tobytes(), range(48))) == alone * 6
"""

FORKS = """
in_child(same)
in_child(lambda: in_child(same))
with ThreadPoolExecutor(1) as pool:
    pool.submit(in_child, same).result()
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map_async(steps, range(4)).get(60) == expected[:4]

# Children of a program whose other threads compute at the same time.
busy = threading.Event()
def compute():
    while not busy.is_set():
        steps(0)
thread = threading.Thread(target=compute)
thread.start()
for _ in range(5):
    in_child(same)
busy.set()
thread.join()

threads = fastbn.get_num_threads()
fastbn.set_num_threads(1)
same()
fastbn.set_num_threads(threads)
same()
"""


# A child that needs Numba's compiler would wait for ever for a lock that was another thread's when it was forked.
COMPILING = """
if fastbn.get_backend() == "numba":
    from fastbn.backends._numba import prepare
    compiling = threading.Event()
    def compile():
        with prepare.global_compiler_lock:
            compiling.set()
            threading.Event().wait(0.2)
    thread = threading.Thread(target=compile)
    thread.start()
    compiling.wait()
    in_child(lambda: prepare.njit(lambda x: x + 1)(1))
    thread.join()
"""


@layers
def test_threads_and_forked_children(layer):
    python(STEPS + THREADS + (FORKS + COMPILING if hasattr(os, "fork") else ""), **LAYERS[layer])


FIRST = """
{parent}
def compute():
    {child}
    steps(0)
    import fastbn
    assert fastbn.get_num_threads() == {threads}
in_child(compute)
"""
NUMBA = """
import numba
@numba.njit(parallel=True)
def double(x):
    for i in numba.prange(len(x)):
        x[i] *= 2
double(np.ones(100000))
"""
OPENMP = "import ctypes; ctypes.CDLL('libgomp.so.1')"
# The parent is gone when its child imports fastbn, which another process has adopted.
ORPHAN = """
receive, send = os.pipe()
def daemon():
    parent = os.getpid()
    if not os.fork():
        while os.getppid() == parent:
            threading.Event().wait(0.01)
        try:
            compute()
            os.write(send, b"right")
        finally:
            os._exit(0)
in_child(daemon)
os.close(send)
assert os.read(receive, 9) == b"right"
"""
PARENTS = {
    "nothing": ("", "", "fastbn._engine.usable_cpus()"),
    "nothing, but the child has OpenMP": ("", OPENMP, "fastbn._engine.usable_cpus()"),
    "OpenMP": (OPENMP, "", "1"),
    "Numba": (NUMBA, "", "1"),
}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux tells")
@pytest.mark.parametrize("parent", PARENTS)
def test_a_child_that_is_the_first_to_import_fastbn(parent):
    """OpenMP threads that the parent had are gone, although nothing in fastbn saw it use them."""
    before, child, threads = PARENTS[parent]
    layer = LAYERS["omp" if parent == "Numba" else "cython"]
    python(STEPS + FIRST.format(parent=before, child=child, threads=threads), **layer)
    orphan = FIRST.replace("in_child(compute)", ORPHAN)
    if parent == "OpenMP":
        python(STEPS + orphan.format(parent=before, child=child, threads=threads), **layer)


WAITING = """
import os, signal, threading, warnings
import numpy as np
import fastbn
from fastbn.backends import numba_
from numba.core.compiler_lock import global_compiler_lock

warnings.simplefilter("ignore")  # newer Pythons warn of any fork beside threads
held, done = threading.Event(), threading.Event()
def compile():
    with global_compiler_lock:
        held.set()
        done.wait()
threading.Thread(target=compile).start()
held.wait()
def interrupt(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
signal.setitimer(signal.ITIMER_REAL, 0.2)
child = os.fork()
if not child:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(60)
    fastbn.BatchNorm1d(2)(np.eye(2, dtype=np.float32))
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
done.set()
fastbn.BatchNorm1d(2)(np.eye(2, dtype=np.float32))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork; CI runs where there is")
def test_an_interrupt_while_a_fork_waits_for_the_compiler():
    """The child can compile, and the parent does not give back a lock that it has not got."""
    errors = python(WAITING, FASTBN_BACKEND="numba").stderr
    assert errors.count("KeyboardInterrupt") == 1
    assert "un-acquired" not in errors
