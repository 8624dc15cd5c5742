"""How near the truth batch norm comes, beside other libraries: the table of docs/numerics.md.

    python -m bench.numerics            measure, store bench/results/numerics.json, write the table
    python -m bench.numerics --table    write the table of what is stored

The truth is the textbook's formulas in extended precision (tests/reference.py), on the very values that every library
gets. Two errors, the largest of all channels: of the variance, relative to it; of the training output, in parts of its
largest value. Where a channel is constant, its variance is 0 and its output the bias: there the errors are absolute.
PyTorch and JAX are given both dtypes as a user would; NumPy is ``x.mean()`` and ``x.var()`` in x's dtype.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from cases import Case
from reference import batch_norm as reference

import fastbn

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "bench" / "results" / "numerics.json"
PAGE = ROOT / "docs" / "numerics.md"
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
LAYOUTS = {"NCHW": Case((16, 8, 24, 24)), "channels last": Case((16, 24, 24, 8), axis=-1)}
TINY = 1e-300  # none to speak of: errors of the variance are not to be hidden behind it
OURS = ("numba", "cython", "numpy")
PEERS = ("PyTorch", "JAX", "NumPy")


class Data(NamedTuple):
    """A row: what is in the channels."""

    name: str
    mean: float
    std: float
    dtypes: tuple[str, ...] = ("float32", "float64")


ROWS = (
    Data("0 / 1", 0.0, 1.0),
    Data("1 / 1", 1.0, 1.0),
    Data("100 / 0.01", 100.0, 0.01),
    Data("1e4 / 1", 1e4, 1.0),
    Data("1e6 / 1", 1e6, 1.0),
    Data("1e10 / 1", 1e10, 1.0, ("float64",)),
    Data("1e15 / 1e15", 1e15, 1e15),
    Data("1e30 / 1e30", 1e30, 1e30),
    Data("1e-18 / 1e-18", 1e-18, 1e-18),
    Data("constant 0.1", 0.1, 0.0),
    Data("constant 1e7 / 3", 1e7 / 3, 0.0),
)

Array = np.ndarray
Function = Callable[[Case, Array, Array, Array, float], tuple[Array, Array]]  # (var, y) of x, weight, bias and eps


def data(row: Data, case: Case, dtype: str) -> tuple[Array, Array, Array]:
    """Draw x, weight and bias; nothing but rounding stands between the channels' means and those of the row."""
    rng = np.random.default_rng(0)
    x = row.mean + row.std * rng.standard_normal(case.shape)
    weight, bias = rng.uniform(0.5, 1.5, case.channels), rng.standard_normal(case.channels)
    return x.astype(dtype), weight.astype(dtype), bias.astype(dtype)


def with_fastbn(name: str) -> Function:
    """A backend of fastbn."""

    def compute(case: Case, x: Array, weight: Array, bias: Array, eps: float) -> tuple[Array, Array]:
        with fastbn.use_backend(name):
            y, _, _ = fastbn.batch_norm_forward(x, weight, bias, eps=max(eps, TINY), axis=case.axis)
            return fastbn.moments(x, axis=case.axis).var(), y

    return compute


def with_torch(case: Case, x: Array, weight: Array, bias: Array, eps: float) -> tuple[Array, Array]:
    """PyTorch: the variance from the invstd that its forward keeps."""
    import torch

    given = torch.tensor(x).movedim(case.axis, 1)
    y, _, invstd = torch.native_batch_norm(given, torch.tensor(weight), torch.tensor(bias), None, None, True, 0.0, eps)
    return invstd.numpy().astype(np.float64) ** -2 - eps, y.movedim(1, case.axis).numpy()


