"""Arrays far beyond the cache, and outputs that the compiled backends stream past it, whether it pays here or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from arrays import LAYOUTS
from cases import HUGE, PARALLEL, Case, Data
from conftest import CPUS
from reference import assert_close
from reference import batch_norm as reference

import fastbn
from fastbn import _engine
from fastbn.backends import _plan

LONG_ROWS = tuple(case for case in PARALLEL if case.axis == 1 and np.prod(case.shape[2:]) >= 512)
SHORT_ROWS = (Case((5, 144, 7, 7)), Case((9, 17, 13, 13)), Case((40, 5, 22, 22)))
STREAMED = (*LONG_ROWS, *SHORT_ROWS, Case((4096, 64)), Case((8, 55, 55, 16), axis=-1))

pytestmark = [
    pytest.mark.parametrize("backend", ("numba", "cython"), indirect=True, scope="module"),
    pytest.mark.usefixtures("backend", "keep_threads"),
]


@pytest.fixture
def cache(monkeypatch) -> Iterator[Callable[[int], None]]:
    """Plan for a cache of so many bytes, and a CPU that gains by streaming."""

    def plan_for(size: int) -> None:
        monkeypatch.setattr(_plan, "cache_bytes", lambda level: size)
        monkeypatch.setattr(_plan, "is_intel", lambda: False)
        forget_plans()

    yield plan_for
    forget_plans()


@pytest.fixture
def streaming(cache) -> None:
    """Make the plan stream, as if the cache were small."""
    cache(1)


def forget_plans() -> None:
    _engine.kernels()._operations._prepared.cache_clear()


def layer(case: Case, channels: int, **options) -> fastbn.BatchNorm2d:
    return getattr(fastbn, case.layer)(channels, axis=case.axis, activation="relu", **options)


def everything(case: Case, data: Data) -> list[np.ndarray]:
    """Results of every kernel: the plain ones, and those of a layer with activation and residual."""
    x, dy, residual, weight, bias = data
    y, mean, invstd = fastbn.batch_norm_forward(x, weight, bias, axis=case.axis)
    bn = layer(case, case.channels)
    fused = bn(x, residual=residual)
    return [
        *(y, *fastbn.batch_norm_backward(dy, x, mean, invstd, weight, axis=case.axis)),
        fastbn.scale_shift(x, weight, bias, axis=case.axis),
        *(fused, *bn.backward(dy), *bn.grads.values(), bn.running_var),
    ]


def check_results(case: Case) -> None:
    """They are those of a channel alone, on any number of threads."""
    x, dy, residual, weight, bias = data = case.make()
    fastbn.set_num_threads(1)
    results = everything(case, data)
    fastbn.set_num_threads(CPUS)
    for got, want in zip(everything(case, data), results, strict=True):
        np.testing.assert_array_equal(got, want)

    for channel in (0, case.channels // 2, case.channels - 1):
        part = slice(channel, channel + 1)
        index = (slice(None),) * (case.axis % x.ndim) + (part,)
        one = Case(x[index].shape, case.axis)
        expected = reference(one, x[index], dy[index], weight[part], bias[part])
        y, dx, dweight, dbias, scaled, *fused = (a[index] if a.ndim > 1 else a[part] for a in results)
        for got, want in ((y, expected.y), (dx, expected.dx), (dbias, expected.dbias)):
            assert_close(got, want)
        assert_close(dweight, expected.dweight, terms=results[2])
        assert_close(scaled, x[index].astype(float) * weight[part] + bias[part])

        alone = layer(case, 1, dtype=np.float64)
        z = alone(x[index].astype(float), residual=residual[index].astype(float))
        gradients = alone.backward(dy[index].astype(float))
        for got, want in zip(fused, (z, *gradients, *alone.grads.values(), alone.running_var), strict=True):
            assert_close(got, want, 1e-5)


@pytest.mark.parametrize("case", HUGE, ids=str)
def test_results_of_huge_arrays(case):
    check_results(case)


@pytest.mark.parametrize("case", STREAMED, ids=str)
@pytest.mark.usefixtures("streaming")
def test_streamed_results(case):
    s = math.prod(case.shape[2:]) if case.axis == 1 else 1
    assert _plan.plan(case.size // case.channels // s, case.channels, s, 4, 2, CPUS).streaming
    check_results(case)


@pytest.mark.parametrize("case", (*LONG_ROWS, *SHORT_ROWS), ids=str)
def test_threads_that_write_in_turn(case, cache, monkeypatch):
    """As where the cache has the input, and not the output too."""
    cache(2 * 4 * case.size)
    monkeypatch.setattr(_plan, "SERIAL", 0)
    n, c = case.shape[:2]
    assert _plan.plan(n, c, case.size // n // c, 4, 2, 2).turns
    assert not _plan.plan(n, c, case.size // n // c, 4, 2, 2, reduce=False).turns
    data = case.make()
    fastbn.set_num_threads(1)
    results = everything(case, data)
    fastbn.set_num_threads(2)
    for got, want in zip(everything(case, data), results, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("case", STREAMED, ids=str)
def test_every_plan_has_the_same_results(case, cache, monkeypatch):
    """Of those that are tried, where both cores and caches have what they need for all of them."""
    cache(3 * 4 * case.size)
    monkeypatch.setattr(_plan, "SERIAL", 0)
    fastbn.set_num_threads(2)
    data, plans, most = case.make(), _plan.plans, 0
    results = everything(case, data)
    for k in (1, 2):

        def other(*arguments, k=k):
            nonlocal most
            made = plans(*arguments)
            most = max(most, len(made))
            return [made[min(k, len(made) - 1)]]

        monkeypatch.setattr(_plan, "plans", other)
        forget_plans()
        for got, want in zip(everything(case, data), results, strict=True):
            np.testing.assert_array_equal(got, want)
    assert most == (3 if case.axis == 1 and case.shape[1] > 1 and len(case.shape) > 2 else 2)


def test_a_turn_that_does_not_end_is_not_waited_for(backend):
    """A thread writes without, should the system stop the other one."""
    if backend != "numba":
        return
    from numba import float32, intp, njit

    from fastbn.backends._numba import kernel
    from fastbn.backends._numba.buffers import Buffer, entry_of
    from fastbn.backends._numba.job import make_job
    from fastbn.backends._numba.vectors import seen_as

    x, turns = np.zeros(16, np.float32), np.zeros(3, np.intp)

    @njit((Buffer(float32), Buffer(intp)))
    def take_and_keep(x, turns):
        wide = seen_as(x, np.float64)
        job = make_job(seen_as(x, np.intp), (
            True, False, 0.0, 1.0, 0.0, x, x, x, x, x, x, seen_as(x, np.uint16), x, x, x, x, wide, wide, wide,
            seen_as(x, np.intp),
        ))  # fmt: skip
        job.writing = seen_as(turns, np.intp)
        turns[1], turns[2] = kernel.take_turn(job), kernel.take_turn(job)

    entry_of(take_and_keep)(x, turns)
    np.testing.assert_array_equal(turns, (1, 1, 0))


def test_what_is_not_there_does_not_keep_numba_from_streaming(backend):
    """Arrays that a pass has no use for are null pointers, which are equal."""
    if backend != "numba":
        return
    from numba import float32, njit

    from fastbn.backends._numba import kernel
    from fastbn.backends._numba.buffers import Buffer, entry_of
    from fastbn.backends._numba.job import make_job
    from fastbn.backends._numba.vectors import seen_as

    x, dy, out = (np.zeros(16, np.float32) for _ in range(3))

    @njit((Buffer(float32),) * 5)
    def streams(x, residual, dy, y, dx):
        wide = seen_as(x, np.float64)
        job = make_job(seen_as(x, np.intp), (
            True, False, 0.0, 1.0, 0.0, x, residual, dy, y, dx, x, seen_as(x, np.uint16),
            x, x, x, x, wide, wide, wide,
        ))  # fmt: skip
        return kernel.can_stream(job)

    can_stream = entry_of(streams)
    assert can_stream(x, None, None, out, None)
    assert can_stream(x, None, dy, None, out)
    assert not can_stream(x, None, None, x, None)
    assert not can_stream(x, out, None, out, None)
    assert not can_stream(x, None, dy, None, dy)


@pytest.mark.parametrize("case", STREAMED, ids=str)
@pytest.mark.usefixtures("streaming")
def test_every_instruction_set_streams(case, backend):
    """Vectors are shorter than a line of the cache in most of them, so that a row's first line takes some."""
    if backend != "cython":
        return
    from fastbn_ext import _kernels

    data = case.make()
    with fastbn.use_backend("numpy"):
        expected = everything(case, data)
    chosen = _kernels.get_instruction_set()
    try:
        for name in _kernels.available_instruction_sets():
            _kernels.set_instruction_set(name)
            for got, want in zip(everything(case, data), expected, strict=True):
                assert_close(got, want, 1e-5)
    finally:
        _kernels.set_instruction_set(chosen)


