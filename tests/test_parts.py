"""Parts of kernels: whichever process compiles them, they are all there in the end, and no process is left."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from subprocesses import python

pytest.importorskip("numba")

from numba import types

from fastbn.backends import numba_  # it imports Numba
from fastbn.backends._numba.compiler import loop
from fastbn.backends._numba.parts import Parts

DOUBLES = types.CPointer(types.float64)
CALLED = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_double))
MODULE = "fastbn.backends._numba.parts"
HERE = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); import test_parts as t; "
HELPS = HERE + "import os; t.some().help_with({!r}, os.getppid())"
TAKES = "from pathlib import Path; [Path({0!r}, str(i) + '.taken').touch() for i in range(3)]; "


def some(helper: str = "") -> Parts:
    """Three parts, compiled by nobody yet, that add 1, 2 and 3 to a number."""

    def add_one(x):
        x[0] += 1.0

    def add_two(x):
        x[0] += 2.0

    def add_three(x):
        x[0] += 3.0

    return Parts([(loop(function), (DOUBLES,)) for function in (add_one, add_two, add_three)], helper.format)


def sums(parts: Parts) -> list[float]:
    """What the parts make of 10."""
    found = []
    for address in parts.table.tolist():
        x, room = ctypes.c_double(10), (ctypes.c_void_p * 2)()
        CALLED(address)(ctypes.addressof(room), ctypes.addressof(room) + 8, x)
        found.append(x.value)
    return found


def compiled_here(parts: Parts) -> int:
    return sum(bool(function.overloads) for function, _ in parts._functions)


@pytest.fixture
def two_cpus(monkeypatch):
    monkeypatch.setattr(f"{MODULE}.usable_cpus", lambda: 2)


@pytest.mark.usefixtures("two_cpus")
def test_another_process_compiles():
    with some(HELPS) as parts:
        parts.begin()
        (other,) = parts._others
        assert other.wait(60) == 0
        parts.finish()
        assert compiled_here(parts) == 0
    assert sums(parts) == [11, 12, 13]
    assert not parts._folder.exists()


@pytest.mark.usefixtures("two_cpus")
def test_each_part_is_compiled_by_one_process():
    """And what the other has compiled can be packed as what was compiled here can."""
    with some(HELPS) as parts:
        parts.begin()
        while not list(parts._folder.glob("*.taken")):
            time.sleep(0.001)
        parts.finish()
        assert compiled_here(parts) + len(list(parts._folder.glob("*.part"))) == 3
        packed = parts.packed()
    again = some()
    again.load(packed)
    assert sums(again) == sums(parts) == [11, 12, 13]
    assert compiled_here(again) == 0


HELPERS = {
    "fails": "raise SystemExit(1)",
    "takes parts and fails": TAKES + "raise SystemExit(1)",
    "takes parts and writes what is none": TAKES + "Path({0!r}, '0.part').write_bytes(b'(garbage')",
    "takes parts and hangs": TAKES + "import time; time.sleep(600)",
    "loses the folder": "import shutil; shutil.rmtree({!r})",
}


@pytest.mark.usefixtures("two_cpus")
@pytest.mark.parametrize("helper", HELPERS)
def test_a_process_that_is_of_no_help(helper, monkeypatch):
    monkeypatch.setattr(f"{MODULE}.PATIENCE", 0.2)
    with some(HELPERS[helper]) as parts:
        parts.begin()
        (other,) = parts._others
        time.sleep(0.5)
        parts.finish()
        assert compiled_here(parts) == 3
    assert sums(parts) == [11, 12, 13]
    assert other.poll() is not None


NO_HELP = {
    "one CPU": lambda patch: patch.setattr(f"{MODULE}.usable_cpus", lambda: 1),
    "no such program": lambda patch: patch.setattr(sys, "executable", "/nowhere/python3"),
    "another program": lambda patch: patch.setattr(sys, "executable", "/usr/sbin/server"),
    "no program": lambda patch: patch.setattr(sys, "executable", None),
    "an application": lambda patch: patch.setattr(sys, "frozen", True, raising=False),
    "no folder": lambda patch: patch.setattr(f"{MODULE}.TemporaryDirectory", no_folder),
}


def no_folder(**_: object) -> None:
    raise FileNotFoundError("No usable temporary directory found")


@pytest.mark.usefixtures("two_cpus")
@pytest.mark.parametrize("reason", NO_HELP)
def test_without_another_process(reason, monkeypatch):
    NO_HELP[reason](monkeypatch)
    with some(HELPS) as parts:
        parts.begin()
        assert not parts._others
        parts.finish()
    assert sums(parts) == [11, 12, 13]


@pytest.mark.usefixtures("two_cpus")
def test_no_process_is_left_by_an_interrupt():
    parts = some(HELPERS["takes parts and hangs"])
    with suppress(KeyboardInterrupt), parts:
        parts.begin()
        raise KeyboardInterrupt
    assert parts._others[0].poll() is not None
    assert not parts._folder.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="children do not learn there that their parent has gone")
@pytest.mark.parametrize("parents", ((2, 2), (1, 2, 2), (1, 1, 1, 2)), ids=("at once", "meanwhile", "at the end"))
def test_a_process_that_is_left_alone_clears_up(tmp_path, monkeypatch, parents):
    parents = iter(parents)
    monkeypatch.setattr(f"{MODULE}.os.getppid", lambda: next(parents))
    folder = tmp_path / "shared"
    folder.mkdir()
    some().help_with(str(folder), 1)
    assert not folder.exists()


@pytest.mark.parametrize("last", ([], [("add_three", b"no library")]), ids=("missing", "spoilt"))
def test_parts_are_loaded_all_or_not_at_all(last):
    again = some()
    with pytest.raises((ValueError, TypeError)):
        again.load([*some().packed()[:2], *last])
    assert not again.table.any()
    again.finish()
    assert sums(again) == [11, 12, 13]


INTERRUPTED = """
import fastbn.backends._numba.compiler as compiler

make = compiler._part

def interrupt(function):
    if function.__name__ == "last_row":  # the last but one of its module
        raise KeyboardInterrupt
    return make(function)

compiler._part = interrupt
try:
    import fastbn.backends.numba_
except KeyboardInterrupt:
    print("interrupted")
compiler._part = make
"""
PLACES = """
from fastbn.backends import numba_
from fastbn.backends._numba import compiler
print([function.__name__ for function, _ in compiler.parts_in_order()])
"""


def test_an_interrupted_import_is_taken_up_again():
    """And every process has the same functions in the same places of a kernel's table."""
    expected = python(PLACES).stdout.splitlines()
    assert "last_row" in expected[0]
    assert python(INTERRUPTED + PLACES).stdout.splitlines() == ["interrupted", *expected]


def test_a_process_with_other_code_takes_nothing(tmp_path):
    numba_.help_with("float32", str(tmp_path), "another key", os.getppid())
    assert not list(tmp_path.iterdir())
