"""Activation and residual in the same pass: against PyTorch's separate operations, and numerical gradients."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from arrays import LAYOUTS
from cases import DTYPES, Case
from conftest import CPUS
from reference import assert_close, numerical_gradient

import fastbn
from fastbn import _engine
from fastbn._channels import Parameters, finish_gradient, finish_statistics

pytestmark = pytest.mark.usefixtures("backend")

ACTIVATIONS = (None, "relu", ("leaky_relu", 0.1))
MODES = ("train", "eval", "eval without running statistics")
SHAPES = (
    Case((6, 3)),
    Case((33, 17)),
    Case((5, 3, 31)),
    Case((4, 17, 7, 7)),
    Case((2, 3, 55, 55)),
    Case((4, 5, 9, 17), axis=-1),
    Case((2, 3, 4, 5, 6)),
    Case((4, 16, 48, 48)),
    Case((4, 40, 40, 16), axis=-1),
)


def make(case: Case, dtype=np.float32, mode: str = "train", **options) -> fastbn.BatchNorm2d:
    layer = getattr(fastbn, case.layer)
    bn = layer(case.channels, axis=case.axis, dtype=dtype, track_running_stats="without" not in mode, **options)
    _, _, _, weight, bias = case.make(dtype, seed=9)
    bn.weight[:], bn.bias[:] = weight, bias
    if mode == "eval":
        bn.running_mean[:], bn.running_var[:] = np.abs(bias), np.abs(weight) + 0.5
    return bn.train(mode == "train")


def pytorch(torch, bn, case, x, dy, residual=None):
    """y, dx, dresidual (or None), dweight and dbias by separate operations in float64."""
    x, dy = (torch.tensor(a).double().movedim(case.axis, 1) for a in (x, dy))
    residual = None if residual is None else torch.tensor(residual).double().movedim(case.axis, 1).requires_grad_()
    layer = getattr(torch.nn, case.layer)(case.channels, track_running_stats=bn.track_running_stats).double()
    layer.load_state_dict({key: torch.tensor(value) for key, value in bn.state_dict().items()})
    z = layer.train(bn.training)(x.requires_grad_())
    z = z if residual is None else z + residual
    match bn.activation:
        case None:
            y = z
        case "relu":
            y = torch.relu(z)
        case (_, slope):
            y = torch.nn.functional.leaky_relu(z, slope)
    y.backward(dy)
    y, dx, dresidual = (
        None if t is None else t.detach().movedim(1, case.axis).numpy()
        for t in (y, x.grad, None if residual is None else residual.grad)
    )
    return y, dx, dresidual, layer.weight.grad.numpy(), layer.bias.grad.numpy()


def run(bn, x, dy, residual=None):
    """The same of a fastbn layer."""
    y = bn(x, residual=residual)
    dx, dresidual = (bn.backward(dy), None) if residual is None else bn.backward(dy)
    return y, dx, dresidual, bn.grads["weight"], bn.grads["bias"]


@pytest.mark.parametrize("with_residual", (False, True), ids=("", "residual"))
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_fused_is_the_separate_operations(torch, case, dtype, mode, activation, with_residual):
    x, dy, residual, *_ = case.make(dtype)
    bn = make(case, dtype, mode, activation=activation)
    given = (x, dy, residual) if with_residual else (x, dy)
    for got, want in zip(run(bn, *given), pytorch(torch, copy.deepcopy(bn), case, *given), strict=True):
        if want is not None:
            assert got.dtype == dtype
            assert_close(got, want)


@pytest.mark.parametrize("activation", (*ACTIVATIONS, ("leaky_relu", -0.5), ("leaky_relu", 1.5)), ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", (Case((4, 3)), Case((2, 3, 2, 3)), Case((2, 3, 2, 3), axis=-1)), ids=str)
def test_backward_is_the_numerical_gradient(case, mode, activation):
    x, dy, residual, *_ = case.make(np.float64, std=1.0)
    bn = make(case, np.float64, mode, momentum=0.0, activation=activation)

    def loss() -> float:
        return float((bn(x, residual=residual) * dy).sum())

    _, dx, dresidual, dweight, dbias = run(bn, x, dy, residual)
    for got, variable in ((dx, x), (dresidual, residual), (dweight, bn.weight), (dbias, bn.bias)):
        assert_close(got, numerical_gradient(loss, variable, step=1e-5), 1e-7)


@pytest.mark.parametrize("with_residual", (False, True), ids=("", "residual"))
@pytest.mark.parametrize("activation", (None, "relu"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_sums_and_output_apart_are_both_at_once(backend, case, dtype, activation, with_residual):
    """To the bit, where no C compiler fuses operations of the channel arithmetic, and no oracle writes it otherwise.

    Statistics alone come from a kernel of their own, which adds in another order.
    """
    x, dy, residual, *_ = case.make(dtype, mean=50)
    residual = residual if with_residual else None
    bn = make(case, dtype, activation=activation)
    y = bn(x, residual=residual)
    saved = bn._saved
    dx, dresidual = (bn.backward(dy), None) if residual is None else bn.backward(dy)

    slope, kernels = saved.slope, _engine.kernels()
    sizes = saved.x.n, saved.x.c, saved.x.s
    mean, rest, m2 = np.empty((3, case.channels))
    kernels.moments(x, *sizes, mean, rest, m2)
    apart = finish_statistics(case.count, mean, m2, Parameters(bn.weight, bn.bias, wide=dtype == np.float64), bn.eps)
    assert_close(apart, saved.norm, 1e-12)
    again, signs = np.empty_like(x), None if saved.signs is None else np.empty_like(saved.signs)
    kernels.transform(x, residual, saved.norm, slope, *sizes, again, signs)

    sums, again_dx = np.empty((2, case.channels)), np.empty_like(x)
    again_dresidual = None if residual is None else np.empty_like(x)
    kernels.gradient_sums(dy, x, saved.norm, slope, signs, *sizes, sums)
    grads = finish_gradient(sums, case.count, saved.norm, x.dtype)
    kernels.gradient_apply(dy, x, saved.norm, slope, signs, *sizes, again_dx, again_dresidual, grads)
    pairs = [
        (again, y),
        (again_dx, dx),
        *zip(grads[:2], bn.grads.values(), strict=True),
    ]
    pairs += [] if residual is None else [(again_dresidual, dresidual)]
    for got, want in pairs:
        if backend == "numba":
            np.testing.assert_array_equal(got.astype(want.dtype), want.reshape(got.shape))
        else:
            assert_close(got.astype(want.dtype), want.reshape(got.shape))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_backward_opens_where_forward_did(case, mode):
    """The sign found again from x is the forward's to the bit: a far mean leaves float32 many values close to zero."""
    x, *_ = case.make(mean=1e5, std=0.05)
    bn = make(case, mode=mode, activation="relu")
    if mode == "eval":
        bn.running_mean[:] = x.mean(case.reduced, dtype=np.float64)
    bn.bias[:] = 0
    y = bn(x)
    for dy, let_through in ((y > 0, (y > 0).sum(case.reduced)), (y == 0, 0)):
        bn(x)
        bn.backward(dy.astype(np.float32))
        np.testing.assert_array_equal(bn.grads["bias"], let_through)


