"""All candidates of a row compute the same, or their times say nothing."""

from __future__ import annotations

import numpy as np
import pytest
from cases import Case

import fastbn
from bench.candidates import RefusedError, candidate, problem
from bench.rows import FUSED, LAYER, OPS, Row

SMALL = (
    Case((3, 17, 7, 5)),
    Case((4, 32, 14, 14)),
    Case((2, 7, 7, 16), axis=-1),
    Case((2, 16, 3, 4, 5)),
    Case((9, 16)),
)
TABLES = [("kernels", op) for op in OPS] + [("fused", op) for op in FUSED] + [("layer", op) for op in LAYER]
TABLES += [("scaling", op) for op in OPS] + [("kernels", "train, no out")]
ROWS = [Row(table, op, case) for case in SMALL for table, op in TABLES]
ROWS += [Row("kernels", op, case, "float64") for case in SMALL for op in OPS]


def expected(row: Row, alone: bool) -> np.ndarray:
    """The same by fastbn's readable backend, activation and residual by NumPy."""
    p, axis = problem(row.case, row.dtype), row.case.axis
    with fastbn.use_backend("numpy"):
        y = fastbn.scale_shift(p.x, p.scale, p.shift, axis=axis)
        y = y + p.residual if row.add and not alone else y
        passed = y > 0 if row.relu and not alone else np.ones_like(y, bool)
        if row.kind != "backward":
            return np.where(passed, y, 0)
        return fastbn.batch_norm_backward(np.where(passed, p.dy, 0), p.x, p.mean, p.invstd, p.weight, axis=axis)[0]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_all_compute_the_same(row: Row) -> None:
    for name in row.candidates:
        if name.startswith("copy"):
            continue
        try:
            made = candidate(row, name)
        except RefusedError:
            continue
        made.before()
        result = made.result(made.call())
        want = expected(row, name.endswith("alone"))
        np.testing.assert_allclose(result, want, rtol=0, atol=1e-4 * np.abs(want).max(), err_msg=name)
