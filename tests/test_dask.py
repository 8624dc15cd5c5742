"""Statistics and normalisation of Dask arrays: on threads, and on a cluster of two processes."""

from __future__ import annotations

import doctest
import gc
import os
import pickle
import threading
import weakref

import dask
import dask.array as da
import numpy as np
import pytest
from dask.base import is_dask_collection
from distributed import Client, LocalCluster
from subprocesses import python

import fastbn
import fastbn.dask
from fastbn import Moments

SHAPE = (23, 6, 5, 4)
CHUNKS = {
    "one": SHAPE,
    "samples": (3, 6, 5, 4),
    "single samples": (1, 6, 5, 4),
    "channels": (23, (1, 3, 2), 5, 4),
    "rows": (23, 6, 2, 4),
    "every axis": (7, 4, 2, 3),
    "empty": ((0, 20, 0, 3), (0, 4, 0, 2), (5, 0), 4),
}


def images(dtype=np.float64, axis: int = 1, *, mean: float = 3.0) -> np.ndarray:
    """Another mean and standard deviation in every channel."""
    rng = np.random.default_rng(0)
    spread = np.arange(1, 7).reshape(6, 1, 1)
    return np.moveaxis(mean + spread * (rng.standard_normal(SHAPE) + 0.5), 1, axis).astype(dtype)


def assert_moments_of(m: Moments, x: np.ndarray, axis: int = 1, rtol: float = 1e-12) -> None:
    wide = np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1).astype(np.longdouble)
    assert m.count == wide.shape[1]
    np.testing.assert_allclose(m.mean, wide.mean(1).astype(float), rtol=rtol)
    np.testing.assert_allclose(m.var(), wide.var(1).astype(float), rtol=rtol)


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_moments_of_any_chunks(backend, chunks, dtype):
    x = images(dtype)
    m = fastbn.dask.moments(da.from_array(x, chunks))
    assert isinstance(m, Moments)
    with dask.config.set(scheduler="sync"):  # the tasks run where the backend was chosen
        assert_moments_of(m, x)


@pytest.mark.parametrize("axis", (-1, 0, 2))
def test_the_channel_axis(axis):
    x = images(axis=axis)
    array = da.from_array(x, 4)
    m = fastbn.dask.moments(array, axis)
    assert_moments_of(m, x, axis)
    y = fastbn.dask.scale_shift(array, m.mean, m.m2, axis).compute(scheduler="sync")
    np.testing.assert_array_equal(y, fastbn.scale_shift(x, m.mean, m.m2, axis=axis))


def test_an_array_of_channels_alone():
    m = fastbn.dask.moments(da.from_array(np.arange(5.0), 2), axis=0)
    assert m == Moments(1, np.arange(5.0), np.zeros(5))


def test_chunks_of_unknown_size():
    x = images()
    array = da.from_array(x, (4, 4, 5, 4))
    some = x[:, 0, 0, 0] > 5
    assert_moments_of(fastbn.dask.moments(array[array[:, 0, 0, 0] > 5]), x[some])
    channels = x[0, :, 0, 0] > 5
    assert 0 < channels.sum() < 6
    assert_moments_of(fastbn.dask.moments(array[:, array[0, :, 0, 0] > 5]), x[:, channels])
    nothing = fastbn.dask.moments(array[array[:, 0, 0, 0] > 1e9])
    assert nothing.compute() == Moments.empty(6)
    with pytest.raises(ValueError, match="at least one channel"):
        fastbn.dask.moments(array[:, array[0, :, 0, 0] > 1e9]).compute()


def test_no_digits_are_lost():
    x = images(mean=1e6)
    for chunks in ((1, 6, 1, 1), (2, 3, 5, 4)):
        assert_moments_of(fastbn.dask.moments(da.from_array(x, chunks)), x, rtol=1e-9)


@pytest.mark.parametrize("split_every", (2, 3, 16))
@pytest.mark.parametrize("chunks", ((1, 6, 5, 4), (1, 6, 1, 4)), ids=str)
def test_merges_are_a_tree_of_bounded_width(chunks, split_every):
    array = da.from_array(np.ones((40, 6, 5, 4)), chunks)
    m = fastbn.dask.moments(array, split_every=split_every)
    merged = {key: len(parts) for key, parts in m.__dask_graph__().get_all_dependencies().items()}
    assert max(merged.values()) <= max(split_every, 4 if chunks[2] == 1 else 2)  # two axes take two each at least
    assert m.count == 800


@pytest.mark.parametrize("dtype", (np.uint8, np.uint16, np.float16))
def test_images_are_measured_as_they_are(dtype):
    x = np.random.default_rng(0).integers(0, 200, SHAPE).astype(dtype)
    assert_moments_of(fastbn.dask.moments(da.from_array(x, (4, 4, 2, 4))), x.astype(np.float64))