@pytest.mark.parametrize("activation", ("relu", ("leaky_relu", 0.1)), ids=str)
@pytest.mark.parametrize("with_residual", (False, True), ids=("", "residual"))
@pytest.mark.parametrize("case", (Case((64, 3)), Case((4, 3, 40)), Case((4, 9, 9, 3), axis=-1)), ids=str)
def test_nan_infinity_and_zero_pass_as_in_pytorch(torch, case, activation, with_residual):
    x, dy, residual, *_ = case.make()
    x.reshape(-1)[:8] = np.nan, np.inf, -np.inf, np.nan, 0, 1, np.inf, -np.inf
    residual.reshape(-1)[:8] = 0, 0, 0, 1, np.nan, np.inf, -np.inf, np.inf
    x.reshape(-1)[-9:] = residual.reshape(-1)[-9:] = 0
    bn = make(case, mode="eval", activation=activation)
    bn.bias[:] = bn.running_mean[:] = 0  # so that x = 0 gives exactly 0, where the gradient is a matter of convention
    given = (x, dy, residual) if with_residual else (x, dy)
    y, dx, dresidual, *_ = run(bn, *given)
    expected_y, expected_dx, expected_dresidual, *_ = pytorch(torch, bn, case, *given)
    assert_close(y, expected_y)
    known = ~np.isnan(y) if activation != "relu" else np.s_[...]  # what a leaky ReLU makes of a NaN's gradient is free
    assert_close(dx[known], expected_dx[known])
    if with_residual:
        assert_close(dresidual[known], expected_dresidual[known])


@pytest.mark.parametrize("activation", (None, "relu", ("leaky_relu", 1e39)), ids=str)
def test_an_infinite_value_is_one_term_wherever_it_lies(activation):
    """Kernels that see some of a row's values twice must not make NaN of those that count no more."""
    for place in range(22):
        x = np.ones((4, 1, 22), np.float32)
        x[:, 0, place] = np.inf
        bn = make(Case(x.shape), mode="eval", activation=activation)
        bn.weight[:] = 1
        bn.bias[:] = bn.running_mean[:] = 0
        bn(x)
        bn.backward(np.ones_like(x))
        assert bn.grads["weight"] == np.inf
        assert bn.grads["bias"] == x.size


@pytest.mark.parametrize("activation", (None, "relu"))
def test_residual_in_any_layout_and_in_place(activation):
    case = Case((3, 5, 9, 7))
    x, dy, residual, *_ = case.make()
    bn = make(case, activation=activation)
    expected = run(bn, x, dy, residual)
    for name, lay in LAYOUTS.items():
        for got, want in zip(run(bn, x, lay(dy), lay(residual)), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6, err_msg=name)
    out = residual.copy()
    assert bn(x, residual=out, out=out) is out
    np.testing.assert_array_equal(out, expected[0])
    dx, dresidual = bn.backward(dy)
    np.testing.assert_array_equal(dx, expected[1])
    np.testing.assert_array_equal(dresidual, expected[2])
    overlapping = np.zeros(x.size + 5, np.float32)
    given, out = (overlapping[k : k + x.size].reshape(x.shape) for k in (5, 0))
    given[...] = residual
    np.testing.assert_array_equal(bn(x, residual=given, out=out), expected[0])


