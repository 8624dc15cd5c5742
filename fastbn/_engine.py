"""Which backend computes, on how many threads, and what this machine looks like.

A backend is a module of `fastbn.backends` with the same few kernels. None is imported before a kernel is needed.
"""

from __future__ import annotations

import functools
import importlib
import os
import platform
import sys
import threading
from _thread import start_new_thread
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from fastbn._arrays import described
from fastbn._memory import get_pool_limit

BACKENDS = {
    "numba": "fastbn.backends.numba_",
    "cython": "fastbn.backends.cython_",
    "numpy": "fastbn.backends.numpy_",
}

# The process-wide choice, resolved at first use, and the one of a `use_backend` block (own to its thread or task).
_default: Any = None
_choosing = threading.Lock()
_override: ContextVar[Any] = ContextVar("fastbn_backend", default=None)
_num_threads = 0  # 0: not resolved yet
_one_thread: ContextVar[bool] = ContextVar("fastbn_one_thread", default=False)


def kernels() -> Any:
    """The backend module in force."""
    return _override.get() or _default or _resolve_default()


def _resolve_default() -> Any:
    global _default
    chosen = os.environ.get("FASTBN_BACKEND", "").strip()
    found = _load(chosen, "FASTBN_BACKEND: ") if chosen else _first_available()
    with _choosing:  # meanwhile, which may be seconds, another thread may have said what it wants
        _default = _default or found
        return _default