@pytest.mark.parametrize("chunks", ("samples", "every axis", "empty"))
def test_missing_values_masks_and_weights(chunks):
    """As `Moments.update` has them, from NumPy arrays or Dask's, whatever their chunks."""
    x, rng = images(), np.random.default_rng(2)
    mask, weights = rng.random(SHAPE) < 0.7, rng.random(SHAPE[0])
    x[~mask] = np.nan
    array = da.from_array(x, CHUNKS[chunks])
    pixels = mask[:, :1]
    for given in (
        {"nan_policy": "omit"},
        {"where": mask},
        {"where": da.from_array(mask, 3), "weights": weights},
        {"where": pixels & ~np.isnan(x).any(1, keepdims=True), "weights": da.from_array(weights, 5)},
        {"weights": rng.random(SHAPE[2:]), "nan_policy": "omit"},
    ):
        plain = {key: np.asarray(value) if key != "nan_policy" else value for key, value in given.items()}
        expected = Moments.empty(6).update(x, **plain)
        m = fastbn.dask.moments(array, **given)
        np.testing.assert_allclose(m.count, expected.count, rtol=1e-12)
        np.testing.assert_allclose(m.mean, expected.mean, rtol=1e-12)
        np.testing.assert_allclose(m.var(), expected.var(), rtol=1e-12)


def test_masks_of_chunks_of_unknown_size():
    x = images()
    array = da.from_array(x, (4, 6, 5, 4))
    some = array[array[:, 0, 0, 0] > 5]
    expected = Moments.empty(6).update(x[x[:, 0, 0, 0] > 5], where=x[x[:, 0, 0, 0] > 5] > 4)
    np.testing.assert_allclose(fastbn.dask.moments(some, where=some > 4).mean, expected.mean, rtol=1e-12)
    with pytest.raises(ValueError, match=r"6 chunks.*got 1"):
        fastbn.dask.moments(some, where=np.ones((9, 6, 5, 4), bool))


# --- a collection that is a Moments ---------------------------------------------------------------------------------


class Source:
    """A Dask array that counts how often its chunks are made and how many are alive."""

    def __init__(self, chunks: int, size: int = 1000):
        self.made, self.alive, self.most = 0, 0, 0
        self.lock = threading.Lock()
        self.array = da.map_blocks(
            self.make, chunks=((size,) * chunks, (3,)), dtype=np.float64, meta=np.empty((0, 0)), size=size
        )

    def make(self, *, size: int, block_id: tuple[int, int]) -> np.ndarray:
        chunk = np.random.default_rng(block_id).standard_normal((size, 3))
        with self.lock:
            self.made += 1
            self.alive += 1
            self.most = max(self.most, self.alive)
        weakref.finalize(chunk, self.gone)
        return chunk

    def gone(self) -> None:
        with self.lock:
            self.alive -= 1


def test_nothing_is_computed_before_it_is_looked_at_and_then_once():
    source = Source(5)
    m = fastbn.dask.moments(source.array)
    assert "to be computed" in repr(m)
    assert source.made == 0
    assert is_dask_collection(m)
    assert m.count == 5000
    assert source.made == 5
    assert not is_dask_collection(m)
    assert m.compute() == m
    assert m.mean.shape == m.var().shape == m.std().shape == (3,)
    assert repr(m).startswith("Moments(count=5000")
    assert source.made == 5


def test_compute_keeps_what_it_computed():
    source = Source(5)
    m = fastbn.dask.moments(source.array)
    computed = m.compute(scheduler="sync")
    assert type(computed) is Moments
    assert computed == m
    computed.mean[:] = 9
    assert computed != m
    assert source.made == 5


