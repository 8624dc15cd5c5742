"""Any layout and stride in, any layout out: the results are the same; `out` is written, or refused and left alone."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import ARRAY_LIKES, LAYOUTS
from cases import DTYPES, Case

import fastbn
from fastbn._arrays import floating, view

pytestmark = pytest.mark.usefixtures("backend")

SHAPES = (Case((4, 17)), Case((3, 17, 5)), Case((3, 5, 9, 7)), Case((3, 9, 7, 5), axis=-1), Case((2, 3, 2, 4, 5)))


def forward(x, weight, bias, case, **out):
    return fastbn.batch_norm_forward(x, weight, bias, axis=case.axis, **out)[0]


def evaluate(x, weight, bias, case, **out):
    return fastbn.scale_shift(x, weight, bias, axis=case.axis, **out)


def backward(dy, weight, _, case, **out):
    """Of a fixed forward, so that the array in question is `dy`."""
    x = case.make(np.asarray(dy).dtype, seed=5).x
    _, mean, invstd = fastbn.batch_norm_forward(x, axis=case.axis)
    return fastbn.batch_norm_backward(dy, x, mean, invstd, weight, axis=case.axis, **out)[0]


def backward_x(x, weight, _, case, **out):
    """Of a fixed `dy`, so that the array in question is `x`."""
    dy = case.make(np.asarray(x).dtype, seed=5).dy
    _, mean, invstd = fastbn.batch_norm_forward(x, axis=case.axis)
    return fastbn.batch_norm_backward(dy, x, mean, invstd, weight, axis=case.axis, **out)[0]


def layer(x, weight, bias, case, **out):
    bn = getattr(fastbn, case.layer)(case.channels, axis=case.axis)
    bn.weight[:], bn.bias[:] = weight, bias
    return bn(x, **out)


OPERATIONS = (forward, evaluate, backward, backward_x, layer)
operations = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SHAPES, ids=str)
@operations
def test_any_layout_in_and_out_gives_the_same_result(operation, case, dtype):
    x, _, _, weight, bias = case.make(dtype)
    expected = operation(x, weight, bias, case)
    assert expected.flags.writeable
    for layout, lay in LAYOUTS.items():
        given = lay(x)
        kept = given.copy()
        np.testing.assert_allclose(operation(given, weight, bias, case), expected, rtol=1e-5, atol=1e-6, err_msg=layout)
        np.testing.assert_array_equal(given, kept)
        out = lay(np.full_like(x, 7))
        if layout != "read-only":
            assert operation(x, weight, bias, case, out=out) is out
            np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6, err_msg=f"out, {layout}")


@operations
def test_what_surrounds_a_strided_out_is_left_alone(operation):
    case = Case((3, 5, 9, 7))
    x, _, _, weight, bias = case.make()
    around = np.full((5, 7, 11, 9), 7, np.float32)
    operation(x, weight, bias, case, out=around[1:-1, 1:-1, 1:-1, 1:-1])
    around[1:-1, 1:-1, 1:-1, 1:-1] = 7
    assert (around == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@operations
def test_parameters_in_any_layout(operation, dtype):
    case = Case((3, 5, 9, 7))
    x, _, _, weight, bias = case.make(dtype)
    expected = operation(x, weight, bias, case)
    for name in ("read-only", "strided", "negative strides", "unaligned"):
        np.testing.assert_array_equal(
            operation(x, LAYOUTS[name](weight), LAYOUTS[name](bias), case), expected, err_msg=name
        )
    for name, convert in ARRAY_LIKES.items():
        got = operation(x, convert(weight), convert(bias), case)
        np.testing.assert_array_equal(got, expected, err_msg=name)


@pytest.mark.parametrize("dtype", (np.int8, np.uint64, np.float16, np.longdouble))
@operations
def test_parameters_of_other_real_dtypes(operation, dtype):
    x, *_ = Case((3, 5, 9, 7)).make()
    weight, bias = np.arange(1, 6), np.arange(5, 0, -1)
    expected = operation(x, weight.astype(float), bias.astype(float), Case(x.shape))
    np.testing.assert_allclose(
        operation(x, weight.astype(dtype), bias.astype(dtype), Case(x.shape)), expected, rtol=1e-6
    )


@pytest.mark.parametrize("name", ARRAY_LIKES)
@operations
def test_array_likes(operation, name):
    case = Case((3, 5, 9, 7))
    x, _, _, weight, bias = case.make(np.float64)
    got = operation(ARRAY_LIKES[name](x), weight, bias, case)
    assert type(got) is np.ndarray
    assert got.dtype == np.float64
    assert got.dtype.isnative
    np.testing.assert_allclose(got, operation(x, weight, bias, case), rtol=1e-5, atol=1e-6)


class DlpackOnly:
    """A producer that has no `__array__`."""

    def __init__(self, a):
        self.a = a

    def __dlpack__(self, **options):
        return self.a.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.a.__dlpack_device__()


def test_dlpack_producers_are_array_likes():
    x, _, _, scale, shift = Case((3, 5, 9, 7)).make()
    got = fastbn.scale_shift(DlpackOnly(x), scale, shift)
    np.testing.assert_array_equal(got, fastbn.scale_shift(x, scale, shift))


def test_producers_are_not_copied(torch):
    """PyTorch's tensors by `__array__`, what has DLPack alone by that, buffers and subclasses: the very same memory."""
    x = np.zeros((3, 5, 9, 7), np.float32)
    tensor = torch.zeros(3, 5, 9, 7)
    channels_last = torch.zeros(3, 5, 9, 7).to(memory_format=torch.channels_last)
    for given, address in (
        (tensor, tensor.data_ptr()),
        (channels_last, channels_last.data_ptr()),
        (DlpackOnly(x), x.ctypes.data),
        (memoryview(x), x.ctypes.data),
        (x.view(np.memmap), x.ctypes.data),
        (x.transpose(3, 1, 0, 2), x.ctypes.data),
    ):
        seen = view(floating(given), 1)
        assert seen.array.ctypes.data == address
        assert (seen.n * seen.c * seen.s, seen.array.size) == (x.size, x.size)