def _load(name: str, context: str = "") -> Any:
    """Import a backend by its name; an unknown or unusable one is an error that says what could be had."""
    if not isinstance(name, str):
        raise TypeError(f"{context}backend must be a str, one of {', '.join(BACKENDS)}; got {type(name).__name__}")
    if name not in BACKENDS:
        raise ValueError(f"{context}unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    try:
        return importlib.import_module(BACKENDS[name])
    except Exception as error:
        available = ", ".join(available_backends())
        raise RuntimeError(
            f"{context}backend {name!r} cannot be used here ({error}); available: {available}"
        ) from error


def _first_available() -> Any:
    return importlib.import_module(BACKENDS[available_backends()[0]])


@functools.cache
def _why_not(name: str) -> str | None:
    """Why a backend cannot be imported, None where it can be."""
    try:
        importlib.import_module(BACKENDS[name])
    except Exception as error:  # noqa: BLE001  # a library that cannot be loaded, a setting that is not understood
        return f"{type(error).__name__}: {error}"
    return None


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can be imported here, in order of preference.

    Returns
    -------
    tuple of str
        Some of ``"numba"``, ``"cython"``, ``"numpy"``; the last is always there.
    """
    return tuple(name for name in BACKENDS if _why_not(name) is None)


def set_backend(name: str) -> None:
    """Choose the backend for the whole process.

    Parameters
    ----------
    name : {"numba", "cython", "numpy"}

    Raises
    ------
    TypeError, ValueError
        If the name is no string, or unknown.
    RuntimeError
        If this backend cannot be imported here.

    Whatever is raised, the choice in force stays.
    """
    global _default
    backend = _load(name)
    with _choosing:
        _default = backend


def get_backend() -> str:
    """Name of the backend in force: ``"numba"``, ``"cython"`` or ``"numpy"``."""
    return str(kernels().NAME)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend inside a ``with`` block, for the current thread (or asyncio task) only.

    Parameters
    ----------
    name : {"numba", "cython", "numpy"}
        As for `set_backend`, with the same errors.
    """
    token = _override.set(_load(name))
    try:
        yield
    finally:
        _override.reset(token)


def warmup() -> None:
    """Prepare the kernels of all functions and layers: Numba compiles them, or loads them from its cache on disk.

    Left out are those that measure images, one for each dtype and mostly not needed: `Moments` prepares one at the
    first update with values of that dtype, which takes a second or two if it is not in the cache.
    """
    kernels().warmup()


def usable_cpus() -> int:
    """Number of CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(os.getpid()))  # as at its start, whatever a thread that asks is pinned to
    return os.cpu_count() or 1


def set_num_threads(n: int) -> None:
    """Set the number of threads that both compiled backends use.

    Results are bitwise the same for any number of threads.

    Parameters
    ----------
    n : int
        From 1 to the number of usable CPUs.

    Raises
    ------
    TypeError, ValueError
        If `n` is no integer, or out of range. The setting in force stays.
    """
    global _num_threads
    _num_threads = _checked_threads(n, "number of threads")


def get_num_threads() -> int:
    """Number of threads that the compiled backends use: `set_num_threads`, else ``FASTBN_NUM_THREADS``, else all CPUs.

    A child process made by ``os.fork`` computes on one thread, whatever is set, because the OpenMP runtimes do not
    survive a fork: they would hang it, or end it. So does, on Linux, a forked child that imports fastbn first, where
    its parent had such a runtime.
    """
    global _num_threads
    if _forked or _one_thread.get():
        return 1
    if not _num_threads:
        text = os.environ.get("FASTBN_NUM_THREADS", "").strip()
        _num_threads = _threads_from_text(text) if text else usable_cpus()
    return _num_threads


class _Startable(threading.local):
    most = 1  # threads that have run at once, the one that asks among them


_startable = _Startable()


def can_start(threads: int) -> bool:
    """Whether so many threads can run at once, the calling one among them.

    Where they cannot, OpenMP ends the process, and Numba's workqueue waits for them for ever. Tried once in every
    thread, since OpenMP makes a team for each: 0.1 ms for 2 threads, 1.3 for 16, where OpenMP takes 0.1 and 0.5.
    """
    return threads <= _startable.most or _tried_to_start(threads)


def _tried_to_start(threads: int) -> bool:
    gate, passed, started = threading.Lock(), threading.Semaphore(0), 0

    def other() -> None:
        with gate:
            passed.release()

    try:
        with gate:
            for _ in range(threads - 1):
                start_new_thread(other, ())
                started += 1
    except (RuntimeError, MemoryError):
        return False
    finally:
        for _ in range(started):
            passed.acquire()
    _startable.most = threads
    return True


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread inside a ``with`` block: for tasks of an engine that runs many of them at a time."""
    token = _one_thread.set(True)
    try:
        yield
    finally:
        _one_thread.reset(token)


def _threads_from_text(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise ValueError(f"FASTBN_NUM_THREADS must be an integer from 1 to {usable_cpus()}, got {text!r}") from None
    return _checked_threads(number, "FASTBN_NUM_THREADS")


def _checked_threads(n: int, what: str) -> int:
    if isinstance(n, bool) or not isinstance(n, int | np.integer):
        raise TypeError(f"{what} must be an integer, got {type(n).__name__}")
    if not 1 <= n <= usable_cpus():
        raise ValueError(f"{what} must be from 1 to {usable_cpus()}, the number of usable CPUs; got {described(n)}")
    return int(n)


def _forked_from_threads() -> bool:
    """Whether this process came by a fork, without an exec since, from one that had OpenMP threads to lose.

    That is the case of a child which is the first to import fastbn. Linux tells; elsewhere nobody does.
    """
    try:
        with open("/proc/self/stat") as file:
            flags = int(file.read().rpartition(")")[2].split()[6])
        if not flags & 0x40 or not _has_openmp("self"):  # PF_FORKNOEXEC
            return False
    except (OSError, ValueError, IndexError):
        return False
    try:
        # What the parent has not was loaded here, and is whole. Orphans are adopted, by process 1 or another program.
        parent = str(os.getppid())
        adopted = parent == "1" or os.readlink(f"/proc/{parent}/exe") != os.readlink("/proc/self/exe")
        return adopted or _has_openmp(parent)
    except OSError:
        return True


def _has_openmp(process: str) -> bool:
    with open(f"/proc/{process}/maps") as file:
        libraries = file.read()
    return any(name in libraries for name in ("libgomp", "libomp", "libiomp5"))


_forked = _forked_from_threads()


def _after_fork_in_child() -> None:
    """Another thread of the parent may have held the lock."""
    global _choosing, _forked
    _choosing = threading.Lock()
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


@functools.cache
def cache_bytes(level: int) -> int:
    """Size of the level 2 or 3 cache in bytes, or a common one where the system does not say."""
    try:
        with open(f"/sys/devices/system/cpu/cpu0/cache/index{level}/size") as file:
            return int(file.read().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return {2: 1 << 20, 3: 16 << 20}[level]


@functools.cache
def _cpuinfo(*keys: str) -> str:
    """The first line of the system's description of its CPUs that begins with one of the keys, if any."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line for line in file if line.startswith(keys)), "")
    except OSError:
        return ""


@functools.cache
def is_intel() -> bool:
    """Whether the CPU is Intel's, as far as the system says."""
    return "GenuineIntel" in (_cpuinfo("vendor_id") or platform.processor())


def cpu_features() -> str:
    """The vector instruction sets that matter here, or the architecture's name."""
    words = set(_cpuinfo("flags", "Features").split())
    known = ("sse2", "avx", "fma", "avx2", "avx512f", "avx512dq", "avx512bw", "avx512vl", "asimd", "sve")
    return " ".join(word for word in known if word in words) or platform.machine()


def show_config() -> None:
    """Print versions, backends, threads and their layer, CPU features, the pool's limit, the compile cache's folder."""
    from fastbn import __version__

    backend = kernels()
    rows = [
        ("fastbn", __version__),
        ("Python", f"{platform.python_version()} ({sys.platform}, {platform.machine()})"),
        ("NumPy", np.__version__),
        ("backend", f"{backend.NAME} (available: {', '.join(available_backends())})"),
        ("threads", f"{get_num_threads()} of {usable_cpus()} usable CPUs{' (a forked process)' if _forked else ''}"),
        ("CPU features", cpu_features()),
        ("CPU caches", f"L2 {cache_bytes(2) >> 10} KiB, L3 {cache_bytes(3) >> 10} KiB"),
        ("output pool", f"at most {get_pool_limit() / 2**20:g} MiB"),
    ]
    for name, module in BACKENDS.items():
        missing = _why_not(name)
        rows += [(name, f"not available: {missing}")] if missing else importlib.import_module(module).describe()
    width = max(len(key) for key, _ in rows)
    for key, value in rows:
        print(f"{key:<{width}}  {value}")
