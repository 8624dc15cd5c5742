"""Laws that hold for every input, tried on generated ones."""

from __future__ import annotations

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
from arrays import LAYOUTS
from hypothesis import given
from hypothesis import strategies as st

import fastbn

pytestmark = pytest.mark.usefixtures("backend")

axes = st.sampled_from((1, -1))
shapes = npst.array_shapes(min_dims=2, max_dims=5, max_side=12)
dtypes = st.sampled_from((np.float32, np.float64))
seeds = st.integers(0, 2**32 - 1)


@st.composite
def inputs(draw):
    """Draw an array and its channel axis; values lie on a grid, so that sums of a few of them are exact."""
    shape, dtype, seed = draw(shapes), draw(dtypes), draw(seeds)
    return (np.random.default_rng(seed).integers(-64, 65, shape) / 8).astype(dtype), draw(axes)


def reduced(x, axis):
    return tuple(i for i in range(x.ndim) if i != axis % x.ndim)


def per_channel(values, x, axis):
    return np.expand_dims(values, reduced(x, axis))


def assert_same_moments(got, expected):
    assert got.count == expected.count
    np.testing.assert_allclose(got.mean, expected.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got.m2, expected.m2, rtol=1e-10, atol=1e-10)


@given(inputs(), st.data())
def test_statistics_of_parts_merge_to_those_of_the_whole(given, data):
    x, axis = given
    along = data.draw(st.sampled_from(reduced(x, axis)), "cut along")
    cuts = sorted(data.draw(st.lists(st.integers(0, x.shape[along]), max_size=4), "cuts"))  # parts may be empty
    parts = np.split(x, cuts, along)
    whole = fastbn.moments(x, axis=axis)
    updated = fastbn.Moments.empty(x.shape[axis])
    for part in parts:
        updated.update(part, axis)
    assert_same_moments(updated, whole)
    assert_same_moments(
        sum((fastbn.moments(part, axis=axis) for part in parts), fastbn.Moments.empty(x.shape[axis])), whole
    )


