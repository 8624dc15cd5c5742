"""What every rank of a communicator checks: ``mpiexec -n 2 python -m mpi4py tests/ranks.py EXPECTED.npz BACKEND ...``.

The file holds batches and what PyTorch makes of them in one process. An error on one rank ends all.
"""

from __future__ import annotations

import copy
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from mpi4py import MPI

import fastbn

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.Get_rank(), COMM.Get_size()
LAST = SIZE - 1
CUTS = {2: ((0, 4, 9), (0, 9, 9), (0, 1, 9)), 3: ((0, 4, 5, 9), (0, 0, 9, 9), (0, 3, 3, 9))}[SIZE]
TOLERANCE = {"float64": 1e-12, "float32": 3e-6}


class Counted:
    """A communicator that counts its collectives."""

    def __init__(self) -> None:
        self.calls = 0

    Get_rank, Get_size = COMM.Get_rank, COMM.Get_size

    def Allgather(self, *buffers: np.ndarray) -> None:  # noqa: N802  # MPI's name
        self.calls += 1
        COMM.Allgather(*buffers)


def close(got: np.ndarray, expected: np.ndarray) -> None:
    tolerance = TOLERANCE[str(got.dtype)]
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * abs(expected).max(initial=1))


def same_on_all_ranks(*arrays: np.ndarray | int | None) -> None:
    values = COMM.allgather([np.asarray(a).tobytes() for a in arrays])
    assert all(value == values[0] for value in values)


def state_of(bn: fastbn.BatchNorm2d) -> dict[str, bytes]:
    return {key: value.tobytes() for key, value in bn.state_dict().items()}


@contextmanager
def raises_everywhere(bn: fastbn.BatchNorm2d, error: type[Exception], text: str, on: int = LAST) -> Iterator[None]:
    """The error on its rank; on the others one of its kind that names the rank. The layer stays as it was."""
    before = state_of(bn)
    with pytest.raises(error, match=re.escape(text)) as raised:
        yield
    assert on == RANK or f"rank {on}: " in str(raised.value)
    assert state_of(bn) == before


def trains_as_one_process(expected: dict[str, np.ndarray]) -> None:
    for dtype in ("float32", "float64"):
        for momentum in (0.1, None):
            for cuts in CUTS:
                train(expected, dtype, momentum, slice(cuts[RANK], cuts[RANK + 1]))


def train(expected: dict[str, np.ndarray], dtype: str, momentum: float | None, mine: slice) -> None:
    comm = Counted()
    bn = fastbn.BatchNorm2d(5, momentum=momentum, dtype=dtype, activation="relu", comm=comm)
    bn.weight, bn.bias = expected["weight"], expected["bias"]
    for step in range(3):
        x, residual, dy = (expected[name][step][mine].astype(dtype) for name in ("x", "residual", "dy"))
        comm.calls = 0
        y = bn(x, residual=residual)
        assert comm.calls == (2 if step == 0 else 1)  # the first compares the numbers of channels
        dx, dresidual = bn.backward(dy)
        assert comm.calls == (3 if step == 0 else 2)
        for name, got in (("y", y), ("dx", dx), ("dresidual", dresidual)):
            close(got, expected[name][step][mine])
        for name in ("weight", "bias"):
            total = COMM.allreduce(bn.grads[name].astype(float))
            close(total.astype(dtype), expected[f"d{name}"][step])
    for name in ("running_mean", "running_var"):
        close(getattr(bn, name), expected[f"{name} {momentum}"])
    same_on_all_ranks(bn.running_mean, bn.running_var, bn.num_batches_tracked)
    assert bn.num_batches_tracked == 3
    comm.calls = 0
    bn.eval()(expected["x"][0][: RANK + 1])
    assert not comm.calls


def single_values_are_enough_together(expected: dict[str, np.ndarray]) -> None:
    x = expected["x"][0][:SIZE, :, 0, 0]
    alone = fastbn.BatchNorm1d(5)
    bn = fastbn.BatchNorm1d(5, comm=COMM)
    close(bn(x[RANK : RANK + 1]), alone(x)[RANK : RANK + 1])
    close(bn.backward(x[RANK : RANK + 1] ** 2), alone.backward(x**2)[RANK : RANK + 1])
    before = state_of(bn)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        bn(x[: RANK == 0])
    assert state_of(bn) == before
    assert bn(x[:0]).shape == (0, 5)
    assert bn.backward(x[:0]).shape == (0, 5)
    assert not bn.grads["weight"].any()
    assert state_of(bn) == before


def without_running_statistics(expected: dict[str, np.ndarray]) -> None:
    comm = Counted()
    x = expected["x"][0]
    bn = fastbn.BatchNorm2d(5, track_running_stats=False, comm=comm)
    cuts = CUTS[0]
    mine = slice(cuts[RANK], cuts[RANK + 1])
    close(bn(x[mine]), fastbn.BatchNorm2d(5)(x)[mine])
    comm.calls = 0
    np.testing.assert_array_equal(bn.eval()(x[mine]), fastbn.BatchNorm2d(5)(x[mine]))
    bn.backward(x[mine])
    assert not comm.calls


