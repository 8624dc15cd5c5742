"""Sizes at the limits: 100,000 channels, as many axes as NumPy has. `.ci/large.py` has more than 2**31 values."""

from __future__ import annotations

import numpy as np
import pytest
from cases import Case
from reference import assert_close
from reference import batch_norm as reference

import fastbn

pytestmark = pytest.mark.usefixtures("backend")

MANY = (Case((3, 100_000)), Case((2, 100_000, 4)), Case((1, 100_000, 17)), Case((2, 3, 100_000), axis=-1))


@pytest.mark.parametrize("case", MANY, ids=str)
def test_a_hundred_thousand_channels(case):
    x, dy, _, weight, bias = case.make()
    expected = reference(case, x, dy, weight, bias)
    y, mean, invstd = fastbn.batch_norm_forward(x, weight, bias, axis=case.axis)
    dx, dweight, dbias = fastbn.batch_norm_backward(dy, x, mean, invstd, weight, axis=case.axis)
    assert_close(mean, expected.mean, 1e-12)
    assert_close(y, expected.y)
    assert_close(dx, expected.dx, terms=expected.through)
    assert_close(dweight, expected.dweight)
    assert_close(dbias, expected.dbias)
    bn = fastbn.BatchNorm1d(100_000, axis=case.axis)
    bn.weight, bn.bias = weight, bias
    np.testing.assert_array_equal(bn(x), y)


@pytest.mark.parametrize("axis", (0, 1, 31, 62, 63, -1))
def test_as_many_axes_as_there_can_be(axis):
    shape = [1] * 64
    shape[5], shape[40], shape[axis] = 2, 4, 3
    x = np.random.default_rng(0).standard_normal(shape)
    others = tuple(i for i in range(64) if i != axis % 64)
    y, mean, _ = fastbn.batch_norm_forward(x, axis=axis)
    np.testing.assert_allclose(mean, x.mean(others), rtol=1e-12, atol=1e-12)
    deviations = x - x.mean(others, keepdims=True)
    np.testing.assert_allclose(y, deviations / np.sqrt(x.var(others, keepdims=True) + 1e-5), rtol=1e-9)
