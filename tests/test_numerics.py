"""What docs/numerics.md says: its table is that of the stored figures, and what it promises holds today."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from cases import Case
from subprocesses import python

import fastbn

ROOT = Path(__file__).resolve().parents[1]
UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}


@pytest.fixture(scope="module")
def numerics():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        from bench import numerics

        yield numerics


@pytest.fixture(scope="module")
def stored(numerics):
    return json.loads(numerics.STORED.read_text(encoding="utf-8"))


def promised(row, dtype: str) -> tuple[float, float]:
    """Largest errors of variance and output: both 0 in a constant channel."""
    if not row.std:
        return 0.0, 0.0
    k = abs(row.mean) / row.std
    return 1e-13 + 2 * k * UNIT["float64"], 4 * UNIT[dtype] + 1e-14 + 20 * k * UNIT["float64"]


def test_table_is_that_of_the_stored_figures(numerics, stored):
    text = numerics.PAGE.read_text(encoding="utf-8")
    assert numerics.page(text, stored) == text


def test_stored_figures_are_within_what_is_promised(numerics, stored):
    rows = {row.name: row for row in numerics.ROWS}
    for title, figures in stored["figures"].items():
        assert set(figures) <= set(rows)
        for name, errors in figures.items():
            for backend in numerics.OURS:
                limits = promised(rows[name], title.split(",")[0])
                assert all(np.less_equal(errors[backend], limits)), (title, name, backend)


@pytest.mark.parametrize("layout", ("NCHW", "channels last"))
@pytest.mark.parametrize("dtype", ("float32", "float64"))
def test_errors_are_within_what_is_promised(numerics, backend, dtype, layout):
    for row in numerics.ROWS:
        if dtype in row.dtypes:
            errors = numerics.errors(backend, row, layout, dtype)
            assert all(np.less_equal(errors, promised(row, dtype))), (row.name, errors)


def test_every_test_that_the_page_names_is_there(numerics):
    text = numerics.PAGE.read_text(encoding="utf-8")
    file, named = None, 0
    for found, test in re.findall(r"`(test_\w+\.py)?(?:::(test_\w+))?`", text):
        file = found or file
        if file:
            source = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert not test or f"def {test}(" in source, (file, test)
            named += bool(test)
    assert named > 10


DIGEST = """
import hashlib, sys
import numpy as np, fastbn
sys.path.insert(0, {folder!r})
from test_numerics import digest
print(digest())
"""


def digest() -> str:
    """Hash all results of a forward and a backward pass in both layouts."""
    result = hashlib.sha256()
    for case in (Case((4, 24, 30, 31)), Case((4, 30, 31, 24), axis=-1)):
        x, dy, _, weight, bias = case.make(np.float64, mean=100.0)
        y, mean, invstd = fastbn.batch_norm_forward(x, weight, bias, axis=case.axis)
        for array in (y, mean, invstd, *fastbn.batch_norm_backward(dy, x, mean, invstd, weight, axis=case.axis)):
            result.update(array.tobytes())
    return result.hexdigest()


def test_runs_give_the_same_bits(backend):
    first = digest()
    assert digest() == first
    again = python(DIGEST.format(folder=str(ROOT / "tests")), FASTBN_BACKEND=backend)
    assert again.stdout.strip() == first


def test_what_overflows(backend):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 2, 16, 16))

    y, _, invstd = fastbn.batch_norm_forward((x * 5e37).astype(np.float32))  # variance
    assert np.isfinite(y).all()
    assert np.isfinite(invstd).all()
    assert (invstd > 0).all()
    assert not (fastbn.batch_norm_forward(x * 1e155)[2] > 0).any()
    assert np.isfinite(fastbn.batch_norm_forward(x * 1e152)[0]).all()

    tiny = (x * 1e-42).astype(np.float32)  # scale
    assert np.isfinite(fastbn.batch_norm_forward(tiny)[0]).all()
    finite = np.isfinite(fastbn.batch_norm_forward(tiny, eps=1e-300)[0])
    assert finite.all() == (backend == "numpy")  # which multiplies in float64

    y, *_ = fastbn.batch_norm_forward(x.astype(np.float32), np.full(2, 3e38, np.float32))  # output
    assert np.isinf(y).any()
    assert not np.isnan(y).any()

    bn = fastbn.BatchNorm2d(2)  # running statistics
    y = bn((x * 1e20).astype(np.float32))
    assert np.isinf(bn.running_var).all()
    np.testing.assert_allclose(y.var((0, 2, 3)), 1, rtol=1e-5)