def errors_reach_all(expected: dict[str, np.ndarray]) -> None:
    x = expected["x"][0].astype(np.float32)
    bad = RANK == LAST
    bn = fastbn.BatchNorm2d(5, comm=COMM)
    bn(x)
    bn.backward(x)
    with raises_everywhere(bn, ValueError, "expected 4D input (got 3D input)"):
        bn(x[0] if bad else x)
    with raises_everywhere(bn, ValueError, "expected 5 channels"):
        bn(x[:, :4] if bad else x)
    with raises_everywhere(bn, TypeError, "int64"):
        bn(x.astype(np.int64) if bad else x)
    with raises_everywhere(bn, ValueError, "out must have shape"):
        bn(x, out=np.empty(3, np.float32) if bad else None)
    with raises_everywhere(bn, ValueError, "residual must be"):
        bn(x, residual=x[:1] if bad else x)
    with raises_everywhere(bn, RuntimeError, "backward needs a forward", on=RANK):
        bn.backward(x)
    bn.eps = 0 if bad else 1e-5
    with raises_everywhere(bn, ValueError, "eps must be positive"):
        bn(x)
    bn.eps = 1e-5
    bn(x)
    with raises_everywhere(bn, ValueError, "dy must have the input's shape"):
        bn.backward(x[1:] if bad else x)
    if bad:
        bn._saved = None
    with raises_everywhere(bn, RuntimeError, "backward needs a forward"):
        bn.backward(x)
    bn(x)
    bn.backward(x)  # all is well again


def ranks_must_agree(expected: dict[str, np.ndarray]) -> None:
    x = expected["x"][0]
    bn = fastbn.BatchNorm2d(5, comm=COMM)
    before = state_of(bn)

    def fails(error: type[Exception], text: str, call: Callable[[], object]) -> None:
        with pytest.raises(error, match=text):
            call()
        assert state_of(bn) == before

    fails(TypeError, f"float32 on rank {LAST}", lambda: bn(x.astype(np.float32) if RANK == LAST else x))
    other = fastbn.BatchNorm2d(5 - RANK, comm=COMM)
    fails(ValueError, "5 on rank 0, 4 on rank 1", lambda: other(x[:, RANK:]))
    bn(x)
    before = state_of(bn)
    fails(RuntimeError, "forward on rank 0, backward on rank 1", lambda: bn.backward(x) if RANK else bn(x))


def copies_and_communicators(expected: dict[str, np.ndarray]) -> None:
    x = expected["x"][0]
    bn = fastbn.BatchNorm2d(5, comm=COMM)
    if RANK == 0:
        bn = copy.deepcopy(bn)
    bn(x)
    assert copy.copy(bn).comm is copy.deepcopy(bn).comm is COMM
    assert pickle.loads(pickle.dumps(bn)).comm is None
    assert repr(bn) == repr(fastbn.BatchNorm2d(5))
    alone, whole = fastbn.BatchNorm2d(5, comm=MPI.COMM_SELF), fastbn.BatchNorm2d(5)
    np.testing.assert_array_equal(alone(x), whole(x))
    np.testing.assert_array_equal(alone.backward(x), whole.backward(x))


def recalibrates_over_ranks(expected: dict[str, np.ndarray]) -> None:
    x = expected["x"]
    layers = [fastbn.BatchNorm2d(c, dtype=np.float64, comm=COMM).eval() for c in (5, 4)]
    with fastbn.recalibrate(layers):
        for step, cuts in enumerate(CUTS):
            batch = x[step][cuts[RANK] : cuts[RANK + 1]]
            for bn in layers:
                bn(batch[:, : bn.num_features])
    everything = x[: len(CUTS)].swapaxes(1, 2).swapaxes(0, 1).reshape(5, -1)
    for bn in layers:
        close(bn.running_mean, everything.mean(1)[: bn.num_features])
        close(bn.running_var, everything.var(1, ddof=1)[: bn.num_features])
        same_on_all_ranks(bn.running_mean, bn.running_var, bn.num_batches_tracked)
        assert bn.num_batches_tracked == len(CUTS)
        assert not bn.training
    for during in (False, True):
        with raises_everywhere(layers[0], RuntimeError, "stop here"), fastbn.recalibrate(layers):
            layers[1](x[0][:, :4])
            if RANK == LAST:
                raise RuntimeError("stop here")
            if during:
                layers[0](x[0])
    assert not layers[0].training
    layers[0](x[0])


def main() -> None:
    path, *backends = sys.argv[1:]
    with np.load(path) as file:
        expected = dict(file)
    for backend in backends:
        with fastbn.use_backend(backend):
            trains_as_one_process(expected)
            single_values_are_enough_together(expected)
            without_running_statistics(expected)
    errors_reach_all(expected)
    ranks_must_agree(expected)
    copies_and_communicators(expected)
    recalibrates_over_ranks(expected)
    print(f"rank {RANK} of {SIZE} is content")  # noqa: T201  # the test reads it


if __name__ == "__main__":
    main()
