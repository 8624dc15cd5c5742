"""The compiled backends do what NumPy's does, whatever the call: shapes, layouts, dtypes, modes, outputs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from arrays import LAYOUTS
from hypothesis import given, settings
from hypothesis import strategies as st

import fastbn

TOLERANCE = {"float32": 5e-6, "float64": 1e-12}
LARGEST = 1 << 14  # values
PLACES = {"plain": np.copy, **LAYOUTS}
WRITABLE = sorted(PLACES.keys() - {"read-only"})


class Call(NamedTuple):
    shape: tuple[int, ...]
    axis: int
    dtype: str
    training: bool
    activation: Any
    affine: bool
    layouts: tuple[str, str, str]  # of x, dy and residual
    out: str  # a layout, "none", or the input that it is
    seed: int


@st.composite
def calls(draw) -> Call:
    """Draw a call; sides are small, or about a vector's length or a block's."""
    side = st.one_of(st.integers(1, 9), st.sampled_from((15, 16, 17, 31, 64, 129, 1031)))
    shape: tuple[int, ...] = ()
    for _ in range(draw(st.integers(2, 5), "dimensions")):
        room = LARGEST // math.prod(shape)
        shape += (min(draw(side), room),)
    axis = draw(st.sampled_from((1, -1)), "axis")
    training = draw(st.booleans(), "training") and math.prod(shape) > shape[axis]
    return Call(
        shape,
        axis,
        draw(st.sampled_from(("float32", "float64"))),
        training,
        draw(st.sampled_from((None, "relu", ("leaky_relu", 0.1), ("leaky_relu", -0.5)))),
        draw(st.booleans()),
        tuple(draw(st.sampled_from(WRITABLE)) for _ in range(3)),
        draw(st.sampled_from(("none", "x", "residual", *WRITABLE))),
        draw(st.integers(0, 2**32 - 1)),
    )


def results(call: Call, backend: str, with_residual: bool) -> dict[str, np.ndarray]:
    """Everything that a layer computes, and the moments."""
    rng = np.random.default_rng(call.seed)
    x, dy, residual = (PLACES[layout](rng.standard_normal(call.shape).astype(call.dtype)) for layout in call.layouts)
    residual = residual if with_residual else None
    channels = call.shape[call.axis]
    kind = {2: fastbn.BatchNorm1d, 3: fastbn.BatchNorm1d, 4: fastbn.BatchNorm2d, 5: fastbn.BatchNorm3d}[x.ndim]
    with fastbn.use_backend(backend):
        bn = kind(channels, 0.1, axis=call.axis, affine=call.affine, dtype=call.dtype, activation=call.activation)
        bn.running_mean[:], bn.running_var[:] = rng.standard_normal(channels), rng.uniform(0.5, 2, channels)
        for values in bn.params.values():
            values[:] = rng.uniform(-2, 2, channels)
        m = fastbn.moments(x, axis=call.axis)
        out = {"none": None, "x": x, "residual": residual}.get(call.out)
        if call.out in PLACES:
            out = PLACES[call.out](np.zeros(call.shape, call.dtype))
        y = bn.train(call.training)(x, residual=residual, out=out)
        assert out is None or y is out
        found = {"mean": m.mean, "m2": m.m2, "y": y.copy(), "running_mean": bn.running_mean}
        found["running_var"] = bn.running_var
        if out is x:
            return found  # backward would need what is overwritten
        dx = bn.backward(dy)
        if residual is not None:
            dx, found["dresidual"] = dx
    return found | {"dx": dx, **bn.grads}


@pytest.mark.parametrize("backend", ("numba", "cython"))
@settings(max_examples=250)
@given(call=calls(), with_residual=st.booleans())
def test_a_compiled_backend_does_what_numpy_s_does(backend, call, with_residual):
    expected = results(call, "numpy", with_residual)
    got = results(call, backend, with_residual)
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        assert got[name].dtype == want.dtype
        assert got[name].shape == want.shape
        largest = max(1.0, float(np.abs(want).max()))
        terms = math.sqrt(math.prod(call.shape) / want.size) if name in ("weight", "bias") and want.size else 1.0
        np.testing.assert_allclose(got[name], want, rtol=0, atol=TOLERANCE[call.dtype] * largest * terms, err_msg=name)
