"""What is measured: a row is an operation on an array, and every candidate that can do it.

Operations: train, eval and backward of batch norm alone; with ``+relu`` and ``+add`` (a residual, added before the
ReLU) fused; ``layer ...`` as a user of layers meets them; ``train, no out`` where every candidate allocates.
"""

from __future__ import annotations

from dataclasses import dataclass

from cases import BENCH, Case

import fastbn
from bench import native
from fastbn._engine import usable_cpus

OPS = ("train", "eval", "backward")
FUSED = ("train+relu", "train+add+relu", "eval+relu", "eval+add+relu", "backward+relu", "backward+add+relu")
LAYER = ("layer train", "layer eval", "layer backward")
COPIES = ("copy", "copy streaming")
NUMPY_LIMIT = 1 << 18  # values: on more of them the NumPy backend would take the time of all others together

THREADS = tuple(sorted({1 << i for i in range(usable_cpus().bit_length() - 1)} | {usable_cpus()}))
FUSED_CASES = (Case((8, 64, 56, 56)), Case((32, 256, 56, 56)), Case((32, 1024, 14, 14)))
FLOAT64_CASES = (Case((32, 64, 56, 56)), Case((32, 1024, 14, 14)))
NO_OUT_CASES = (Case((32, 256, 56, 56)),)
LAYER_CASES = (Case((32, 64)),)
SCALING_CASES = (*(Case((n, 64, 56, 56)) for n in (1, 4, 16, 64)), Case((64, 1, 224, 224)))


@dataclass(frozen=True)
class Row:
    """One line of a table: `table` is kernels, fused, layer or scaling."""

    table: str
    op: str
    case: Case
    dtype: str = "float32"

    def __str__(self) -> str:
        return " ".join(filter(None, (self.table, self.op, str(self.case), self.dtype)))

    @property
    def kind(self) -> str:
        """train, eval or backward."""
        return self.op.removeprefix("layer ").split("+")[0].split(",")[0]

    @property
    def relu(self) -> bool:
        return "+relu" in self.op

    @property
    def add(self) -> bool:
        return "+add" in self.op

    @property
    def nbytes(self) -> int:
        """Bytes that have to move, were every array read or written once: x and y; x, dy and dx; residuals."""
        arrays = (3 if self.kind == "backward" else 2) + self.add
        return arrays * self.case.size * (8 if self.dtype == "float64" else 4)

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names of those that take part, as far as they are installed."""
        ours = [name for name in fastbn.available_backends() if name != "numpy"]
        if self.table == "scaling":
            names = [f"{name}, {k} threads" for k in THREADS for name in (*COPIES, *ours, *_torch())]
        elif self.table == "layer":
            names = [*COPIES, *fastbn.available_backends(), *_torch()]
        elif "no out" in self.op:
            names = [*COPIES, *(f"{name}{out}" for name in ours for out in (", out=", "")), *_torch(), *_jax()]
        else:
            small = ["numpy"] if self.case.size <= NUMPY_LIMIT and "numpy" in fastbn.available_backends() else []
            plain = [f"{name}, {self.kind} alone" for name in ours] if self.table == "fused" else []
            names = [*COPIES, *ours, *plain, *small, *_torch(), *_jax()]
            if native.has_onednn() and self.dtype == "float32" and not self.add:
                names += [f"oneDNN {layout}" for layout in native.layouts()]
        return tuple(names)


def _torch() -> list[str]:
    return ["PyTorch"] if native.installed("torch") else []


def _jax() -> list[str]:
    return ["JAX"] if native.installed("jax") else []


def _all_rows() -> tuple[Row, ...]:
    rows = [Row("kernels", op, case) for case in BENCH for op in OPS]
    rows += [Row("kernels", op, case, "float64") for case in FLOAT64_CASES for op in OPS]
    rows += [Row("kernels", "train, no out", case) for case in NO_OUT_CASES]
    rows += [Row("fused", op, case) for case in FUSED_CASES for op in FUSED]
    rows += [Row("layer", op, case) for case in LAYER_CASES for op in LAYER]
    rows += [Row("scaling", op, case) for case in SCALING_CASES for op in OPS]
    return tuple(rows)


ROWS = _all_rows()