def test_residual_may_be_the_input():
    case = Case((3, 5, 9, 7))
    x, dy, *_ = case.make()
    bn = make(case, activation="relu")
    for got, want in zip(run(bn, x, dy, x), run(bn, x, dy, x.copy()), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("activation", (None, "relu"))
def test_gradients_share_no_memory(activation):
    case = Case((3, 5, 9, 7))
    x, dy, residual, *_ = case.make()
    _, dx, dresidual, *_ = run(make(case, activation=activation), x, dy, residual)
    assert not np.shares_memory(dx, dresidual)
    assert not np.shares_memory(dresidual, dy)


def test_the_output_may_be_overwritten_before_backward():
    case = Case((3, 5, 9, 7))
    x, dy, residual, *_ = case.make()
    bn = make(case, activation="relu")
    _, *expected = run(bn, x, dy, residual)
    bn(x, residual=residual)[...] = 7
    residual[...] = 9
    dx, dresidual = bn.backward(dy)
    np.testing.assert_array_equal(dx, expected[0])
    np.testing.assert_array_equal(dresidual, expected[1])


def test_backward_after_the_output_overwrote_the_input_is_refused():
    x, dy, *_ = Case((3, 5, 9, 7)).make()
    bn = fastbn.BatchNorm2d(5, activation="relu")
    bn(x, out=x)
    with pytest.raises(RuntimeError, match="out"):
        bn.backward(dy)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("case", SHAPES[:-2], ids=str)
def test_folded_layer_is_eval_with_activation_and_residual(case, activation):
    x, _, residual, *_ = case.make()
    bn = make(case, mode="eval", activation=activation)
    folded = bn.fold()
    np.testing.assert_array_equal(folded(x), bn(x))
    np.testing.assert_array_equal(folded(x, residual=residual), bn(x, residual=residual))
    assert repr(activation) in repr(folded)


@pytest.mark.parametrize("activation", (None, "relu"))
@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.usefixtures("keep_threads")
def test_any_number_of_threads_gives_the_same_bits(case, mode, activation):
    x, dy, residual, *_ = case.make()
    fastbn.set_num_threads(1)
    alone = run(make(case, mode=mode, activation=activation), x, dy, residual)
    fastbn.set_num_threads(CPUS)
    for got, want in zip(run(make(case, mode=mode, activation=activation), x, dy, residual), alone, strict=True):
        np.testing.assert_array_equal(got, want)


def test_empty_batch():
    bn = fastbn.BatchNorm2d(3, activation="relu")
    x = np.empty((0, 3, 4, 4), np.float32)
    assert bn(x, residual=x).shape == x.shape
    dx, dresidual = bn.backward(x)
    assert dx.shape == dresidual.shape == x.shape


@pytest.mark.parametrize(
    "activation, word",
    (
        ("gelu", "'gelu'"),
        (3, "3"),
        (("leaky_relu",), "('leaky_relu',)"),
        (("leaky_relu", "x"), "'x'"),
        (("leaky_relu", np.nan), "nan"),
    ),
    ids=str,
)
def test_unknown_activation(activation, word):
    with pytest.raises(ValueError, match="None, 'relu' or \\('leaky_relu', slope\\)") as raised:
        fastbn.BatchNorm2d(3, activation=activation)
    assert word in str(raised.value)


@pytest.mark.parametrize(
    "shape, dtype, error, words",
    (
        ((3, 5, 9, 8), np.float32, ValueError, ("(3, 5, 9, 8)", "(3, 5, 9, 7)")),
        ((5,), np.float32, ValueError, ("(5,)", "(3, 5, 9, 7)")),
        ((3, 5, 9, 7), np.float64, TypeError, ("float64", "float32")),
        ((3, 5, 9, 7), np.int32, TypeError, ("int32", "float32")),
    ),
)
@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
def test_residual_of_the_wrong_kind(training, shape, dtype, error, words):
    bn = fastbn.BatchNorm2d(5).train(training)
    with pytest.raises(error, match="residual") as raised:
        bn(Case((3, 5, 9, 7)).make().x, residual=np.zeros(shape, dtype))
    for word in words:
        assert word in str(raised.value)
    assert bn.num_batches_tracked == 0


def test_copies_and_repr_keep_the_activation():
    bn = make(Case((3, 5, 9, 7)), activation=("leaky_relu", 0.1))
    assert repr(bn).endswith("activation=('leaky_relu', 0.1))")
    assert copy.deepcopy(bn).activation == bn.activation
    x = Case((3, 5, 9, 7)).make().x
    np.testing.assert_array_equal(copy.deepcopy(bn)(x), bn(x))
