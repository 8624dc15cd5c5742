"""Scikit-learn's own tests of its incremental mean and variance, passed by `Moments` through an adapter.

Left out are two: that of array libraries and devices other than NumPy's, which is about where arrays lie; and that of
numerical stability, which takes NumPy's mean and variance of a column for true. They are off by 7e-6 and by 430 there,
`Moments` by 0 and 7, so that the same data are tested here against exact values.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from fastbn import Moments
from fastbn._merge import merge

theirs = pytest.importorskip("sklearn.utils.tests.test_extmath")

_last: list[Any] = [None, None]  # a mean that was returned, and the `Moments` it comes from: theirs is a function


def incremental_mean_and_var(
    x: Any, last_mean: Any, last_variance: Any, last_sample_count: Any, sample_weight: Any = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `sklearn.utils.extmath._incremental_mean_and_var`: NaN is left out, counts come for every feature."""
    x = np.asarray(x)
    x = x if x.dtype.kind == "f" else x.astype(float)
    count, mean, variance = (
        np.broadcast_to(np.asarray(a, np.float64), x.shape[1:]) for a in (last_sample_count, last_mean, last_variance)
    )
    new, taken = Moments.empty(x.shape[1]), Moments.empty(x.shape[1])
    if sample_weight is None:
        new.update(x, nan_policy="omit")
    else:
        new.update(x, weights=np.maximum(sample_weight, 0), nan_policy="omit")
        taken.update(x, weights=np.maximum(-sample_weight, 0), nan_policy="omit")
    if (count < 0).any() or (variance < 0).any() or taken.count:
        # Their weights may be negative, which `Moments` refuses: such values are taken away, by the same formula.
        parts = [(count, mean, variance * count), (new.count, new.mean, new.m2), (-taken.count, taken.mean, -taken.m2)]
        total, mean, m2 = np.zeros_like(mean), np.zeros_like(mean), np.zeros_like(mean)
        for added, its_mean, its_m2 in parts:
            mean, m2 = merge(total, mean, m2, added + np.zeros_like(mean), its_mean, its_m2)
            total = total + added
        return mean, m2 / total, total
    before = _last[1] if last_mean is _last[0] else Moments(count, mean, variance * count)
    both = before + new
    _last[:] = both.mean, both
    return both.mean, both.var(), np.broadcast_to(both.count, both.mean.shape)


@pytest.fixture(autouse=True)
def adapted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theirs, "_incremental_mean_and_var", incremental_mean_and_var)


for _name, _test in vars(theirs).items():
    if _name.startswith("test_incremental_") and not _name.endswith(("array_api", "numerical_stability")):
        globals()[_name] = _test


def test_all_of_theirs_are_here():
    here = {name for name in globals() if name.startswith("test_incremental_")}
    assert len(here) >= 6
    assert any("weighted" in name for name in here)
    assert any("nan" in name for name in here)


def test_numerical_stability_against_exact_values():
    first, second = 1e8, float(np.log(1e-5))
    mean, var, count = np.full(2, first), np.zeros(2), np.full(2, 5000)
    for _ in range(5000):
        mean, var, count = incremental_mean_and_var(np.full((1, 2), second), mean, var, count)
    np.testing.assert_array_equal(count, 10000)
    np.testing.assert_allclose(mean, float((Fraction(first) + Fraction(second)) / 2), rtol=1e-15)
    assert (np.abs(var - float(((Fraction(first) - Fraction(second)) / 2) ** 2)) < 20).all()  # theirs may be 200 off
