"""Compiled kernels on disk: one file a kernel, named after everything that its machine code follows from.

Numba's own cache looks only at the file that a function stands in, so it would go on using kernels compiled from an
older `vectors`; its index can name another kernel's code when two processes write at once; and a damaged file of it
is an error of the call. Here nothing is shared but whole files, put in place in one step: an upgrade, another CPU or
another Numba asks for another name, and what is damaged is compiled again.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import llvmlite
import numba
from numba import config
from numba.core.compiler import CompileResult
from numba.core.runtime import rtsys
from numba.core.serialize import dumps
from numba.misc.appdirs import AppDirs

from fastbn.backends._numba.parts import Parts

KEPT = 8  # files of a kernel, the newest: one for each CPU of a home on the network, none for every version there was
_CHECKSUM = 32  # bytes

# Numba's settings that change what it compiles.
_SETTINGS = ("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "DISABLE_INTEL_SVML")


def folders() -> list[Path]:
    """Where compiled kernels may lie: ``NUMBA_CACHE_DIR``, else beside the package, else with the user's caches.

    Without a home, or with an ``XDG_CACHE_HOME`` that is no absolute path, the last would be in the working directory,
    which may be anyone's: what lies there is not to be run.
    """
    if config.CACHE_DIR:
        return [Path(config.CACHE_DIR)]
    user = Path(AppDirs("fastbn", appauthor=False).user_cache_dir)
    return [Path(__file__).with_name("__pycache__"), *([user] if user.is_absolute() else [])]


def writable_folder() -> Path | None:
    """The folder that new files go to, if there is one."""
    for folder in folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError:
            continue
        return folder
    return None


def digest_of(modules: Iterable[ModuleType]) -> str | None:
    """Digest of the modules' code, which need not be there as source; None where their loader does not give it."""
    digest = hashlib.sha256()
    for module in modules:
        get_code = getattr(module.__loader__, "get_code", None)
        code = get_code(module.__name__) if get_code else None
        if code is None:
            return None
        for part in _parts(code):
            digest.update(part.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _parts(code: CodeType) -> Iterator[str]:
    """What a code object does, without where it came from."""
    yield repr((code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts(constant)
        else:
            yield repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)


class Cache:
    """What a Numba dispatcher asks before it compiles, and tells afterwards. No failure here is one of the call."""

    cache_path = None  # that Numba's own statistics would show

    def __init__(self, name: str, source: str, parts: Parts) -> None:
        self._name = name
        self._source = source
        self._parts = parts

    def load_overload(self, signature: Any, target: Any) -> Any:
        """The compiled kernel, or None."""
        rtsys.initialize(target)  # all of `refresh` that kernels need; the rest takes up to 0.6 seconds
        for folder in folders():
            try:
                path = folder / self._file(signature, target.codegen())
                content = path.read_bytes() if path.is_file() else b""  # to read from a pipe may take for ever
                data = content[_CHECKSUM:]
                if _checksum(path, data) == content[:_CHECKSUM]:
                    parts, kernel = pickle.loads(data)  # noqa: S301  # as trusted as code
                    self._parts.load(parts)
                    return CompileResult._rebuild(target, *kernel)
            except Exception:  # noqa: BLE001, S112  # of another version, or damaged in a way nobody foresaw
                continue
        self._parts.begin()
        return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Put the compiled kernel on disk, where that is possible."""
        try:
            folder = writable_folder()
            if folder is None or compiled.library.has_dynamic_globals:
                return
            parts = self._parts.packed()
            if parts is None:
                return
            data = dumps((parts, compiled._reduce()))
            path = folder / self._file(signature, compiled.codegen)
            unfinished = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
            try:
                unfinished.write_bytes(_checksum(path, data) + data)
                unfinished.replace(path)
            finally:
                unfinished.unlink(missing_ok=True)
            others = sorted(folder.glob(f"{self._name}-*.fastbn"), key=os.path.getmtime)
            for old in itertools.islice(others, max(0, len(others) - KEPT)):
                old.unlink()
        except Exception:  # noqa: BLE001, S110  # a full disk, a folder that has just gone: the kernel is there anyway
            pass

    def _file(self, signature: Any, codegen: Any) -> str:
        return file_name(self._name, signature, codegen, self._source)


def _checksum(path: Path, data: bytes) -> bytes:
    """Of a file's name too: what is copied under another kernel's is none."""
    return hashlib.sha256(path.name.encode() + data).digest()


def file_name(name: str, signature: Any, codegen: Any, source: str) -> str:
    """A file's name: it says all that the machine code in it follows from."""
    settings = [getattr(config, name, None) for name in _SETTINGS]
    python = (sys.implementation.cache_tag, getattr(sys, "abiflags", ""), object.__basicsize__)
    versions = (numba.__version__, llvmlite.__version__, *python)
    key = repr((versions, settings, str(signature), codegen.magic_tuple(), source))
    return f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.fastbn"
