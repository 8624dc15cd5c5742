"""The pool of outputs: memory is used again once nobody can see it, never before, and within its limit."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from subprocesses import python

import fastbn
from fastbn import _memory

MIB = 1 << 20
SHAPE = (16, 4, 64, 128)
ZEROS = np.zeros(SHAPE, np.float32)  # 2 MiB


@pytest.fixture(autouse=True)
def empty_pool() -> Iterator[None]:
    """Begin with nothing in the pool, and leave its limit as it was."""
    limit = fastbn.get_pool_limit()
    fastbn.release_pool()
    yield
    fastbn.set_pool_limit(limit)


@pytest.fixture
def keep_collector() -> Iterator[None]:
    """Leave the garbage collector as it was."""
    threshold = gc.get_threshold()
    yield
    gc.set_threshold(*threshold)
    gc.enable()


def shifted(by: float, n: int = SHAPE[0]) -> np.ndarray:
    """Make an output of 2 MiB that has one known value everywhere."""
    return fastbn.scale_shift(ZEROS[:n], np.ones(4), np.full(4, by))


def address(a: np.ndarray) -> int:
    return a.__array_interface__["data"][0]


def test_memory_of_unseen_outputs_is_used_again():
    y = shifted(1)
    first = address(y)
    y[:] = 3
    del y
    for by in (2, 3):
        y = shifted(by)
        assert address(y) == first
        assert (y == by).all()
        del y


def test_layers_use_it_in_forward_and_backward():
    bn = fastbn.BatchNorm2d(4)
    seen = set()
    for _ in range(5):
        y = bn(ZEROS + 1)
        dx = bn.backward(ZEROS)
        seen |= {address(y), address(dx)}
        del y, dx
    assert len(seen) <= 2


HOLDERS = {
    "array": lambda y: y,
    "slice": lambda y: y[3:5],
    "slice of a slice": lambda y: y[1:9][2:4, 1],
    "one value": lambda y: y[7, 3, 9:10, 8:9],
    "transposed": lambda y: y.T,
    "flat": lambda y: y.reshape(-1)[-5:],
    "other dtype": lambda y: y.view(np.uint8),
    "structured": lambda y: y.view([("re", "f4"), ("im", "f4")])["im"],
    "windows": lambda y: np.lib.stride_tricks.sliding_window_view(y[0, 0, 0], 4),
    "broadcast": lambda y: np.broadcast_to(y[0, 0, 0], (3, 128)),
    "masked": lambda y: np.ma.masked_array(y, copy=False),
    "subclass": lambda y: y.view(np.memmap),
    "iterator": lambda y: y.flat,
    "iterator of rows": iter,
    "memoryview": memoryview,
    "slice of a memoryview": lambda y: memoryview(y)[2:3],
    "memoryview of a slice": lambda y: memoryview(y[2:3]),
    "frombuffer": lambda y: np.frombuffer(y, np.float32),
    "array over the buffer": lambda y: np.ndarray((4,), np.float32, buffer=y),
    "pointer": lambda y: y.ctypes.data_as(ctypes.c_void_p),
    "DLPack": np.from_dlpack,
    "capsule": lambda y: y.__dlpack__(),
    "container": lambda y: [{"y": (y[0],)}],
}


def assert_not_handed_out(hold) -> None:
    y = shifted(1)
    first, held = address(y), hold(y)
    del y
    others = [shifted(by) for by in (2, 3, 4)]
    fastbn.release_pool()
    others.append(shifted(5))
    assert first not in map(address, others)
    del held, others
    fastbn.release_pool()


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_that_can_be_seen_is_never_handed_out(holder):
    assert_not_handed_out(HOLDERS[holder])


def test_memory_that_pytorch_sees_is_never_handed_out(torch):
    for hold in (torch.from_numpy, torch.from_dlpack, lambda y: torch.as_tensor(y)[2:3, 1]):
        assert_not_handed_out(hold)


def test_memory_that_a_weak_reference_finds_is_not_handed_out():
    y = shifted(1)
    found = weakref.ref(y.base)
    del y
    other = shifted(2)
    assert found() is not None
    assert not np.shares_memory(found(), other)


def test_memory_is_used_again_when_the_last_view_goes():
    y = shifted(1)
    first, held = address(y), [memoryview(y)[2:3], y[3:5].T]
    del y
    while held:
        assert address(shifted(2)) != first
        fastbn.release_pool()
        held.pop()
    assert address(shifted(2)) == first


def test_a_layer_s_saved_input_is_never_handed_out():
    """The output of one layer is the input that the next one keeps for its backward."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(SHAPE, np.float32) for _ in range(2))
    first, second = fastbn.BatchNorm2d(4), fastbn.BatchNorm2d(4)
    second(first(x))  # nobody else holds what lies between
    others = [shifted(by) for by in range(4)]
    got = first.backward(second.backward(dy))
    assert all((y == by).all() for by, y in enumerate(others))
    fastbn.set_pool_limit(0)
    first, second = fastbn.BatchNorm2d(4), fastbn.BatchNorm2d(4)
    between = first(x)
    second(between)
    np.testing.assert_array_equal(got, first.backward(second.backward(dy)))


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@pytest.mark.parametrize("order", ((0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)), ids=str)
def test_outputs_are_ordinary_arrays(order, dtype):
    x = np.zeros((8, 16, 32, 64), dtype).transpose(order)
    axis = order.index(1)
    for by in (1, 2):  # of new memory, and of used memory
        y = fastbn.scale_shift(x, np.ones(16), np.full(16, by), axis=axis)
        assert type(y) is np.ndarray
        assert y.shape == x.shape
        assert y.strides == x.strides
        assert y.dtype == dtype
        assert y.flags.writeable
        assert y.flags.aligned
        assert address(y) % 64 == 0
        assert (y == by).all()
        del y


