"""Arrays far beyond the cache, where the compiled backends write their outputs past it."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from arrays import LAYOUTS
from cases import HUGE, Case, Data
from conftest import CPUS
from reference import assert_close
from reference import batch_norm as reference

import fastbn

pytestmark = [
    pytest.mark.parametrize("backend", ("numba", "cython"), indirect=True, scope="module"),
    pytest.mark.parametrize("case", HUGE, ids=str),
    pytest.mark.usefixtures("backend", "keep_threads"),
]


@lru_cache(len(HUGE))
def huge(case: Case) -> Data:
    return case.make()


def everything(case: Case) -> list[np.ndarray]:
    """Results of every kernel: the plain ones, and those of a layer with activation and residual."""
    x, dy, residual, weight, bias = huge(case)
    y, mean, invstd = fastbn.batch_norm_forward(x, weight, bias, axis=case.axis)
    bn = fastbn.BatchNorm2d(case.channels, axis=case.axis, activation="relu")
    fused = bn(x, residual=residual)
    return [
        *(y, *fastbn.batch_norm_backward(dy, x, mean, invstd, weight, axis=case.axis)),
        fastbn.scale_shift(x, weight, bias, axis=case.axis),
        *(fused, *bn.backward(dy), *bn.grads.values(), bn.running_var),
    ]


def test_results_are_those_of_a_channel_alone_on_any_number_of_threads(case):
    x, dy, residual, weight, bias = huge(case)
    fastbn.set_num_threads(1)
    results = everything(case)
    fastbn.set_num_threads(CPUS)
    for got, want in zip(everything(case), results, strict=True):
        np.testing.assert_array_equal(got, want)

    for channel in (0, case.channels // 2, case.channels - 1):
        part = slice(channel, channel + 1)
        index = (slice(None),) * (case.axis % 4) + (part,)
        one = Case(x[index].shape, case.axis)
        expected = reference(one, x[index], dy[index], weight[part], bias[part])
        y, dx, dweight, dbias, scaled, *fused = (a[index] if a.ndim == 4 else a[part] for a in results)
        for got, want in ((y, expected.y), (dx, expected.dx), (dweight, expected.dweight), (dbias, expected.dbias)):
            assert_close(got, want)
        assert_close(scaled, x[index].astype(float) * weight[part] + bias[part])

        alone = fastbn.BatchNorm2d(1, axis=case.axis, activation="relu", dtype=np.float64)
        z = alone(x[index].astype(float), residual=residual[index].astype(float))
        gradients = alone.backward(dy[index].astype(float))
        for got, want in zip(fused, (z, *gradients, *alone.grads.values(), alone.running_var), strict=True):
            assert_close(got, want, 1e-5)


@pytest.mark.parametrize("layout", ("8 bytes off", "unaligned"))
def test_output_at_any_alignment(case, layout):
    x, dy, _, weight, bias = huge(case)
    y, mean, invstd = fastbn.batch_norm_forward(x, weight, bias, axis=case.axis)
    out = LAYOUTS[layout](x)
    assert fastbn.batch_norm_forward(x, weight, bias, axis=case.axis, out=out)[0] is out
    np.testing.assert_array_equal(out, y)
    dx, *_ = fastbn.batch_norm_backward(dy, x, mean, invstd, weight, axis=case.axis)
    fastbn.batch_norm_backward(dy, x, mean, invstd, weight, axis=case.axis, out=out)
    np.testing.assert_array_equal(out, dx)


@pytest.mark.parametrize("layout", ("64-byte aligned", "8 bytes off"))
def test_in_place(case, layout):
    x, dy, residual, weight, bias = huge(case)
    lay = LAYOUTS[layout]
    expected = fastbn.scale_shift(x, weight, bias, axis=case.axis)
    out = lay(x)
    np.testing.assert_array_equal(fastbn.scale_shift(out, weight, bias, axis=case.axis, out=out), expected)

    bn = fastbn.BatchNorm2d(case.channels, axis=case.axis, activation="relu")
    expected = bn(x, residual=residual)
    out = lay(residual)
    np.testing.assert_array_equal(bn(x, residual=out, out=out), expected)

    y, mean, invstd = fastbn.batch_norm_forward(x, weight, bias, axis=case.axis)
    out = lay(x)
    np.testing.assert_array_equal(fastbn.batch_norm_forward(out, weight, bias, axis=case.axis, out=out)[0], y)
    dx, *_ = fastbn.batch_norm_backward(dy, x, mean, invstd, weight, axis=case.axis)
    for name in ("dy", "x"):
        given = {"dy": dy, "x": x}
        out = given[name] = lay(given[name])
        np.testing.assert_array_equal(
            fastbn.batch_norm_backward(**given, mean=mean, invstd=invstd, weight=weight, axis=case.axis, out=out)[0], dx
        )
