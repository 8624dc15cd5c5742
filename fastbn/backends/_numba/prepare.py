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

from fastbn.backends._numba.buffers import entry_of
from fastbn.backends._numba.cache import Cache
from fastbn.backends._numba.parts import Parts

kept: list[Any] = []  # functions and parts whose machine code is called: it goes with the last reference to them
_workqueue = threading.RLock()  # a signal's handler may interrupt a call, and call

if hasattr(os, "register_at_fork"):  # a child of a thread that compiles would wait for ever for the lock
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


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
    """Numba's threading layer, which starts here if it has not; raises ValueError where there is none."""
    numba.get_num_threads()
    return str(numba.threading_layer())