def test_threads_that_look_at_once_compute_once():
    source = Source(5)
    m = fastbn.dask.moments(source.array)
    threads = [threading.Thread(target=getattr, args=(m, "mean")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert source.made == 5


def test_computed_with_other_collections_in_one_pass():
    source = Source(5)
    total, m, known = dask.compute(source.array.sum(0), fastbn.dask.moments(source.array), Moments(1, [2.0], [0.0]))
    assert type(m) is Moments
    np.testing.assert_allclose(m.mean * m.count, total, rtol=1e-12)
    assert source.made == 5
    assert known == Moments(1, [2.0], [0.0])


def test_persist_and_delayed():
    x = images()
    persisted = fastbn.dask.moments(da.from_array(x, (4, 4, 5, 4))).persist()
    assert is_dask_collection(persisted)
    assert_moments_of(persisted, x)
    lazy = fastbn.dask.moments(da.from_array(x, (4, 4, 5, 4)))
    np.testing.assert_array_equal(dask.delayed(np.sqrt)(dask.delayed(Moments.var)(lazy)).compute(), persisted.std())
    np.testing.assert_array_equal(dask.delayed(Moments.var)(persisted).compute(), persisted.var())


def test_it_merges_and_updates_like_any_moments():
    x = images()
    array = da.from_array(x, (4, 4, 5, 4))
    assert_moments_of(fastbn.dask.moments(array) + fastbn.dask.moments(array + 1), np.concatenate((x, x + 1)))
    assert_moments_of(Moments.empty(6).update(x + 1).merge(fastbn.dask.moments(array)), np.concatenate((x + 1, x)))
    assert_moments_of(fastbn.dask.moments(array).update(x + 1), np.concatenate((x, x + 1)))


def test_pickles_small_once_computed():
    m = fastbn.dask.moments(da.from_array(images(), (4, 4, 5, 4)))
    lazy = pickle.loads(pickle.dumps(m))
    assert is_dask_collection(lazy)
    assert lazy == m
    assert type(pickle.loads(pickle.dumps(m))) is Moments
    assert pickle.loads(pickle.dumps(m)) == m
    assert len(pickle.dumps(m)) < 16 * 6 + 500
    with pytest.raises(AttributeError, match="unknown"):
        _ = m.unknown


# --- two passes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_scale_shift_of_any_chunks(backend, chunks, dtype):
    x, rng = images(dtype), np.random.default_rng(1)
    scale, shift = rng.standard_normal((2, 6))
    array = da.from_array(x, chunks)
    y = fastbn.dask.scale_shift(array, scale, shift)
    assert y.chunks == array.chunks
    assert y.dtype == dtype
    np.testing.assert_array_equal(y.compute(scheduler="sync"), fastbn.scale_shift(x, scale, shift))


def test_scale_shift_of_unknown_sizes():
    x = images()
    array = da.from_array(x, (4, 6, 5, 4))
    some = array[array[:, 0, 0, 0] > 5][:, array[0, :, 0, 0] > 5]
    expected = x[x[:, 0, 0, 0] > 5][:, x[0, :, 0, 0] > 5]
    scale = np.arange(expected.shape[1]) + 1.0
    y = fastbn.dask.scale_shift(some, scale, -scale)
    np.testing.assert_array_equal(y.compute(scheduler="sync"), fastbn.scale_shift(expected, scale, -scale))
    with pytest.raises(ValueError, match="7"):
        fastbn.dask.scale_shift(some, np.ones(7), np.ones(7)).compute()


@pytest.mark.parametrize("scheduler", ("sync", "threads"))
def test_two_passes_hold_a_few_chunks(scheduler):
    """What is larger than memory: never more chunks alive than the workers hold in their hands."""
    source = Source(200, size=100)
    workers = 1 if scheduler == "sync" else 2
    with dask.config.set(scheduler=scheduler, num_workers=workers):
        m = fastbn.dask.moments(source.array)
        scale, shift = fastbn.fold_scale_shift(m.mean, m.var(), eps=0)
        assert source.made == 200
        assert 1 <= source.most <= 2 * workers
        normalised = fastbn.dask.scale_shift(source.array, scale, shift)
        again = fastbn.dask.moments(normalised)
        np.testing.assert_allclose(again.mean, 0, atol=1e-14)
        np.testing.assert_allclose(again.std(), 1, rtol=1e-14)
    assert source.made == 400
    assert source.most <= 2 * workers
    gc.collect()
    assert source.alive == 0


def test_a_task_computes_on_one_thread(monkeypatch):
    """Dask runs many tasks at a time, on all cores together."""
    update, threads = Moments.update, []

    def counted(self: Moments, x: np.ndarray, axis: int) -> Moments:
        threads.append(fastbn.get_num_threads())
        return update(self, x, axis)

    monkeypatch.setattr(Moments, "update", counted)
    m = fastbn.dask.moments(da.ones((8, 3), chunks=(2, 3)))
    before = fastbn.get_num_threads()
    assert threads.pop() == before  # the look at the dtype, by the caller
    assert m.count == 8
    assert threads == [1] * 4
    assert fastbn.get_num_threads() == before


# --- a cluster of processes -----------------------------------------------------------------------------------------


def _pid(block: np.ndarray) -> np.ndarray:
    return np.full_like(block, os.getpid())


def test_two_processes_give_the_bits_of_one():
    x = images(np.float32)
    array = da.from_array(x, (2, 4, 5, 4))
    pids = da.zeros((64, 3), chunks=(1, 3)).map_blocks(_pid, dtype=float, meta=np.empty((0, 0)))
    with fastbn.use_backend(fastbn.available_backends()[0]):  # which is what threads and processes begin with
        here = fastbn.dask.moments(array).compute(scheduler="sync")
        assert fastbn.dask.moments(array).compute(scheduler="threads") == here
        expected = fastbn.scale_shift(x, here.std(), here.mean)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, processes=True) as cluster,
        Client(cluster) as client,
    ):
        there = fastbn.dask.moments(array)
        assert there == here
        assert client.compute(fastbn.dask.moments(array)).result() == here
        normalised = fastbn.dask.scale_shift(array, there.std(), there.mean)
        np.testing.assert_array_equal(normalised.compute(), expected)
        mean_pid = fastbn.dask.moments(pids).mean  # of both processes: neither's own
        low, high = sorted(client.run(os.getpid).values())
        assert ((low < mean_pid) & (mean_pid < high)).all()
        assert os.getpid() not in (low, high)