def test_small_outputs_do_not_come_from_the_pool():
    y = shifted(1, n=4)
    del y
    assert fastbn.release_pool() == 0


def test_release_gives_back_what_nobody_sees():
    kept, gone = shifted(1), shifted(2)
    del gone
    assert ZEROS.nbytes <= fastbn.release_pool() <= ZEROS.nbytes + 4096
    assert fastbn.release_pool() == 0
    assert (kept == 1).all()
    del kept
    shifted(3)


def test_limit_caps_what_is_held():
    fastbn.set_pool_limit(5 * MIB)
    outputs = [shifted(by) for by in range(6)]
    for by, y in enumerate(outputs):
        assert (y == by).all()
    del outputs, y
    assert fastbn.release_pool() <= 5 * MIB + 4096


def test_lower_limit_gives_back_at_once():
    y = [shifted(by) for by in range(4)]
    del y
    fastbn.set_pool_limit(3 * MIB)
    assert fastbn.release_pool() <= 3 * MIB + 4096


def test_no_limit_no_pool():
    fastbn.set_pool_limit(0)
    assert fastbn.get_pool_limit() == 0
    y = shifted(1)
    del y
    assert fastbn.release_pool() == 0


def test_threads_never_get_each_other_s_memory():
    def work(k: int) -> bool:
        held = []
        for i in range(30):
            y = shifted(k + i / 32, 8)
            held.append((k + i / 32, y[i % 8 :][:1]))
            held = held[-3:]
            if not all((view == by).all() for by, view in held):
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


@pytest.mark.parametrize("values", (ZEROS, np.zeros((8, *SHAPE), np.float32)), ids=("pooled", "too large for that"))
def test_memory_that_the_pool_keeps_is_given_back_before_there_is_none(values, monkeypatch):
    fastbn.set_pool_limit(8 * MIB)
    y = [shifted(by, 9) for by in range(3)]
    del y
    refused = []

    def scarce(make):
        def made(*arguments):
            if not refused:
                refused.append(arguments)
                raise MemoryError
            return make(*arguments)

        return made

    with monkeypatch.context() as patch:
        for name in ("empty", "empty_like"):
            patch.setattr(_memory.np, name, scarce(getattr(np, name)))
        assert _memory.empty_like(values).shape == values.shape
    assert len(refused) == 1
    assert [block.nbytes > values.nbytes for block in _memory._blocks] == [True] * (values is ZEROS)


@pytest.mark.parametrize(
    "limit, error", ((-1, ValueError), (1.5, TypeError), ("1", TypeError), (None, TypeError), (True, TypeError))
)
def test_limit_out_of_range(limit, error):
    fastbn.set_pool_limit(MIB)
    with pytest.raises(error, match="limit") as raised:
        fastbn.set_pool_limit(limit)
    assert (str(limit) if error is ValueError else type(limit).__name__) in str(raised.value)
    assert fastbn.get_pool_limit() == MIB


@pytest.mark.parametrize("text, limit", (("", 1 << 30), ("0", 0), (" 4096 ", 4096)))
def test_limit_of_the_environment(text, limit):
    assert int(python("import fastbn; print(fastbn.get_pool_limit())", FASTBN_POOL_LIMIT=text).stdout) == limit


@pytest.mark.parametrize("text", ("-1", "1.5", "much"))
def test_nonsense_in_the_environment_is_an_error(text):
    result = python("import fastbn; fastbn.get_pool_limit()", check=False, FASTBN_POOL_LIMIT=text)
    for word in ("ValueError", "FASTBN_POOL_LIMIT", text):
        assert word in result.stderr


MEANWHILE = {"nothing": lambda: None, "release": fastbn.release_pool, "limit": lambda: fastbn.set_pool_limit(64 * MIB)}


@pytest.mark.usefixtures("keep_collector")
@pytest.mark.parametrize("meanwhile", MEANWHILE.values(), ids=MEANWHILE)
def test_a_finaliser_gets_memory_of_its_own(meanwhile):
    """Whenever the collector runs while an output is made, what a finaliser makes then lies elsewhere."""

    class Node:
        def __init__(self, kept: list[np.ndarray]) -> None:
            self.me, self.kept = self, kept

        def __del__(self) -> None:
            self.kept.append(_memory.empty_like(ZEROS))
            meanwhile()

    _memory.empty_like(ZEROS)
    gc.collect()
    gc.disable()
    for threshold in range(1, 40):
        kept: list[np.ndarray] = []
        Node(kept)
        gc.set_threshold(threshold)
        gc.enable()
        y = _memory.empty_like(ZEROS)
        gc.disable()
        gc.collect()
        assert not np.shares_memory(y, *kept)
        del y