@given(inputs())
def test_moments_are_mean_and_variance(given):
    x, axis = given
    m = fastbn.moments(x, axis=axis)
    np.testing.assert_allclose(m.mean, x.mean(reduced(x, axis), dtype=np.float64), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(m.var(), x.var(reduced(x, axis), dtype=np.float64), rtol=1e-12, atol=1e-12)


@given(inputs(), st.integers(-(2**10), 2**10), st.sampled_from((0.25, 0.5, 1.0, 2.0, 1024.0)))
def test_shift_and_scale_do_not_change_the_output(given, shift, scale):
    """batch_norm(a x + b) = batch_norm(x) where eps scales along; the grid keeps a x + b exact."""
    x, axis = given
    if x.size == x.shape[axis]:
        return
    y, mean, invstd = fastbn.batch_norm_forward(x, eps=1e-3, axis=axis)
    moved, moved_mean, moved_invstd = fastbn.batch_norm_forward(
        x * x.dtype.type(scale) + x.dtype.type(shift), eps=1e-3 * scale**2, axis=axis
    )
    tolerance = 1e-5 if x.dtype == np.float32 else 1e-10
    np.testing.assert_allclose(moved, y, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(moved_mean, mean * scale + shift, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moved_invstd * scale, invstd, rtol=1e-9)


@given(inputs(), seeds)
def test_gradient_is_orthogonal_to_mean_and_to_the_output(given, seed):
    """Neither a shift nor a scaling of x changes y, so dx has no part along 1, nor, but for eps, along x."""
    x, axis = given
    x = x.astype(np.float64)
    if x.size == x.shape[axis]:
        return
    dy = np.random.default_rng(seed).standard_normal(x.shape)
    y, mean, invstd = fastbn.batch_norm_forward(x, eps=1e-30, axis=axis)
    dx, *_ = fastbn.batch_norm_backward(dy, x, mean, invstd, axis=axis)
    largest = np.abs(dy * per_channel(invstd, x, axis)).max() * x.size
    np.testing.assert_allclose(dx.sum(reduced(x, axis)) / largest, 0, atol=1e-10)
    np.testing.assert_allclose((dx * y).sum(reduced(x, axis)) / largest, 0, atol=1e-9)


@given(inputs(), st.sampled_from(sorted(LAYOUTS)), st.data())
def test_any_view_gives_the_result_of_its_copy(given, layout, data):
    x, axis = given
    view = LAYOUTS[layout](x)[tuple(data.draw(st.slices(n), "cut") for n in x.shape)]
    if view.shape[axis] == 0:
        return
    copied = view.copy()
    scale, shift = np.linspace(1, 2, x.shape[axis])[: view.shape[axis]], np.zeros(view.shape[axis])
    y, expected = (fastbn.scale_shift(a, scale, shift, axis=axis) for a in (view, copied))
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    assert_same_moments(fastbn.moments(view, axis=axis), fastbn.moments(copied, axis=axis))


@given(inputs())
def test_the_two_layouts_agree(given):
    x, axis = given
    other, other_axis = (np.moveaxis(x, 1, -1), -1) if axis == 1 else (np.moveaxis(x, -1, 1), 1)
    other = np.ascontiguousarray(other)
    assert_same_moments(fastbn.moments(x, axis=axis), fastbn.moments(other, axis=other_axis))
    scale, shift = np.linspace(1, 2, x.shape[axis]), np.linspace(-1, 1, x.shape[axis])
    y, y_other = (
        fastbn.scale_shift(x, scale, shift, axis=axis),
        fastbn.scale_shift(other, scale, shift, axis=other_axis),
    )
    back = np.moveaxis(y_other, -1, 1) if axis == 1 else np.moveaxis(y_other, 1, -1)
    np.testing.assert_allclose(y, back, rtol=1e-6, atol=1e-6)


@given(inputs(), st.permutations(range(12)))
def test_order_of_channels_does_not_matter(given, order):
    x, axis = given
    if x.size == x.shape[axis]:
        return
    order = [channel for channel in order if channel < x.shape[axis]]
    y, *_ = fastbn.batch_norm_forward(x, axis=axis)
    permuted, *_ = fastbn.batch_norm_forward(np.ascontiguousarray(x.take(order, axis)), axis=axis)
    np.testing.assert_allclose(permuted, y.take(order, axis), rtol=1e-6, atol=1e-6)


@given(st.integers(1, 5), st.integers(1, 8), st.sampled_from((1, 4, 8, 16)), st.integers(1, 2**16), dtypes, seeds)
def test_every_value_of_long_rows_is_written(n, c, unit, length, dtype, seed):
    """However a row is cut: its length decides on pieces, on vectors, and on channels that are written together."""
    n, length = min(n, max(1, 2**19 // (c * length))), max(2, length - length % unit)
    rng = np.random.default_rng(seed)
    x, dy = (rng.standard_normal((n, c, length), np.float32).astype(dtype) for _ in range(2))
    tolerance = 1e-4 if dtype == np.float32 else 1e-10
    mean, var = (getattr(x, what)((0, 2), np.float64, keepdims=True) for what in ("mean", "var"))
    normal = (x - mean) / np.sqrt(var + 1e-5)
    out = np.full_like(x, np.nan)
    _, mean, invstd = fastbn.batch_norm_forward(x, out=out)
    np.testing.assert_allclose(out, normal, rtol=tolerance, atol=tolerance)
    out[:] = np.nan
    fastbn.scale_shift(x, np.ones(c), np.ones(c), out=out)
    np.testing.assert_allclose(out, x + 1, rtol=tolerance, atol=tolerance)
    out[:] = np.nan
    fastbn.batch_norm_backward(dy, x, mean, invstd, out=out)
    along = normal * (dy * normal).mean((0, 2), np.float64, keepdims=True)
    expected = (dy - dy.mean((0, 2), np.float64, keepdims=True) - along) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)
