"""How a kernel becomes a callable: compiled or loaded once in a process, and called when it may be."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numba
from numba import config, njit
from numba.core.compiler_lock import global_compiler_lock

from fastbn._engine import can_start
from fastbn.backends._numba.buffers import entry_of
from fastbn.backends._numba.cache import Cache
from fastbn.backends._numba.parts import Parts

kept: list[Any] = []  # functions and parts whose machine code is called: it goes with the last reference to them
_workqueue = threading.RLock()  # a signal's handler may interrupt a call, and call

_forking = threading.local()


def _before_fork() -> None:
    """Wait until no thread compiles: what it leaves half made would stay so in the child. Ctrl-C ends the waiting."""
    _forking.holds = False
    global_compiler_lock.acquire()
    _forking.holds = True


def _after_fork() -> None:
    if _forking.holds:
        global_compiler_lock.release()


def _after_fork_in_child() -> None:
    """Without the lock: a thread that there is no more may have it."""
    if not _forking.holds:
        type(global_compiler_lock).__init__(global_compiler_lock)
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def once(make: Callable[..., Any]) -> Callable[..., Any]:
    """`functools.cache` of what is compiled: other threads wait for it, instead of compiling it once more."""
    made = functools.cache(make)

    @functools.cache
    def compiled(*arguments: Any) -> Any:
        with global_compiler_lock:
            return made(*arguments)

    return compiled


def prepared(
    python: Any, name: str, source: str | None, signature: Any, parts: Parts | None = None, *, parallel: bool = False
) -> Any:
    """A Numba function with one signature, compiled or loaded, and with it the `parts` that it calls."""
    function = njit(nogil=True, error_model="numpy", parallel=parallel)(python)
    if source is not None:
        function._cache = Cache(name, source, parts or Parts())
    try:
        if parallel:
            layer()
        function.compile(signature)
    except ValueError as error:
        settings = f"NUMBA_THREADING_LAYER is {config.THREADING_LAYER!r}, NUMBA_THREADING_LAYER_PRIORITY "
        settings += repr(" ".join(config.THREADING_LAYER_PRIORITY))
        raise RuntimeError(f"Numba cannot prepare the kernels ({settings}): {error}") from error
    function.disable_compile()
    return function


def one_at_a_time(function: Any, threads_of: Callable[[tuple[Any, ...]], int]) -> Any:
    """The compiled form of a function, whose parallel loops wait for each other where two at once end the process.

    That is on the layer `workqueue`. Loops of other packages cannot be held up there, nor held off.
    """
    kept.append(function)
    kernel = entry_of(function)
    if layer() != "workqueue":
        return kernel

    def wait(*arguments: Any) -> None:
        with _workqueue if threads_of(arguments) > 1 else nullcontext():
            kernel(*arguments)

    return wait


def layer() -> str:
    """Numba's threading layer, which starts here if it has not; raises ValueError where there is none.

    And RuntimeError where its threads cannot be started, which workqueue would not notice.
    """
    if config.THREADING_LAYER == "workqueue" and not can_start(config.NUMBA_NUM_THREADS):
        raise RuntimeError(f"Numba's layer workqueue cannot start its {config.NUMBA_NUM_THREADS} threads here")
    numba.get_num_threads()
    return str(numba.threading_layer())
