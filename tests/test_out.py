"""`out` in all the ways it can lie to the other arrays: the right result, or an error and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastbn

pytestmark = pytest.mark.usefixtures("backend")

SHAPE = (3, 4, 5, 6)
SIZE = int(np.prod(SHAPE))


class Memory:
    """All arrays of a call in one block, one behind the other; `out` lies over it, beginning at one of its values."""

    def __init__(self, dtype: type, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.block = rng.standard_normal(4 * SIZE + 100).astype(dtype)
        self.starts = {"x": 0, "dy": SIZE, "residual": 2 * SIZE}
        self.starts |= {name: 3 * SIZE + 4 * i for i, name in enumerate(("weight", "bias", "mean", "var"))}
        self.vector("var")[:] = rng.uniform(0.5, 2, 4)

    def array(self, name: str, shift: int = 0) -> np.ndarray:
        start = self.starts[name] + shift
        return self.block[start : start + SIZE].reshape(SHAPE)

    def vector(self, name: str) -> np.ndarray:
        return self.block[self.starts[name] :][:4]


def forward(m, out):
    return fastbn.batch_norm_forward(m.array("x"), m.vector("weight"), m.vector("bias"), out=out)[0]


def train(m, out):
    return fastbn.batch_norm(
        m.array("x"), m.vector("mean"), m.vector("var"), m.vector("weight"), m.vector("bias"), training=True, out=out
    )


def evaluate(m, out):
    return fastbn.batch_norm(
        m.array("x"), m.vector("mean"), m.vector("var"), m.vector("weight"), m.vector("bias"), out=out
    )


def scale_shift(m, out):
    return fastbn.scale_shift(m.array("x"), m.vector("weight"), m.vector("bias"), out=out)


def backward(m, out):
    return fastbn.batch_norm_backward(
        m.array("dy"), m.array("x"), m.vector("mean"), m.vector("var"), m.vector("weight"), out=out
    )


def layer(m, out):
    bn = fastbn.BatchNorm2d(4, activation="relu")
    bn.params = {"weight": m.vector("weight"), "bias": m.vector("bias")}
    bn.running_mean, bn.running_var = m.vector("mean"), m.vector("var")
    return bn(m.array("x"), residual=m.array("residual"), out=out)


def layer_backward(m, out):
    bn = fastbn.BatchNorm2d(4, activation="relu")
    bn(m.array("x"), residual=m.array("residual"))
    return (*bn.backward(m.array("dy"), out=out), *bn.grads.values())


def folded(m, out):
    fold = fastbn.ScaleShift(m.vector("weight"), m.vector("bias"), activation="relu")
    return fold(m.array("x"), residual=m.array("residual"), out=out)


def variant(cls, *options):
    def run(m, out):
        bn = cls(4, *options, activation="relu")
        y = bn(m.array("x"), residual=m.array("residual"), out=out)
        return y, bn.running_mean, bn.running_var

    def run_backward(m, out):
        bn = cls(4, *options)
        bn(m.array("x"))
        return bn.backward(m.array("dy"), out=out), *bn.grads.values()

    return {cls.__name__: run, f"{cls.__name__}, backward": run_backward}


OPERATIONS: dict[str, Callable[[Memory, Any], Any]] = {
    f.__name__: f for f in (forward, train, evaluate, scale_shift, backward, layer, layer_backward, folded)
}
OPERATIONS |= variant(fastbn.GhostBatchNorm, 2) | variant(fastbn.BatchRenorm)
OPERATIONS |= variant(fastbn.RunningBatchNorm) | variant(fastbn.FrozenBatchNorm)


def results(result: Any) -> list[np.ndarray]:
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_out_over_any_other_array(operation, dtype):
    run = OPERATIONS[operation]
    expected = [a.copy() for a in results(run(Memory(dtype), None))]
    updates = operation in ("train", "layer")
    for over in Memory(dtype).starts:
        for shift in (0, 1, -1, 7, -16, 100, -100):
            m = Memory(dtype)
            if not 0 <= m.starts[over] + shift <= len(m.block) - SIZE:
                continue
            out = m.array(over, shift)
            before = m.block.copy()
            if updates and any(np.shares_memory(out, m.vector(name)) for name in ("mean", "var")):
                with pytest.raises(ValueError, match="out shares memory with running_"):
                    run(m, out)
                np.testing.assert_array_equal(m.block, before)
                continue
            got = results(run(m, out))
            assert got[0] is out
            for one, other in zip(got, expected, strict=True):
                np.testing.assert_array_equal(one, other, err_msg=f"{over} {shift}")


def window(a: np.ndarray, strides: tuple[int, ...]) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(a, SHAPE, strides)


OUTS: dict[str, Callable[[np.ndarray], Any]] = {
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype)[:SIZE].reshape(SHAPE),
    "broadcast": lambda a: window(a, (0, *np.empty(SHAPE, a.dtype).strides[1:])),
    "one value": lambda a: window(a, (0, 0, 0, 0)),
    "windows": lambda a: window(a, (a.itemsize,) * 4),
    "rows over each other": lambda a: window(a, (a.itemsize * 100, a.itemsize * 25, a.itemsize * 5, a.itemsize)),
    "shape": lambda a: a[:SIZE].reshape(SHAPE[::-1]),
    "rank": lambda a: a[:SIZE],
    "empty": lambda a: a[:0],
    "scalar": lambda a: a[:1].reshape(()),
    "half": lambda a: np.empty(SHAPE, np.float16),
    "integers": lambda a: np.empty(SHAPE, np.int32),
    "bytes": lambda a: np.empty(SHAPE, "S4"),
    "objects": lambda a: np.empty(SHAPE, object),
    "structured": lambda a: np.empty(SHAPE, [("a", a.dtype)]),
    "foreign": lambda a: np.empty(SHAPE, a.dtype.newbyteorder()),
    "other": lambda a: np.empty(SHAPE, np.float64 if a.itemsize == 4 else np.float32),
    "list": lambda a: a.tolist(),
    "text": lambda a: "x",
    "number": lambda a: 1,
    "memoryview": memoryview,
    "type": lambda a: np.ndarray,
    "masked": lambda a: np.ma.masked_array(a[:SIZE].reshape(SHAPE), True),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_out_that_cannot_take_the_result(operation):
    for name, make in OUTS.items():
        m, spare = Memory(np.float32), np.zeros(1000, np.float32)
        out, before = make(spare), m.block.copy()
        with pytest.raises((ValueError, TypeError), match="out "):
            OPERATIONS[operation](m, out)
        np.testing.assert_array_equal(m.block, before)
        assert not spare.any(), name


GOOD_OUTS: dict[str, Callable[[], np.ndarray]] = {
    "Fortran": lambda: np.empty(SHAPE, np.float32, "F"),
    "transposed": lambda: np.empty(SHAPE[::-1], np.float32).T,
    "strided": lambda: np.empty([2 * n for n in SHAPE], np.float32)[::2, ::2, ::2, ::2],
    "reversed": lambda: np.empty(SHAPE, np.float32)[::-1, ::-1, ::-1, ::-1],
    "interleaved": lambda: np.empty((*SHAPE, 2), np.float32)[..., 1],
    "field": lambda: np.empty(SHAPE, [("a", "f4"), ("b", "i1")])["a"],
    "unaligned": lambda: np.empty(SIZE * 4 + 1, np.uint8)[1:].view(np.float32).reshape(SHAPE),
    "subclass": lambda: np.empty(SHAPE, np.float32).view(np.memmap),
    "metadata": lambda: np.empty(SHAPE, np.dtype("f4", metadata={"a": 1})),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_out_of_any_layout(operation):
    run = OPERATIONS[operation]
    expected = results(run(Memory(np.float32), None))[0]
    for name, make in GOOD_OUTS.items():
        out = make()
        assert results(run(Memory(np.float32), out))[0] is out
        np.testing.assert_array_equal(out, expected, err_msg=name)


def test_out_over_running_statistics_that_are_copied():
    """Strided ones, or of two dtypes, are updated in a copy and written back: `out` is asked for their own memory."""
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    memory = np.zeros(12, np.float32)
    out = memory.reshape(4, 3)
    with pytest.raises(ValueError, match="out shares memory with running_mean"):
        fastbn.batch_norm(x, memory[::4], np.ones(3, np.float32), training=True, out=out)
    for bn in (fastbn.BatchNorm1d(3), fastbn.GhostBatchNorm(3, virtual_batch_size=2), fastbn.BatchRenorm(3)):
        bn.running_mean = memory[::4]
        with pytest.raises(ValueError, match="out shares memory with running_mean"):
            bn(x, out=out)
    bn = fastbn.BatchNorm1d(3)
    bn.running_mean, bn.running_var = memory[:3], np.ones(3)
    with pytest.raises(ValueError, match="out shares memory with running_mean"):
        bn(x, out=out)
