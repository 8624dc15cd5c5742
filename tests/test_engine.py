"""Choice of backend and threads, by call and by environment variable."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from conftest import BACKENDS, CPUS
from subprocesses import python

import fastbn
from fastbn import _engine


@pytest.fixture
def keep_backend() -> Iterator[None]:
    name = fastbn.get_backend()
    yield
    fastbn.set_backend(name)


@pytest.mark.usefixtures("keep_backend")
def test_set_backend_stays_and_use_backend_does_not():
    available = fastbn.available_backends()
    assert available == tuple(name for name in BACKENDS if name in available)
    for name in available:
        fastbn.set_backend(name)
        for other in available:
            with fastbn.use_backend(other):
                assert fastbn.get_backend() == other
            assert fastbn.get_backend() == name
        with pytest.raises(ZeroDivisionError), fastbn.use_backend("numpy"):
            1 / 0  # noqa: B018
        assert fastbn.get_backend() == name


@pytest.mark.usefixtures("keep_backend")
def test_use_backend_is_own_to_its_thread():
    fastbn.set_backend(fastbn.available_backends()[0])
    seen = []
    with fastbn.use_backend("numpy"):
        thread = threading.Thread(target=lambda: seen.append(fastbn.get_backend()))
        thread.start()
        thread.join()
    assert seen == [fastbn.available_backends()[0]]


@pytest.mark.usefixtures("keep_backend")
def test_a_choice_made_while_another_thread_looks_for_the_default_stays(monkeypatch):
    found, chosen = threading.Event(), threading.Event()

    def slow():
        found.set()
        chosen.wait(10)
        return "another"

    monkeypatch.setattr(_engine, "_default", None)
    monkeypatch.setattr(_engine, "_first_available", slow)
    monkeypatch.delenv("FASTBN_BACKEND", raising=False)
    thread = threading.Thread(target=_engine.kernels)
    thread.start()
    found.wait(10)
    fastbn.set_backend("numpy")
    chosen.set()
    thread.join()
    assert fastbn.get_backend() == "numpy"


@pytest.mark.parametrize("choose", (fastbn.set_backend, lambda name: fastbn.use_backend(name).__enter__()))
@pytest.mark.parametrize(
    "name, error, word", (("torch", ValueError, "'torch'"), ("", ValueError, "''"), (3, TypeError, "int"))
)
def test_unknown_backend(choose, name, error, word):
    before = fastbn.get_backend()
    with pytest.raises(error, match="numba, cython, numpy") as raised:
        choose(name)
    assert word in str(raised.value)
    assert fastbn.get_backend() == before


@pytest.mark.parametrize("name", BACKENDS)
def test_backend_of_the_environment(name):
    assert python("import fastbn; print(fastbn.get_backend())", FASTBN_BACKEND=name).stdout.strip() == name


def test_unknown_backend_of_the_environment():
    result = python("import fastbn; fastbn.get_backend()", check=False, FASTBN_BACKEND="torch")
    for word in ("ValueError", "FASTBN_BACKEND", "'torch'", "numba, cython, numpy"):
        assert word in result.stderr


HIDE = "import sys; sys.modules.update(dict.fromkeys({modules}))\n"


@pytest.mark.parametrize(
    "hidden, left",
    ((("numba",), ("cython", "numpy")), (("fastbn_ext",), ("numba", "numpy")), (("numba", "fastbn_ext"), ("numpy",))),
)
def test_the_first_that_can_be_imported_is_used(hidden, left):
    code = "import fastbn; print(*fastbn.available_backends(), fastbn.get_backend())"
    assert python(HIDE.format(modules=hidden) + code).stdout.split() == [*left, left[0]]


@pytest.mark.parametrize("name, module", (("numba", "numba"), ("cython", "fastbn_ext")))
def test_an_explicit_choice_that_cannot_be_had_is_an_error(name, module):
    hide = HIDE.format(modules=(module,))
    by_call = python(hide + f"import fastbn; fastbn.set_backend({name!r})", check=False)
    by_environment = python(
        hide + "import fastbn; fastbn.BatchNorm1d(3)([[1., 2, 3]] * 4)", check=False, FASTBN_BACKEND=name
    )
    for result in (by_call, by_environment):
        for word in ("RuntimeError", repr(name), "cannot be used", "numpy"):
            assert word in result.stderr
    assert "FASTBN_BACKEND" in by_environment.stderr


@pytest.mark.usefixtures("keep_threads")
def test_set_num_threads():
    for n in (1, np.int64(CPUS)):
        fastbn.set_num_threads(n)
        assert fastbn.get_num_threads() == n
        assert type(fastbn.get_num_threads()) is int


@pytest.mark.parametrize(
    "n, error",
    (
        (0, ValueError),
        (-1, ValueError),
        (CPUS + 1, ValueError),
        (1.0, TypeError),
        ("1", TypeError),
        (None, TypeError),
        (True, TypeError),
    ),
)
@pytest.mark.usefixtures("keep_threads")
def test_number_of_threads_out_of_range(n, error):
    fastbn.set_num_threads(1)
    with pytest.raises(error, match="threads") as raised:
        fastbn.set_num_threads(n)
    assert (
        (f"1 to {CPUS}" in str(raised.value) and str(n) in str(raised.value))
        if error is ValueError
        else type(n).__name__ in str(raised.value)
    )
    assert fastbn.get_num_threads() == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux pins threads; CI runs there")
def test_a_thread_that_is_pinned_leaves_the_others_their_cpus():
    code = f"""
import os, threading, fastbn
def pinned():
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    assert fastbn.get_num_threads() == {CPUS}
    fastbn.set_num_threads({CPUS})
thread = threading.Thread(target=pinned)
thread.start()
thread.join()
assert fastbn.get_num_threads() == {CPUS}
"""
    assert not python(code).stderr


@pytest.mark.parametrize("text, threads", (("", CPUS), (" ", CPUS), ("1", 1), (f" {CPUS} ", CPUS)))
def test_threads_of_the_environment(text, threads):
    result = python("import fastbn; print(fastbn.get_num_threads())", FASTBN_NUM_THREADS=text)
    assert int(result.stdout) == threads


@pytest.mark.parametrize("text", ("0", str(CPUS + 1), "-1", "1.5", "many"))
def test_nonsense_in_the_environment_is_an_error(text):
    code = "import fastbn; fastbn.BatchNorm1d(3)([[1., 2, 3]] * 4)"
    result = python(code, check=False, FASTBN_NUM_THREADS=text, FASTBN_BACKEND="cython")
    for word in ("ValueError", "FASTBN_NUM_THREADS", f"1 to {CPUS}", text):
        assert word in result.stderr


def test_show_config(capsys):
    fastbn.show_config()
    shown = capsys.readouterr().out
    for word in (fastbn.__version__, np.__version__, fastbn.get_backend(), f"{fastbn.get_num_threads()} of {CPUS}"):
        assert word in shown
    if "numba" in fastbn.available_backends():
        for word in ("threading layer", "CPU features", "cache"):
            assert word in shown


def test_show_config_names_a_threading_layer_before_anything_ran():
    if "numba" not in fastbn.available_backends():
        pytest.skip("needs numba")
    layer = r"threading layer: (omp|tbb|workqueue),"
    assert re.search(layer, python("import fastbn; fastbn.show_config()").stdout)
    shown = python("import fastbn; fastbn.show_config()", NUMBA_THREADING_LAYER="none").stdout
    assert "threading layer: none (" in shown
