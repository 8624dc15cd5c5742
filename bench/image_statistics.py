"""How fast the statistics of images are taken, beside the fastest reading of them and what others need.

    python -m bench.image_statistics             measure, store bench/results/image_statistics.json, print the table
    python -m bench.image_statistics --tables    print the table of the stored results

Every candidate takes its turn in every round, and the best of its times counts. "Read" is a loop on all threads that
does nothing with the values but exclusive or.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np

import fastbn
from bench import stored
from bench.stored import markdown

BYTES = 100 << 20
ROUNDS = 15


def reader() -> Callable[[np.ndarray], None]:
    """Return a function that reads an array on all threads."""
    from numba import njit, prange

    @njit(parallel=True)
    def read(words: np.ndarray, found: np.ndarray) -> None:
        length = len(words) // len(found)
        for part in prange(len(found)):
            seen = np.uint64(0)
            for word in words[part * length : (part + 1) * length]:
                seen ^= word
            found[part] = seen

    found = np.empty(64, np.uint64)
    return lambda x: read(x.reshape(-1).view(np.uint64), found)


def with_fastbn(backend: str, x: np.ndarray, axis: int) -> None:
    with fastbn.use_backend(backend):
        fastbn.Moments.empty(3).update(x, axis)


def with_sklearn(x: np.ndarray, axis: int) -> None:
    from sklearn.preprocessing import StandardScaler

    StandardScaler().partial_fit(np.moveaxis(x, axis, -1).reshape(-1, 3))


def with_numpy(x: np.ndarray, axis: int) -> None:
    reduced = (0, 1, 2) if axis == -1 else (0, 2, 3)
    x.mean(reduced, np.float64)
    x.var(reduced, np.float64)


def best_times(x: np.ndarray, axis: int, read: Callable[[np.ndarray], None]) -> dict[str, float]:
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: read(x),
        "numba": lambda: with_fastbn("numba", x, axis),
        "cython": lambda: with_fastbn("cython", x, axis),
        "sklearn": lambda: with_sklearn(x, axis),
        "numpy": lambda: with_numpy(x, axis),
    }
    times = dict.fromkeys(calls, float("inf"))
    for turn in range(ROUNDS):
        for name, call in calls.items():
            if turn >= 2 and name in ("sklearn", "numpy"):  # a hundred times as slow
                continue
            begin = time.perf_counter()
            call()
            times[name] = min(times[name], time.perf_counter() - begin)
    return times


def measure() -> dict[str, object]:
    read, rows = reader(), []
    for dtype in (np.float32, np.uint8):
        n = BYTES // (3 * 224 * 224 * np.dtype(dtype).itemsize)
        first = np.random.default_rng(0).integers(0, 256, (n, 3, 224, 224), np.uint8).astype(dtype)
        for x, axis in ((first, 1), (np.ascontiguousarray(first.transpose(0, 2, 3, 1)), -1)):
            times = best_times(x, axis, read)
            rows.append({"dtype": str(x.dtype), "shape": x.shape, "bytes": x.nbytes, "seconds": times})
    names = ("numpy", "numba", "scikit-learn")
    return {"threads": fastbn.get_num_threads(), "versions": {name: version(name) for name in names}, "rows": rows}


def table(results: dict) -> str:
    heads = [f"{results['threads']} threads", "read, GB/s", "Numba, GB/s", "share", "Cython, GB/s", "share"]
    rows = []
    for row in results["rows"]:
        speed = {name: row["bytes"] / seconds / 1e9 for name, seconds in row["seconds"].items()}
        cells = [f"{row['dtype']} {'x'.join(map(str, row['shape']))}", f"{speed['read']:.1f}"]
        for name in ("numba", "cython"):
            cells += [f"{speed[name]:.1f}", f"{speed[name] / speed['read']:.0%}"]
        rows.append([*cells, *(f"{speed['numba'] / speed[name]:.0f}x" for name in ("sklearn", "numpy"))])
    return markdown([*heads, "to partial_fit", "to NumPy"], rows)


if __name__ == "__main__":
    stored.main(__doc__, "image_statistics", measure, table)