# --- the module -----------------------------------------------------------------------------------------------------


def test_the_example_of_the_documentation():
    assert doctest.testmod(fastbn.dask).failed == 0


def test_imported_when_it_is_wanted_and_missed_in_words():
    code = """
import sys, fastbn
assert "dask" not in sys.modules
sys.modules["dask"] = None
try:
    fastbn.dask
except ImportError as error:
    print(error)
del sys.modules["dask"]
print(fastbn.dask.moments)
"""
    missed, found = python(code).stdout.splitlines()
    assert "fastbn[dask]" in missed
    assert "moments" in found


# --- errors ---------------------------------------------------------------------------------------------------------

ONES = da.ones((4, 3, 2), chunks=(2, 3, 2))
HALVES = da.ones((4, 3, 2), chunks=(2, 2, 2))
UNKNOWN = HALVES[:, da.from_array(np.array([True, True, False]), 2)]


@pytest.mark.parametrize(
    "call, error, words",
    (
        (lambda: fastbn.dask.moments(np.ones((2, 3))), TypeError, ("dask.array.Array", "ndarray")),
        (lambda: fastbn.dask.moments(ONES, axis=3), ValueError, ("axis", "3")),
        (lambda: fastbn.dask.moments(ONES, axis=1.0), TypeError, ("axis", "float")),
        (lambda: fastbn.dask.moments(da.ones((2, 0))), ValueError, ("at least one channel", "(2, 0)")),
        (lambda: fastbn.dask.moments(da.ones((2, 3), dtype=complex)), TypeError, ("complex128",)),
        (lambda: fastbn.dask.moments(ONES, unknown=1), TypeError, ("unknown",)),
        (
            lambda: fastbn.dask.moments(ONES, where=np.ones((4, 2, 2), bool)),
            ValueError,
            ("where", "(4, 3, 2)", "(4, 2, 2)"),
        ),
        (lambda: fastbn.dask.moments(ONES, where=np.ones((4, 3, 2))), TypeError, ("where", "float64")),
        (lambda: fastbn.dask.moments(ONES, weights=np.ones(3)), ValueError, ("weights", "(3,)")),
        (lambda: fastbn.dask.moments(ONES, weights=np.ones((1, 4, 3, 2))), ValueError, ("weights", "(1, 4, 3, 2)")),
        (lambda: fastbn.dask.moments(ONES, nan_policy="raise"), ValueError, ("nan_policy", "raise")),
        (lambda: fastbn.dask.moments(ONES, split_every=1), ValueError, ("split_every", "1")),
        (lambda: fastbn.dask.moments(ONES, split_every=2.0), TypeError, ("float",)),
        (lambda: fastbn.dask.scale_shift(np.ones((2, 3)), [1], [1]), TypeError, ("dask.array.Array", "ndarray")),
        (lambda: fastbn.dask.scale_shift(ONES.astype("u1"), np.ones(3), np.ones(3)), TypeError, ("uint8",)),
        (lambda: fastbn.dask.scale_shift(ONES, np.ones(4), np.ones(3)), ValueError, ("scale", "3", "4")),
        (lambda: fastbn.dask.scale_shift(ONES, np.ones(3), np.ones(2)), ValueError, ("shift", "3", "2")),
        (lambda: fastbn.dask.scale_shift(ONES, np.ones(2), np.ones(2), axis=5), ValueError, ("axis", "5")),
        (lambda: fastbn.dask.scale_shift(UNKNOWN, np.ones(2), np.ones(2)), ValueError, ("unknown", "compute_chunk")),
    ),
)
def test_errors_come_before_anything_is_computed(call, error, words):
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value)


def test_an_error_in_a_task_is_seen_and_leaves_it_to_be_computed():
    def unreadable(block: np.ndarray) -> np.ndarray:
        raise OSError("unreadable")

    m = fastbn.dask.moments(ONES.map_blocks(unreadable, dtype=float, meta=np.empty((0, 0, 0))))
    for _ in range(2):
        with pytest.raises(OSError, match="unreadable"):
            _ = m.mean
    assert is_dask_collection(m)
