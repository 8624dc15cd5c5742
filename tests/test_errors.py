"""Bad input: an error of PyTorch's kind that says what came and what was expected, and nothing half-changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

import fastbn

pytestmark = pytest.mark.usefixtures("backend")


def array(*shape: int, dtype: np.typing.DTypeLike = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


@contextmanager
def raises(error: type[Exception], *words: str) -> Iterator[None]:
    """As `pytest.raises`, with words that must all stand in the message."""
    with pytest.raises(error) as raised:
        yield
    for word in words:
        assert word in str(raised.value), f"{word!r} is not in {str(raised.value)!r}"


@pytest.mark.parametrize(
    "layer, shape, words",
    (
        (fastbn.BatchNorm1d, (3,), ("2D or 3D", "1D")),
        (fastbn.BatchNorm1d, (2, 3, 4, 4), ("2D or 3D", "4D")),
        (fastbn.BatchNorm2d, (2, 3), ("4D", "2D")),
        (fastbn.BatchNorm2d, (2, 3, 4, 4, 4), ("4D", "5D")),
        (fastbn.BatchNorm3d, (2, 3, 4, 4), ("5D", "4D")),
        (fastbn.BatchNorm2d, (), ("4D", "0D")),
        (fastbn.BatchNorm1d, (4, 5), ("3", "5", "channel")),
        (fastbn.BatchNorm2d, (2, 4, 3, 3), ("3", "4", "channel")),
    ),
    ids=str,
)
@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
def test_wrong_rank_or_channels(layer, shape, words, training):
    with raises(ValueError, *words):
        layer(3).train(training)(array(*shape))


def test_wrong_channels_last_names_the_axis():
    with raises(ValueError, "3", "5", "channel"):
        fastbn.BatchNorm2d(3, axis=-1)(array(2, 3, 3, 5))


BAD_DTYPES = ("float16", "longdouble", "int64", "uint8", "bool", "complex64", "object", "<U1", "datetime64[s]", ">f4")


@pytest.mark.parametrize("dtype", BAD_DTYPES)
@pytest.mark.parametrize(
    "call",
    (
        fastbn.BatchNorm1d(3),
        fastbn.batch_norm_forward,
        lambda x: fastbn.batch_norm(x, np.zeros(3), np.ones(3)),
        lambda x: fastbn.scale_shift(x, np.zeros(3), np.ones(3)),
        lambda x: fastbn.batch_norm_backward(array(2, 3), x, np.zeros(3), np.ones(3)),
        lambda x: fastbn.batch_norm_backward(x, array(2, 3), np.zeros(3), np.ones(3)),
    ),
    ids=(
        "layer",
        "batch_norm_forward",
        "batch_norm",
        "scale_shift",
        "x of batch_norm_backward",
        "dy of batch_norm_backward",
    ),
)
def test_unsupported_dtype_is_named(call, dtype):
    with raises(TypeError, "foreign byte order" if dtype == ">f4" else str(np.dtype(dtype)), "float32", "float64"):
        call(np.zeros((2, 3), dtype))


def test_masked_arrays_are_refused():
    with raises(TypeError, "masked array"):
        fastbn.batch_norm_forward(np.ma.masked_less(array(4, 3), 0))


@pytest.mark.parametrize("dtype", ("float16", "int32", "<U1", "nonsense"))
def test_unsupported_layer_dtype_is_named(dtype):
    with raises(TypeError, dtype, "float32", "float64"):
        fastbn.BatchNorm2d(3, dtype=dtype)


@pytest.mark.parametrize(
    "call",
    (
        fastbn.BatchNorm1d(3),
        fastbn.BatchNorm1d(3, track_running_stats=False).eval(),
        fastbn.batch_norm_forward,
        lambda x: fastbn.batch_norm(x, None, None, training=True),
    ),
    ids=("train", "eval without running statistics", "batch_norm_forward", "batch_norm"),
)
@pytest.mark.parametrize("shape", ((1, 3), (1, 3, 1)), ids=str)
def test_one_value_per_channel_in_training(call, shape):
    with raises(ValueError, "more than 1 value per channel when training", str(shape)):
        call(array(*shape))


def test_one_value_per_channel_in_eval_is_fine():
    assert fastbn.BatchNorm1d(3).eval()(array(1, 3)).shape == (1, 3)


@pytest.mark.parametrize("eps", (0.0, -1e-5, np.nan))
def test_eps_is_positive_in_training(eps):
    for call in (
        lambda: fastbn.batch_norm_forward(array(4, 3), eps=eps),
        lambda: fastbn.batch_norm(array(4, 3), None, None, training=True, eps=eps),
    ):
        with raises(ValueError, "eps", "positive", str(eps)):
            call()
    with raises(ValueError, "eps", "positive" if eps == 0 else "negative", str(eps)):
        fastbn.BatchNorm1d(3, eps=eps)(array(4, 3))


@pytest.mark.parametrize("eps", (-1e-5, np.nan))
def test_eps_is_never_negative(eps):
    for call in (
        lambda: fastbn.batch_norm(array(4, 3), np.zeros(3), np.ones(3), eps=eps),
        lambda: fastbn.BatchNorm1d(3, eps=eps).eval()(array(4, 3)),
    ):
        with raises(ValueError, "eps", "negative", str(eps)):
            call()


@pytest.mark.parametrize("eps", ("1e-5", None, [1e-5]), ids=repr)
def test_eps_is_a_number(eps):
    with raises(TypeError, "eps", repr(eps)):
        fastbn.BatchNorm1d(3, eps=eps)


def test_eps_of_zero_is_fine_in_eval():
    x = array(4, 3)
    np.testing.assert_array_equal(fastbn.batch_norm(x, np.zeros(3), np.ones(3), eps=0.0), x)
    np.testing.assert_array_equal(fastbn.BatchNorm1d(3, eps=0.0).eval()(x), x)


@pytest.mark.parametrize("momentum", ("0.1", [0.1], 1j), ids=repr)
def test_momentum_is_a_number_or_none(momentum):
    with raises(TypeError, "momentum", repr(momentum)):
        fastbn.BatchNorm1d(3, momentum=momentum)
    mean, out = np.zeros(3), np.zeros((4, 3), np.float32)
    with raises(TypeError, "momentum", repr(momentum)):
        fastbn.batch_norm(array(4, 3), mean, np.ones(3), training=True, momentum=momentum, out=out)
    assert not mean.any()
    assert not out.any()


@pytest.mark.parametrize("n", (0, -3))
def test_a_layer_has_channels(n):
    with raises(ValueError, "num_features", str(n)):
        fastbn.BatchNorm2d(n)


@pytest.mark.parametrize("n", (2.0, "3", None, True), ids=repr)
def test_number_of_channels_is_an_integer(n):
    with raises(TypeError, "num_features", type(n).__name__):
        fastbn.BatchNorm2d(n)


def test_input_without_channels():
    for call in (fastbn.batch_norm_forward, fastbn.moments):
        with raises(ValueError, "channel", "(4, 0)"):
            call(array(4, 0))
        with raises(ValueError, "channel", "scalar"):
            call(np.float32(1))


@pytest.mark.parametrize("axis", (3, -4, True, 1.5, "C", None), ids=repr)
def test_axis_out_of_range(axis):
    error, word = (ValueError, str(axis)) if type(axis) is int else (TypeError, type(axis).__name__)
    for call in (fastbn.batch_norm_forward, fastbn.moments):
        with raises(error, "axis", word):
            call(array(2, 3, 4), axis=axis)
    with raises(error, "axis", word):
        fastbn.BatchNorm1d(3, axis=axis)


@pytest.mark.parametrize(
    "mean, var, training, words",
    (
        (np.zeros(4), np.ones(3), True, ("running_mean", "3", "4")),
        (np.zeros(3), np.ones(4), False, ("running_var", "3", "4")),
        (np.zeros((3, 1)), np.ones(3), False, ("running_mean", "(3, 1)")),
        (np.zeros(3), None, True, ("running_mean", "running_var", "both")),
        (None, np.ones(3), False, ("running_mean", "running_var")),
        (None, None, False, ("running_mean", "eval")),
    ),
)
def test_running_statistics_of_the_wrong_kind(mean, var, training, words):
    with raises(ValueError, *words):
        fastbn.batch_norm(array(4, 3), mean, var, training=training)


def test_running_statistics_of_a_layer_that_were_replaced_wrongly():
    bn = fastbn.BatchNorm1d(3)
    bn.running_mean = np.zeros(4)
    for training in (True, False):
        with raises(ValueError, "running_mean", "3", "4"):
            bn.train(training)(array(4, 3))
    bn.running_mean = None
    with raises(ValueError, "running_mean", "running_var", "both"):
        bn(array(4, 3))


def test_running_statistics_are_updated_in_place_or_refused():
    locked = np.zeros(3)
    locked.flags.writeable = False
    writable = np.ones(3)
    for given in ((locked, writable), (writable, locked)):
        with raises(ValueError, "running_", "read-only"):
            fastbn.batch_norm(array(4, 3), *given, training=True)
    with raises(TypeError, "running_mean", "list"):
        fastbn.batch_norm(array(4, 3), [0, 0, 0], writable, training=True)
    with raises(TypeError, "running_var", "int64"):
        fastbn.batch_norm(array(4, 3), np.zeros(3), np.ones(3, np.int64), training=True)
    np.testing.assert_array_equal(writable, 1)


PER_CHANNEL = {
    "weight": lambda v: fastbn.batch_norm_forward(array(4, 3), weight=v),
    "bias": lambda v: fastbn.batch_norm_forward(array(4, 3), bias=v),
    "scale": lambda v: fastbn.scale_shift(array(4, 3), v, np.zeros(3)),
    "shift": lambda v: fastbn.scale_shift(array(4, 3), np.ones(3), v),
    "mean": lambda v: fastbn.batch_norm_backward(array(4, 3), array(4, 3), v, np.ones(3)),
    "invstd": lambda v: fastbn.batch_norm_backward(array(4, 3), array(4, 3), np.ones(3), v),
    "weight in backward": lambda v: fastbn.batch_norm_backward(array(4, 3), array(4, 3), np.ones(3), np.ones(3), v),
}


@pytest.mark.parametrize("name", PER_CHANNEL)
def test_arguments_per_channel_of_the_wrong_length_or_kind(name):
    call, argument = PER_CHANNEL[name], name.split()[0]
    with raises(ValueError, argument, "3", "4"):
        call(np.ones(4))
    with raises(ValueError, argument, "3", "(3, 1)"):
        call(np.ones((3, 1)))
    with raises(ValueError, argument, "3"):
        call(1.0)
    with raises(TypeError, argument, "complex128"):
        call(np.ones(3, complex))


def test_folded_layer_of_the_wrong_channels():
    with raises(ValueError, "3", "4", "channels"):
        fastbn.BatchNorm1d(3).fold()(array(5, 4))


def test_assigned_parameters_are_checked():
    bn = fastbn.BatchNorm1d(3)
    with raises(ValueError, "weight", "3", "4"):
        bn.weight = np.ones(4)
    with raises(AttributeError, "bias"):
        fastbn.BatchNorm1d(3, affine=False).bias = np.ones(3)


def test_backward_of_the_wrong_shape_or_dtype():
    x, mean, invstd = array(4, 3), np.zeros(3), np.ones(3)
    with raises(ValueError, "dy", "(4, 2)", "(4, 3)"):
        fastbn.batch_norm_backward(array(4, 2), x, mean, invstd)
    with raises(TypeError, "dy", "float64", "float32"):
        fastbn.batch_norm_backward(array(4, 3, dtype=np.float64), x, mean, invstd)


def test_backward_of_a_layer_goes_with_one_forward():
    bn = fastbn.BatchNorm1d(3)
    with raises(RuntimeError, "backward", "forward"):
        bn.backward(array(4, 3))
    bn(array(4, 3))
    bn.backward(array(4, 3))
    with raises(RuntimeError, "backward", "forward"):
        bn.backward(array(4, 3))


def test_backward_of_the_wrong_shape_can_be_put_right():
    bn, dy = fastbn.BatchNorm1d(3), array(4, 3)
    bn(array(4, 3))
    for bad, error, words in (
        (array(4, 2), ValueError, ("dy", "(4, 2)", "(4, 3)")),
        (array(5, 3), ValueError, ("dy", "(5, 3)", "(4, 3)")),
        (array(4, 3, dtype=np.float64), TypeError, ("dy", "float64", "float32")),
    ):
        with raises(error, *words):
            bn.backward(bad)
    with raises(ValueError, "out", "(4, 2)", "(4, 3)"):
        bn.backward(dy, out=array(4, 2))
    assert bn.backward(dy).shape == (4, 3)


BAD_CALLS: dict[str, Callable[[fastbn.BatchNorm2d], object]] = {
    "rank": lambda bn: bn(array(2, 3)),
    "channels": lambda bn: bn(array(2, 4, 5, 5)),
    "one value": lambda bn: bn(array(1, 3, 1, 1)),
    "dtype": lambda bn: bn(array(2, 3, 5, 5, dtype=np.float16)),
    "shape of out": lambda bn: bn(array(2, 3, 5, 5), out=array(2, 3, 5, 6)),
    "dtype of out": lambda bn: bn(array(2, 3, 5, 5), out=array(2, 3, 5, 5, dtype=np.float64)),
    "text": lambda bn: bn("nonsense"),
    "nothing": lambda bn: bn(None),
    "ragged": lambda bn: bn([[1.0], [2.0, 3.0]]),
    "shape of dy": lambda bn: bn.backward(array(2, 3, 4, 4)),
    "keys of a state": lambda bn: bn.load_state_dict({"weight": np.full(3, 9.0)}),
    "shape in a state": lambda bn: bn.load_state_dict({**bn.state_dict(), "weight": np.ones(3), "bias": np.ones(4)}),
    "text in a state": lambda bn: bn.load_state_dict({**bn.state_dict(), "weight": np.ones(3), "bias": ["x"] * 3}),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_layer_is_as_it_was_after_an_error(name):
    bn = fastbn.BatchNorm2d(3)
    bn.weight[:] = 5
    x, dy = array(2, 3, 5, 5), array(2, 3, 5, 5)
    bn(x)
    twin = copy.deepcopy(bn)
    with pytest.raises((ValueError, TypeError)):
        BAD_CALLS[name](bn)
    for key, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, twin.state_dict()[key])
    twin(x)
    bn(x)
    np.testing.assert_array_equal(bn.backward(dy), twin.backward(dy))


def test_load_state_dict_names_every_key_at_once():
    bn = fastbn.BatchNorm1d(3)
    state = {"weight": np.ones(4), "running_mean": np.zeros((3, 1)), "gamma": np.ones(3), "beta": np.ones(3)}
    with raises(ValueError, "bias", "running_var", "gamma", "beta", "weight", "(4,)", "(3,)", "running_mean", "(3, 1)"):
        bn.load_state_dict(state)
    with raises(ValueError, "weight", "(4,)", "(3,)"):  # not strict: other keys may differ, but not shapes
        bn.load_state_dict(state, strict=False)
    with raises(TypeError, "state", "list"):
        bn.load_state_dict([("weight", np.ones(3))])


@pytest.mark.parametrize("shape", ((0, 3), (0, 3, 4), (2, 3, 0), (0, 3, 0)), ids=str)
@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
def test_empty_batch(shape, training):
    bn = fastbn.BatchNorm1d(3).train(training)
    bn(array(4, 3))
    state = bn.state_dict()
    y = bn(array(*shape))
    assert y.shape == shape
    assert y.dtype == np.float32
    assert bn.backward(array(*shape)).shape == shape
    for gradient in bn.grads.values():
        np.testing.assert_array_equal(gradient, [0, 0, 0])
    for key, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, state[key])


@pytest.mark.parametrize("axis, shape", ((1, (0, 3)), (1, (2, 3, 0)), (-1, (0, 5, 3)), (-1, (2, 0, 3))), ids=str)
def test_empty_arrays_in_functions(axis, shape):
    x = np.empty(shape)
    mean, var = np.full(3, 2.0), np.full(3, 4.0)
    assert fastbn.batch_norm(x, mean, var, training=True, axis=axis).shape == shape
    np.testing.assert_array_equal((mean, var), [[2] * 3, [4] * 3])
    y, *batch = fastbn.batch_norm_forward(x, axis=axis)
    assert y.shape == shape
    assert [a.shape for a in batch] == [(3,), (3,)]
    dx, dweight, dbias = fastbn.batch_norm_backward(x, x, *batch, axis=axis)
    assert dx.shape == shape
    np.testing.assert_array_equal((dweight, dbias), np.zeros((2, 3)))
    assert fastbn.scale_shift(x, mean, var, axis=axis).shape == shape
    assert fastbn.moments(x, axis=axis).count == 0


def test_running_statistics_that_would_overwrite_each_other():
    x, one, few = array(4, 3), np.ones(3), np.ones(1)
    repeated = np.lib.stride_tricks.as_strided(few, (3,), (0,))
    with raises(ValueError, "share memory", "in place"):
        fastbn.batch_norm(x, one, one, training=True)
    with raises(ValueError, "running_var", "overlap", "(0,)"):
        fastbn.batch_norm(x, one, repeated, training=True)
    assert (one == 1).all()
    assert (few == 1).all()


def test_running_statistics_that_share_memory():
    both = np.ones(4)
    for mean, var in ((both[:3], both[:3]), (both[:3], both[1:])):
        with pytest.raises(ValueError, match="share memory"):
            fastbn.batch_norm(np.ones((2, 3)), mean, var, training=True)
    np.testing.assert_array_equal(both, 1)
    interleaved = np.ones(6)
    fastbn.batch_norm(np.eye(3), interleaved[::2], interleaved[1::2], training=True)
    np.testing.assert_allclose(interleaved[1::2], 0.9 + 0.1 / 3)
