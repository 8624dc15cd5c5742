"""The functions against PyTorch, textbook formulas in extended precision, and numerical gradients."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cases import CASES, DTYPES, SMALL, Case
from reference import Result, assert_close, numerical_gradient
from reference import batch_norm as reference

import fastbn

pytestmark = pytest.mark.usefixtures("backend")

TINY = (Case((5, 3)), Case((3, 2, 4)), Case((3, 4, 2), axis=-1), Case((2, 3, 2, 3)), Case((2, 2, 3, 3), axis=-1))


def running(case: Case, dtype=np.float64) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    return rng.standard_normal(case.channels).astype(dtype), rng.uniform(0.5, 2, case.channels).astype(dtype)


def assert_all_close(got: tuple[np.ndarray, ...], expected: Result, tolerance: float | None = None) -> None:
    """Compare y, dx, dweight and dbias."""
    y, dx, dweight, dbias = got
    assert_close(y, expected.y, tolerance)
    assert_close(dx, expected.dx, tolerance, terms=expected.through)
    assert_close(dweight, expected.dweight, tolerance)
    assert_close(dbias, expected.dbias, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_is_that_of_the_formulas(case, dtype):
    x, dy, _, weight, bias = case.make(dtype)
    expected = reference(case, x, dy, weight, bias)
    y, mean, invstd = fastbn.batch_norm_forward(x, weight, bias, axis=case.axis)
    dx, dweight, dbias = fastbn.batch_norm_backward(dy, x, mean, invstd, weight, axis=case.axis)
    assert {a.dtype for a in (y, dx, dweight, dbias)} == {np.dtype(dtype)}
    assert mean.dtype == invstd.dtype == np.float64
    assert_close(mean, expected.mean, 1e-12)
    assert_close(invstd, 1 / np.sqrt(expected.var + 1e-5), 1e-12)
    assert_all_close((y, dx, dweight, dbias), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", (1, -1), ids=("first", "last"))
def test_any_number_of_positions(axis, dtype):
    for positions, (n, c) in itertools.product(range(1, 41), ((3, 5), (29, 3), (2, 48))):
        case = Case((n, c, positions) if axis == 1 else (n, positions, c), axis)
        x, dy, _, weight, bias = case.make(dtype, seed=positions)
        expected = reference(case, x, dy, weight, bias)
        y, mean, invstd = fastbn.batch_norm_forward(x, weight, bias, axis=axis)
        dx, dweight, dbias = fastbn.batch_norm_backward(dy, x, mean, invstd, weight, axis=axis)
        assert_all_close((y, dx, dweight, dbias), expected)


@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_batch_norm_agrees_with_pytorch(torch, case, dtype, training):
    x, dy, _, weight, bias = case.make(dtype)
    mean, var = running(case, dtype)
    tensors = [torch.tensor(a).double() for a in (x, mean, var, weight, bias)]
    tensors[0] = tensors[0].movedim(case.axis, 1)
    torch_x, torch_mean, torch_var, torch_weight, torch_bias = tensors
    for tensor in (torch_x, torch_weight, torch_bias):
        tensor.requires_grad_()
    expected = torch.nn.functional.batch_norm(
        torch_x, torch_mean, torch_var, torch_weight, torch_bias, training, 0.3, 1e-3
    )
    expected.backward(torch.tensor(dy).double().movedim(case.axis, 1))

    used = mean.astype(np.float64), 1 / np.sqrt(var.astype(np.float64) + 1e-3)
    got = fastbn.batch_norm(x, mean, var, weight, bias, training, 0.3, 1e-3, axis=case.axis)
    if training:
        _, *used = fastbn.batch_norm_forward(x, weight, bias, eps=1e-3, axis=case.axis)
    gradients = fastbn.batch_norm_backward(dy, x, *used, weight, axis=case.axis, training=training)

    assert_close(got, expected.detach().movedim(1, case.axis).numpy())
    assert_close(mean, torch_mean.numpy())
    assert_close(var, torch_var.numpy())
    through = dy * case.per_channel(weight * used[1])
    assert_close(gradients[0], torch_x.grad.movedim(1, case.axis).numpy(), terms=through)
    assert_close(gradients[1], torch_weight.grad.numpy())
    assert_close(gradients[2], torch_bias.grad.numpy())


@pytest.mark.parametrize("given", ("weight", "bias", "neither"))
@pytest.mark.parametrize("case", (Case((6, 3, 5)), Case((6, 5, 3), axis=-1)), ids=str)
def test_without_weight_or_bias(case, given):
    x, dy, _, weight, bias = case.make(np.float64)
    expected = reference(
        case, x, dy, weight if given == "weight" else np.ones(3), bias if given == "bias" else np.zeros(3)
    )
    weight, bias = (weight if given == "weight" else None), (bias if given == "bias" else None)
    y, mean, invstd = fastbn.batch_norm_forward(x, weight, bias, axis=case.axis)
    dx, dweight, dbias = fastbn.batch_norm_backward(dy, x, mean, invstd, weight, axis=case.axis)
    assert_all_close((y, dx, dweight, dbias), expected)


@pytest.mark.parametrize("x_dtype, weight_dtype", ((np.float32, np.float64), (np.float64, np.float32)))
def test_dtype_of_x_rules_and_gradients_have_the_weight_s(x_dtype, weight_dtype):
    case = Case((6, 3, 5))
    x, dy, *_ = case.make(x_dtype)
    _, _, _, weight, bias = case.make(weight_dtype)
    expected = reference(case, x, dy, weight, bias)
    y, mean, invstd = fastbn.batch_norm_forward(x, weight, bias)
    dx, dweight, dbias = fastbn.batch_norm_backward(dy, x, mean, invstd, weight)
    assert (y.dtype, dx.dtype, dweight.dtype, dbias.dtype) == (x_dtype, x_dtype, weight_dtype, weight_dtype)
    assert_all_close((y, dx, dweight, dbias), expected, 2e-6)
    assert [a.dtype for a in fastbn.batch_norm_backward(dy, x, mean, invstd)[1:]] == [x_dtype, x_dtype]


@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("case", TINY, ids=str)
def test_backward_is_the_numerical_gradient(case, training):
    x, dy, _, weight, bias = case.make(np.float64, std=1.0)
    mean, var = running(case)
    invstd = 1 / np.sqrt(var + 1e-5)

    def loss() -> float:
        y = fastbn.batch_norm(x, mean.copy(), var.copy(), weight, bias, training, axis=case.axis)
        return float((y * dy).sum())

    if training:
        _, mean, invstd = fastbn.batch_norm_forward(x, weight, bias, axis=case.axis)
        mean, var = mean.copy(), np.ones(case.channels)
    gradients = fastbn.batch_norm_backward(dy, x, mean, invstd, weight, axis=case.axis, training=training)
    for gradient, variable in zip(gradients, (x, weight, bias), strict=True):
        assert_close(gradient, numerical_gradient(loss, variable), 1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scale_shift(case, dtype):
    x, _, _, scale, shift = case.make(dtype)
    y = fastbn.scale_shift(x, scale, shift, axis=case.axis)
    assert y.dtype == dtype
    assert_close(y, x.astype(np.longdouble) * case.per_channel(scale) + case.per_channel(shift))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_moments(case, dtype):
    x = case.make(dtype).x
    m = fastbn.moments(x, axis=case.axis)
    wide = x.astype(np.longdouble)
    assert m.count == case.count
    assert_close(m.mean, wide.mean(case.reduced), 1e-13)
    assert_close(m.m2, wide.var(case.reduced) * case.count, 1e-12)


def test_batch_norm_in_eval_leaves_running_statistics_alone():
    case = Case((6, 3, 5))
    x, *_ = case.make(np.float32)
    mean, var = running(case, np.float32)
    kept = mean.copy(), var.copy()
    mean.flags.writeable = var.flags.writeable = False
    fastbn.batch_norm(x, mean, var)
    np.testing.assert_array_equal((mean, var), kept)


@pytest.mark.parametrize("dtypes", ((np.float32, np.float32), (np.float32, np.float64), (np.float64, np.float32)))
def test_running_statistics_of_any_layout_and_dtype_are_updated(dtypes):
    case = Case((6, 3, 5))
    x, *_ = case.make(np.float64)
    mean, var = np.zeros((3, 2), dtypes[0])[:, 0], np.ones(6, dtypes[1])[::-2]
    fastbn.batch_norm(x, mean, var, training=True, momentum=1.0)
    np.testing.assert_allclose(mean, x.mean((0, 2)), rtol=1e-6)
    np.testing.assert_allclose(var, x.var((0, 2), ddof=1), rtol=1e-6)


def test_batch_norm_without_running_statistics_uses_the_batch():
    case = Case((6, 3, 5))
    x, _, _, weight, bias = case.make(np.float32)
    expected, *_ = fastbn.batch_norm_forward(x, weight, bias)
    np.testing.assert_array_equal(fastbn.batch_norm(x, None, None, weight, bias, True), expected)


@pytest.mark.parametrize("name", ("batch_norm", "batch_norm_forward", "batch_norm_backward", "scale_shift", "moments"))
def test_functions_stand_at_top_level_too(name):
    assert getattr(fastbn, name) is getattr(fastbn.functional, name)
