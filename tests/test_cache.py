"""The compile cache: what is found there is what would be compiled, whatever happened to it meanwhile."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from subprocesses import python

pytest.importorskip("numba")

from numba import types

from fastbn.backends import _images, _plan, numba_  # they import Numba
from fastbn.backends._numba import buffers, cache, channels, compiler, images, job, prepare, shares, vectors


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Keep compiled kernels apart."""
    monkeypatch.setattr(cache.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def _halve(x, n):
    for i in range(n):
        x[i] *= 0.5


def compiled() -> str:
    """Compile a small kernel or load it, check what it computes, and say which it was."""
    signature = types.void(buffers.Buffer(types.float32), types.intp)
    kernel = prepare.prepared(_halve, "halve-float32", numba_._SOURCE, signature)
    x = np.full(3, 4, np.float32)
    buffers.entry_of(kernel)(x, 2)
    assert x.tolist() == [2, 2, 4]
    return "loaded" if sum(kernel.stats.cache_hits.values()) else "compiled"


def test_compiled_once_and_loaded_from_then_on(folder):
    assert [compiled() for _ in range(3)] == ["compiled", "loaded", "loaded"]
    (file,) = folder.iterdir()
    assert file.name.startswith("halve-float32-")


FIRST_CALL = """
import sys
import numba
import numpy as np
import fastbn
fastbn.moments(np.ones((2, 3, 8, 8), np.uint8))
print("scipy.linalg" in sys.modules)
inverse = numba.njit(lambda matrix: np.linalg.inv(matrix))
assert (inverse(np.eye(2)) == np.eye(2)).all()
"""


def test_loading_imports_nothing_that_only_compiling_needs(tmp_path):
    """And what others compile afterwards is whole."""
    printed = [python(FIRST_CALL, NUMBA_CACHE_DIR=str(tmp_path)).stdout.strip() for _ in range(2)]
    assert printed == ["True", "False"]


DAMAGE = {
    "empty": lambda content: b"",
    "cut short": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "one bit flipped": lambda content: content[:9000] + bytes([content[9000] ^ 1]) + content[9001:],
    "garbage": lambda content: bytes(range(256)) * 9,
    "longer": lambda content: content + b"x",
    "of someone else": lambda content: cache.hashlib.sha256(b"N.").digest() + b"N.",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_compiled_again(folder, damage):
    compiled()
    (file,) = folder.iterdir()
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    assert [compiled(), compiled()] == ["compiled", "loaded"]


def test_a_folder_in_the_place_of_the_file(folder):
    compiled()
    (file,) = folder.iterdir()
    file.unlink()
    file.mkdir()
    assert compiled() == "compiled"
    assert [path.name for path in folder.iterdir()] == [file.name]


def test_a_file_under_another_kernel_s_name(folder, monkeypatch):
    compiled()
    (file,) = folder.iterdir()
    monkeypatch.setattr(cache, "file_name", lambda *_: "other.fastbn")
    file.rename(folder / "other.fastbn")
    assert [compiled(), compiled()] == ["compiled", "loaded"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes; CI runs where there are")
def test_a_pipe_in_the_place_of_the_file(folder):
    compiled()
    (file,) = folder.iterdir()
    file.unlink()
    os.mkfifo(file)
    assert [compiled(), compiled()] == ["compiled", "loaded"]


def test_without_a_folder_it_is_compiled_each_time(folder, monkeypatch):
    (folder / "file").touch()
    monkeypatch.setattr(cache.config, "CACHE_DIR", str(folder / "file" / "below"))
    assert [compiled(), compiled()] == ["compiled", "compiled"]
    (entry,) = (value for key, value in numba_.describe() if key == "compile cache")
    assert entry.startswith("none")
    assert entry.endswith("below cannot be written")


@pytest.mark.skipif(sys.platform != "linux", reason="caches of Linux; CI runs there, where a skipped test is a failure")
@pytest.mark.parametrize("folders", ({"XDG_CACHE_HOME": ""}, {"XDG_CACHE_HOME": "here"}, {"HOME": "here"}), ids=str)
def test_nothing_in_the_working_directory_is_a_cache(folders, monkeypatch):
    monkeypatch.setattr(cache.config, "CACHE_DIR", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in folders.items():
        monkeypatch.setenv(name, value)
    assert cache.folders() == [Path(cache.__file__).with_name("__pycache__")]


def test_a_disk_that_is_full(folder, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    assert [compiled(), compiled()] == ["compiled", "compiled"]
    assert not list(folder.iterdir())


def test_old_files_go(folder, monkeypatch):
    monkeypatch.setattr(cache, "KEPT", 2)
    for source in "abcd":
        monkeypatch.setattr(numba_, "_SOURCE", source)
        assert compiled() == "compiled"
    assert len(list(folder.iterdir())) == 2
    assert compiled() == "loaded"


def test_another_cpu_compiles_its_own(folder):
    """As on a home that machines of different kinds share."""
    compiled()
    code = (
        f"import sys; sys.path.append({str(Path(__file__).parent)!r}); import test_cache; print(test_cache.compiled())"
    )
    old = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2", "NUMBA_CACHE_DIR": str(folder)}
    assert python(code, **old).stdout.strip() == "compiled"
    assert len(list(folder.iterdir())) == 2
    assert compiled() == "loaded"


def changed(module: ModuleType, before: str, after: str, folder: Path) -> str | None:
    """Digest of a copy of the module whose source has been edited."""
    source = inspect.getsource(module)
    assert before in source
    path = folder / "copy.py"
    path.write_text("# a comment\n\n" + source.replace(before, after, 1))
    spec = importlib.util.spec_from_file_location(module.__name__, path)
    copy = ModuleType(module.__name__)
    copy.__loader__ = spec.loader
    return cache.digest_of([copy])


@pytest.mark.parametrize(
    "module, before, after",
    (
        (vectors, '"llvm.fma."', '"llvm.fmuladd."'),
        (job, '"eps"', '"momentum"'),
        (shares, "count - 1", "count"),
        (compiler, 'error_model="numpy"', 'error_model="python"'),
        (buffers, "icmp_unsigned", "icmp_signed"),
        (prepare, 'error_model="numpy"', 'error_model="python"'),
        (_plan, "LANES = 16", "LANES = 8"),
        (_images, "return 32", "return 64"),
        (channels, "(1.0 - factor) * mean", "(2.0 - factor) * mean"),
        (channels, "def update_running", "def update"),
    ),
)
def test_any_edit_of_what_kernels_are_made_of_is_seen(tmp_path, module, before, after):
    assert changed(module, before, before, tmp_path) == cache.digest_of([module])
    assert changed(module, before, after, tmp_path) != cache.digest_of([module])


@pytest.mark.parametrize("module", (numba_, images))
def test_all_that_kernels_are_made_of_is_looked_at(module):
    """Numba's compiler sees what stands in these modules, and of what they use nothing else says what it makes."""
    own, others = {*module.SOURCES}, {"_engine", "_merge", "cache", "parts"}
    assert prepare in own
    for source in own:
        for name, value in vars(source).items():
            origin = inspect.getmodule(value) if callable(value) else None
            if origin and origin.__name__.startswith("fastbn") and origin not in own:
                assert origin.__name__.rpartition(".")[2] in others, f"{source.__name__} uses {name}"


def test_numba_with_other_code_libraries_compiles_in_its_own_way(monkeypatch):
    assert set(compiler._into(compiler._Fragment)) == {"pipeline_class"}
    monkeypatch.setattr(compiler, "_HOOKS", ("_of_another_version",))
    assert not compiler._into(compiler._Fragment)