def with_jax(case: Case, x: Array, weight: Array, bias: Array, eps: float) -> tuple[Array, Array]:
    """JAX: two passes, compiled."""
    import jax

    jax.config.update("jax_enable_x64", True)

    def train(x, weight, bias):
        mean = x.mean(case.reduced, keepdims=True)
        var = jax.numpy.square(x - mean).mean(case.reduced, keepdims=True)
        return var, (x - mean) * (jax.lax.rsqrt(var + eps) * weight) + bias

    var, y = jax.jit(train)(x, case.per_channel(weight), case.per_channel(bias))
    return np.asarray(var, np.float64).reshape(-1), np.asarray(y)


def with_numpy(case: Case, x: Array, weight: Array, bias: Array, eps: float) -> tuple[Array, Array]:
    """What one writes in NumPy."""
    mean, var = x.mean(case.reduced, keepdims=True), x.var(case.reduced, keepdims=True)
    y = (x - mean) / np.sqrt(var + x.dtype.type(eps)) * case.per_channel(weight) + case.per_channel(bias)
    return var.astype(np.float64).reshape(-1), y


FUNCTIONS: dict[str, Function] = {
    **{name: with_fastbn(name) for name in OURS},
    "PyTorch": with_torch,
    "JAX": with_jax,
    "NumPy": with_numpy,
}


def errors(name: str, row: Data, layout: str, dtype: str) -> tuple[float, float]:
    """Errors of variance and output."""
    case = LAYOUTS[layout]
    x, weight, bias = data(row, case, dtype)
    eps = 0.0 if row.std else 1e-5
    true = reference(case, x, np.zeros_like(x), weight, bias, eps=eps)
    with np.errstate(all="ignore"):
        var, y = FUNCTIONS[name](case, x, weight, bias, eps)
        if not row.std:
            return float(np.abs(var).max()), float(np.abs(y - case.per_channel(bias)).max())
        of_var = np.abs(var - true.var) / true.var
        of_y = np.abs(y - true.y).max() / np.abs(true.y).max()
    return float(of_var.max()), float(of_y)


def measure() -> dict[str, object]:
    """Measure everything."""
    figures = {
        f"{dtype}, {layout}": {row.name: {name: errors(name, row, layout, dtype) for name in FUNCTIONS} for row in rows}
        for dtype in ("float32", "float64")
        for layout in LAYOUTS
        if (rows := [row for row in ROWS if dtype in row.dtypes])
    }
    libraries = {name: version({"PyTorch": "torch"}.get(name, name.lower())) for name in PEERS}
    return {"libraries": libraries, "machine": platform.machine(), "figures": figures}


def table(stored: dict[str, object]) -> str:
    """Return the stored figures as text."""
    names = (*OURS, *PEERS)
    libraries = ", ".join(f"{name} {number}" for name, number in stored["libraries"].items())
    parts = [f"Measured on {stored['machine']} with {libraries}: `python -m bench.numerics`."]
    for title, rows in stored["figures"].items():
        parts.append(f"**{title}**; error of variance, error of output")
        lines = [
            f"| mean / std | {' | '.join(f'fastbn {name}' if name in OURS else name for name in names)} |",
            "| --- " * (len(names) + 1) + "|",
            *(f"| {row} | {' | '.join(cell(*figures[name]) for name in names)} |" for row, figures in rows.items()),
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def cell(of_var: float, of_y: float) -> str:
    """Two errors; what is no number says so."""
    return f"{figure(of_var)}, {figure(of_y)}"


def figure(error: float) -> str:
    """One digit is all that an error has to say."""
    if not np.isfinite(error):
        return "lost"
    return f"{error:.0e}" if error else "0"


def page(text: str, stored: dict[str, object]) -> str:
    """Return the page with the table of these figures in it."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{table(stored)}\n\n{END}{after}"


def main() -> None:
    """Measure, store, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="do not measure")
    if not parser.parse_args().table:
        text = json.dumps(measure(), indent=1, allow_nan=True)
        STORED.write_text(f"{text}\n", encoding="utf-8")
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), stored), encoding="utf-8")


if __name__ == "__main__":
    main()
