"""The kernels in Numba: adapters over `_numba`, which has the kernels and their design."""

from __future__ import annotations

import functools
import os
from typing import Any

import numba
import numpy as np
from numba import config, types
from numba.core.registry import cpu_target
from numba.np.numpy_support import from_dtype

from fastbn._arrays import FLOATS
from fastbn.backends import _plan
from fastbn.backends._numba import (
    buffers,
    channels,
    columns,
    compiler,
    job,
    kernel,
    output,
    points,
    prepare,
    rows,
    shares,
    vectors,
)
from fastbn.backends._numba.cache import digest_of, file_name, folders, writable_folder
from fastbn.backends._numba.compiler import FLAG, parts_in_order
from fastbn.backends._numba.job import Job, kinds_of
from fastbn.backends._numba.parts import Parts
from fastbn.backends._numba.prepare import kept, layer, once, one_at_a_time, prepared
from fastbn.backends._operations import Operations
from fastbn.backends._plan import LANES, THREADS

NAME = "numba"

# All that kernels are compiled from.
SOURCES = (channels, points, rows, output, columns, kernel, shares, vectors, compiler, prepare, buffers, job, _plan)
_SOURCE = digest_of(SOURCES)


@once
def _compiled(real: np.dtype[Any]) -> Any:
    """The kernel for this dtype: from the compile cache, or compiled now and put there if it can be written."""
    kinds = kinds_of(from_dtype(real))
    pointed = (
        buffers.Buffer(kind.dtype) if isinstance(kind, types.CPointer) else kind
        for kind in map(kinds.get, job.ARGUMENTS)
    )
    *arguments, table = pointed
    signature = types.void(table, FLAG, FLAG, FLAG, buffers.Buffer(types.intp), *arguments)
    with _parts_of(real) as parts:
        function = prepared(kernel.kernel, f"kernel-{real}", _SOURCE, signature, parts, parallel=True)
        parts.finish()
    kept.append(parts)
    return functools.partial(one_at_a_time(function, lambda arguments: arguments[4][THREADS]), parts.table)


def _parts_of(real: np.dtype[Any]) -> Parts:
    job = Job(from_dtype(real))
    functions = [(function, (job, *kinds)) for function, kinds in parts_in_order()]
    return Parts(
        functions,
        lambda folder: f"import {__name__} as n; n.help_with({real.name!r}, {folder!r}, {_key()!r}, {os.getpid()})",
    )


def _key() -> str:
    """What all that is compiled follows from."""
    return file_name("part", "", cpu_target.target_context.codegen(), str(_SOURCE))


def help_with(dtype: str, folder: str, key: str, parent: int) -> None:
    """Compile parts of a kernel for another process, whose `_key` and number these are."""
    if key == _key():
        _parts_of(np.dtype(dtype)).help_with(folder, parent)


@functools.cache
def _most_threads() -> int:
    return int(config.NUMBA_NUM_THREADS)


def warmup() -> None:
    """Compile the kernel of each dtype, or load it from the compile cache; those of `images` wait for their dtype."""
    for dtype in FLOATS:
        _compiled(dtype)


def _image_kernel_of(dtype: np.dtype[Any]) -> Any:
    from fastbn.backends._numba.images import kernel_of

    return kernel_of(dtype)


_operations = Operations(_compiled, _most_threads, lambda _: LANES, _image_kernel_of)
sign_words, moments, forward, transform = (
    _operations.sign_words,
    _operations.moments,
    _operations.forward,
    _operations.transform,
)
backward, gradient_sums, gradient_apply = (
    _operations.backward,
    _operations.gradient_sums,
    _operations.gradient_apply,
)


def describe() -> list[tuple[str, str]]:
    """What `show_config` says about this backend."""
    folder = writable_folder()
    try:
        threading = layer()
    except (ValueError, RuntimeError) as error:
        threading = f"none ({' '.join(str(error).split())})"
    cache = str(folder) if folder else f"none, for {' and '.join(map(str, folders()))} cannot be written"
    return [
        ("Numba", f"{numba.__version__}, threading layer: {threading}, at most {config.NUMBA_NUM_THREADS} threads"),
        ("compile cache", cache if _SOURCE else "none, for the kernels' code cannot be read again"),
    ]
