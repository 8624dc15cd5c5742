"""The pool of outputs: memory is used again, and never while anyone can still see it."""

import ctypes
import threading

import numpy as np
import pytest

import fastbn
from fastbn import _memory

SHAPE = (4, 8, 128, 128)  # 2 MiB of float32
SCALE, SHIFT = np.full(8, 2.0), np.ones(8)


@pytest.fixture(autouse=True)
def _own_pool():
    limit = fastbn.get_pool_limit()
    fastbn.release_pool()
    yield
    fastbn.set_pool_limit(limit)
    fastbn.release_pool()


def make(value=1.0):
    return fastbn.scale_shift(np.full(SHAPE, value, np.float32), SCALE, SHIFT)


def address(array):
    return array.__array_interface__["data"][0]


def test_memory_of_an_output_that_is_gone_is_used_again():
    first = address(make())
    assert address(make()) == first


def test_outputs_begin_on_a_line_of_the_cache():
    assert address(make()) % 64 == 0


HOLDERS = {
    "array": lambda y: y,
    "item": lambda y: y[1],
    "slices": lambda y: y[1][::2].T[3:],
    "dtype": lambda y: y.reshape(-1)[5:].view(np.uint32),
    "memoryview": lambda y: memoryview(y)[1:],
    "buffer": lambda y: np.frombuffer(y, np.uint8),
    "pointer": lambda y: y.ctypes.data_as(ctypes.c_void_p),
    "iterator": lambda y: y.flat,
    "torch": lambda y: pytest.importorskip("torch").from_numpy(y),
    "dlpack": lambda y: pytest.importorskip("torch").from_dlpack(y)[1:],
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_what_anyone_sees_is_never_handed_out(holder):
    y = make(1.0)
    first, held = address(y), HOLDERS[holder](y)
    del y
    others = [make(5.0) for _ in range(3)]
    assert first not in map(address, others)
    del held
    assert address(make()) == first


def test_two_outputs_that_live_have_memory_of_their_own():
    a, b = make(1.0), make(2.0)
    np.testing.assert_array_equal(a, 3.0)
    np.testing.assert_array_equal(b, 5.0)


def test_the_order_of_axes_is_the_input_s():
    x = np.ones(SHAPE, np.float32).transpose(0, 2, 3, 1)
    y = fastbn.scale_shift(x, SCALE, SHIFT, axis=-1)
    assert y.strides == x.strides


def test_layer_s_backward_sees_the_forward_s_output_unchanged():
    bn = fastbn.BatchNorm2d(8, activation="relu")
    x = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    y = bn(x)
    before = y.copy()
    dx = bn.backward(np.ones_like(y))
    np.testing.assert_array_equal(y, before)
    assert not np.shares_memory(dx, y)


def test_limit_of_zero_switches_the_pool_off():
    fastbn.set_pool_limit(0)
    make()
    assert fastbn.release_pool() == 0


def test_pool_holds_no_more_than_its_limit():
    fastbn.set_pool_limit(5 << 20)
    kept = [make() for _ in range(4)]
    assert sum(block.size for block in _memory._blocks) <= 5 << 20
    del kept
    assert fastbn.release_pool() <= 5 << 20


def test_release_gives_back_what_is_unseen_only():
    y = make()
    make()
    assert fastbn.release_pool() >= y.nbytes
    np.testing.assert_array_equal(y, 3.0)
    assert fastbn.release_pool() == 0


@pytest.mark.parametrize("limit, error", ((-1, ValueError), (1.5, TypeError), (True, TypeError), ("1", TypeError)))
def test_bad_limits(limit, error):
    with pytest.raises(error, match="pool's limit"):
        fastbn.set_pool_limit(limit)


def test_threads_never_share_an_output():
    wrong = []

    def work(value):
        for _ in range(30):
            y = make(value)
            if not (y == 2 * value + 1).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(k),)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