@operations
def test_pytorch_tensors_are_array_likes(torch, operation):
    case = Case((3, 5, 9, 7))
    x, _, _, weight, bias = case.make()
    got = operation(torch.tensor(x), weight, bias, case)
    np.testing.assert_array_equal(got, operation(x, weight, bias, case))


@pytest.mark.parametrize("case", (*SHAPES, Case((2, 64, 56, 56)), Case((2, 56, 56, 64), axis=-1)), ids=str)
@operations
def test_in_place(operation, case):
    """`out` is x itself, or dy itself: the result is that of a new one, to the bit."""
    x, _, _, weight, bias = case.make()
    expected = operation(x, weight, bias, case)
    assert operation(x, weight, bias, case, out=x) is x
    np.testing.assert_array_equal(x, expected)


@operations
def test_out_that_overlaps_the_input(operation):
    """With enough values that some are written long before others are read."""
    case = Case((4, 8, 64, 65))
    x, _, _, weight, bias = case.make()
    expected = operation(x, weight, bias, case)
    for shift in (-4000, -1, 1, 4000):
        memory = np.zeros(x.size + 8000, np.float32)
        given, out = (memory[start : start + x.size].reshape(x.shape) for start in (4000, 4000 + shift))
        given[...] = x
        operation(given, weight, bias, case, out=out)
        np.testing.assert_array_equal(out, expected)
    memory = np.zeros((4, 8, 64, 67), np.float32)
    memory[..., :65] = x
    operation(memory[..., :65], weight, bias, case, out=memory[..., 2:])
    np.testing.assert_array_equal(memory[..., 2:], expected)
    reverse = x[::-1]
    expected = operation(reverse.copy(), weight, bias, case)
    operation(reverse, weight, bias, case, out=x)
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("name", ("x", "dy"))
def test_gradient_into_what_it_was_computed_from(name):
    x, dy, _, weight, _ = Case((3, 5, 9, 7)).make()
    _, mean, invstd = fastbn.batch_norm_forward(x, weight)
    expected = fastbn.batch_norm_backward(dy, x, mean, invstd, weight)
    out = {"x": x, "dy": dy}[name]
    got = fastbn.batch_norm_backward(dy, x, mean, invstd, weight, out=out)
    assert got[0] is out
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "make_out, error, words",
    (
        (LAYOUTS["read-only"], ValueError, ("out", "read-only")),
        (lambda x: np.empty((3, 5, 9, 8), x.dtype), ValueError, ("out", "(3, 5, 9, 8)", "(3, 5, 9, 7)")),
        (lambda x: np.empty(x.size, x.dtype), ValueError, ("out", "(945,)", "(3, 5, 9, 7)")),
        (lambda x: np.empty(x.shape, np.float64), TypeError, ("out", "float64", "float32")),
        (lambda x: np.empty(x.shape, np.float16), TypeError, ("out", "float16", "float32")),
        (lambda x: np.empty(x.shape, x.dtype.newbyteorder()), TypeError, ("out", ">f4", "float32")),
        (lambda x: x.tolist(), TypeError, ("out", "list")),
        (lambda x: np.broadcast_to(x[:1], x.shape), ValueError, ("out", "read-only")),
    ),
    ids=("read-only", "shape", "rank", "dtype", "half", "byte order", "list", "broadcast"),
)
@operations
def test_out_that_cannot_be_written_is_refused(operation, make_out, error, words):
    case = Case((3, 5, 9, 7))
    x, _, _, weight, bias = case.make()
    out = make_out(x)
    kept = np.array(out, copy=True)
    with pytest.raises(error) as raised:
        operation(x, weight, bias, case, out=out)
    for word in words:
        assert word in str(raised.value)
    np.testing.assert_array_equal(np.array(out), kept)


def test_layer_takes_out_in_backward_and_in_eval():
    case = Case((3, 5, 9, 7))
    x, dy, *_ = case.make()
    bn = fastbn.BatchNorm2d(5)
    bn(x)
    expected, out = bn.backward(dy), np.empty_like(x)
    bn(x)
    assert bn.backward(dy, out=out) is out
    np.testing.assert_array_equal(out, expected)
    y = bn.eval()(x)
    assert bn(x, out=x) is x
    np.testing.assert_array_equal(x, y)
