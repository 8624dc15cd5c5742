"""Where batch norm usually loses its digits: far means, constant channels, huge and tiny scales, NaN and infinity."""

from __future__ import annotations

import numpy as np
import pytest
from cases import DTYPES, Case
from reference import assert_close
from reference import batch_norm as reference

import fastbn

pytestmark = pytest.mark.usefixtures("backend")

LAYOUTS = (
    Case((8, 3, 5)),
    Case((8, 3, 40, 40)),
    Case((64, 3, 5, 5)),
    Case((8, 40, 40, 3), axis=-1),
    Case((5000, 3)),
    Case((16, 3, 120, 120)),
)


@pytest.mark.parametrize("ratio", (1e2, 1e4, 1e6))
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_statistics_keep_nine_digits_however_far_the_mean(case, ratio):
    x = case.make(np.float32, mean=ratio, std=1.0).x
    wide = x.astype(np.longdouble)
    mean, var = wide.mean(case.reduced), wide.var(case.reduced)
    m = fastbn.moments(x, axis=case.axis)
    _, forward_mean, invstd = fastbn.batch_norm_forward(x, eps=0.5, axis=case.axis)
    for got, want in ((m.mean, mean), (m.var(), var), (forward_mean, mean), (invstd, 1 / np.sqrt(var + 0.5))):
        np.testing.assert_allclose(got, want.astype(np.float64), rtol=1e-9)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_float32_output_at_a_far_mean_is_nearer_than_pytorch_s(torch, case):
    x, dy, _, weight, bias = case.make(np.float32, mean=1e6, std=1.0)
    expected = reference(case, x, dy, weight, bias)
    y, mean, invstd = fastbn.batch_norm_forward(x, weight, bias, axis=case.axis)
    dx, *_ = fastbn.batch_norm_backward(dy, x, mean, invstd, weight, axis=case.axis)
    torch_x = torch.tensor(x).movedim(case.axis, 1)
    theirs = torch.nn.functional.batch_norm(torch_x, None, None, torch.tensor(weight), torch.tensor(bias), True)
    error = np.abs(y - expected.y).max()
    assert error < np.abs(theirs.movedim(1, case.axis).numpy() - expected.y).max()
    assert_close(y, expected.y)
    assert_close(dx, expected.dx)


@pytest.mark.parametrize("value", (1e7, -3.3, 0.1, 1e-30, 1e30))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_constant_channel_gives_exactly_the_bias(case, dtype, value):
    _, _, _, weight, bias = case.make(dtype)
    y, mean, invstd = fastbn.batch_norm_forward(np.full(case.shape, value, dtype), weight, bias, axis=case.axis)
    np.testing.assert_array_equal(y, np.broadcast_to(case.per_channel(bias), case.shape))
    np.testing.assert_array_equal(mean, dtype(value))
    np.testing.assert_array_equal(invstd, 1 / np.sqrt(1e-5))


@pytest.mark.parametrize(
    "dtype, scale", ((np.float32, 1e18), (np.float32, 1e37), (np.float32, 1e-18), (np.float64, 1e150))
)
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_any_scale_gives_unit_variance(case, dtype, scale):
    x, *_ = case.make(dtype, mean=0.5, std=1.0)
    y, *_ = fastbn.batch_norm_forward(x * dtype(scale), eps=1e-320, axis=case.axis)
    np.testing.assert_allclose(y.var(case.reduced, dtype=np.float64), 1, rtol=1e-6)
    np.testing.assert_allclose(y.mean(case.reduced, dtype=np.float64), 0, atol=1e-6)


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_nan_and_infinity_stay_in_their_channel(case, training, bad):
    """In training they spoil their channel and its running statistics, as in PyTorch; in eval just themselves."""
    clean, dy, _, weight, bias = case.make(np.float32)
    spoilt = clean.copy()
    spot = (1,) * clean.ndim  # channel 1, in either layout
    spoilt[spot] = bad

    def run(x):
        mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
        y = fastbn.batch_norm(x, mean, var, weight, bias, training, axis=case.axis)
        _, *batch = fastbn.batch_norm_forward(x, weight, bias, axis=case.axis)
        used = batch if training else (mean.astype(np.float64), 1 / np.sqrt(var.astype(np.float64) + 1e-5))
        return y, *fastbn.batch_norm_backward(dy, x, *used, weight, axis=case.axis, training=training), mean, var

    *expected, _, _ = run(clean)
    *got, mean, var = run(spoilt)
    if training:
        others = [0, 2]
        for one, other in zip(got[:2], expected[:2], strict=True):
            assert np.isnan(one.take(1, case.axis)).all()
            np.testing.assert_array_equal(one.take(others, case.axis), other.take(others, case.axis))
        assert np.isfinite(mean[others]).all()
        assert np.isfinite(var[others]).all()
        assert np.isnan(var[1])
        np.testing.assert_array_equal(mean[1], np.float32(bad))
    else:
        assert not np.isfinite(got[0][spot])
        expected[0][spot] = got[0][spot]
        np.testing.assert_array_equal(got[0], expected[0])
        np.testing.assert_array_equal(got[1], expected[1])


def test_negative_running_variance_gives_nan_in_its_channel():
    bn = fastbn.BatchNorm2d(3).eval()
    bn.running_var[1] = -1
    y = bn(np.ones((2, 3, 2, 2), np.float32))
    assert np.isnan(y[:, 1]).all()
    assert np.isfinite(y[:, [0, 2]]).all()


@pytest.mark.parametrize("axis", (1, -1))
def test_eval_rounds_scale_and_shift_once(axis):
    """The result is that of scale and shift computed in float64, whatever the layer's own dtype."""
    bn = fastbn.BatchNorm2d(3, axis=axis).eval()
    rng = np.random.default_rng(0)
    bn.running_mean[:], bn.running_var[:] = rng.normal(100, 1, 3), rng.uniform(1e-3, 1e3, 3)
    bn.weight[:], bn.bias[:] = rng.normal(size=3), rng.normal(size=3)
    mean, var, weight, bias = (a.astype(np.float64) for a in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
    scale = weight / np.sqrt(var + 1e-5)
    shift = bias - mean * scale
    x = rng.normal(100, 1, (4, 3, 9, 9) if axis == 1 else (4, 9, 9, 3)).astype(np.float32)
    case = Case(x.shape, axis)
    scaled, shift = x * case.per_channel(scale), case.per_channel(shift)
    roundings = (np.abs(scaled) + np.abs(shift) + np.abs(scaled + shift)) * 2.0**-24  # scale's, shift's, y's
    assert (np.abs(bn(x) - (scaled + shift)) <= 1.01 * roundings).all()