@pytest.mark.parametrize("case", STREAMED, ids=str)
@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("layout", ("8 bytes off", "unaligned"))
def test_output_at_any_alignment(case, layout):
    x, dy, _, weight, bias = case.make()
    y, mean, invstd = fastbn.batch_norm_forward(x, weight, bias, axis=case.axis)
    out = LAYOUTS[layout](x)
    assert fastbn.batch_norm_forward(x, weight, bias, axis=case.axis, out=out)[0] is out
    np.testing.assert_array_equal(out, y)
    dx, *_ = fastbn.batch_norm_backward(dy, x, mean, invstd, weight, axis=case.axis)
    fastbn.batch_norm_backward(dy, x, mean, invstd, weight, axis=case.axis, out=out)
    np.testing.assert_array_equal(out, dx)


@pytest.mark.parametrize("case", STREAMED, ids=str)
@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("layout", ("64-byte aligned", "8 bytes off"))
def test_in_place(case, layout):
    x, dy, residual, weight, bias = case.make()
    lay = LAYOUTS[layout]
    expected = fastbn.scale_shift(x, weight, bias, axis=case.axis)
    out = lay(x)
    np.testing.assert_array_equal(fastbn.scale_shift(out, weight, bias, axis=case.axis, out=out), expected)

    bn = layer(case, case.channels)
    expected = bn(x, residual=residual)
    out = lay(residual)
    np.testing.assert_array_equal(bn(x, residual=out, out=out), expected)

    y, mean, invstd = fastbn.batch_norm_forward(x, weight, bias, axis=case.axis)
    out = lay(x)
    np.testing.assert_array_equal(fastbn.batch_norm_forward(out, weight, bias, axis=case.axis, out=out)[0], y)
    dx, *_ = fastbn.batch_norm_backward(dy, x, mean, invstd, weight, axis=case.axis)
    for name in ("dy", "x"):
        given = {"dy": dy, "x": x}
        out = given[name] = lay(given[name])
        np.testing.assert_array_equal(
            fastbn.batch_norm_backward(**given, mean=mean, invstd=invstd, weight=weight, axis=case.axis, out=out)[0], dx
        )
