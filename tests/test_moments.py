"""`Moments`: statistics of parts that merge, at any conditioning."""

from __future__ import annotations

import copy
import io
import pickle
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from conftest import CPUS

import fastbn
from fastbn import Moments

pytestmark = pytest.mark.usefixtures("backend")


def sample(n: int, *, mean: float = 0.0, seed: int = 0) -> np.ndarray:
    return mean + np.random.default_rng(seed).standard_normal((n, 3, 4))


def assert_moments_of(m: Moments, x: np.ndarray, rtol: float = 1e-12) -> None:
    wide = x.astype(np.longdouble)
    assert m.count == x.size // x.shape[1]
    np.testing.assert_allclose(m.mean, wide.mean((0, 2)).astype(float), rtol=rtol, atol=1e-15)
    np.testing.assert_allclose(m.var(), wide.var((0, 2)).astype(float), rtol=rtol)


def test_fields():
    m = Moments(4, np.array([1.0, 2.0]), np.array([8.0, 4.0]))
    assert (m.count, m.mean.tolist(), m.m2.tolist()) == (4, [1, 2], [8, 4])
    assert m.mean.dtype == m.m2.dtype == np.float64
    assert m.var().tolist() == [2, 1]
    np.testing.assert_array_equal(m.var(ddof=1), np.array([8, 4]) / 3)
    np.testing.assert_array_equal(m.std(ddof=1), np.sqrt(np.array([8, 4]) / 3))
    np.testing.assert_array_equal(m.std(), np.sqrt([2, 1]))


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@pytest.mark.parametrize("axis", (1, -1))
def test_update_in_place_over_uneven_batches(axis, dtype):
    batches = [sample(n, mean=n, seed=n).astype(dtype) for n in (1, 7, 2, 30)]
    m = Moments.empty(3)
    for x in batches:
        assert m.update(x if axis == 1 else np.ascontiguousarray(np.moveaxis(x, 1, -1)), axis=axis) is m
    assert_moments_of(m, np.concatenate(batches))


def test_merge_in_place_and_plus_makes_a_new_one():
    x, other = sample(5), sample(9, mean=3, seed=1)
    a, b = Moments.empty(3).update(x), Moments.empty(3).update(other)
    both = a + b
    assert_moments_of(both, np.concatenate((x, other)))
    assert_moments_of(a, x)
    assert a.merge(b) is a
    assert_moments_of(a, np.concatenate((x, other)))
    assert_moments_of(b, other)
    np.testing.assert_array_equal((a.mean, a.m2), (both.mean, both.m2))


def test_a_merged_one_shares_no_memory_with_its_parts():
    b = Moments.empty(3).update(sample(5))
    kept = b.mean.copy()
    for merged in (Moments.empty(3).merge(b), Moments.empty(3) + b, b + Moments.empty(3)):
        merged.mean[:] = merged.m2[:] = 9
    np.testing.assert_array_equal(b.mean, kept)


def test_empty_parts_change_nothing():
    m, kept = (Moments.empty(3).update(sample(5)) for _ in range(2))
    m.update(np.empty((0, 3, 4))).update(np.empty((2, 3, 0))).merge(Moments.empty(3))
    assert m.count == kept.count
    np.testing.assert_array_equal((m.mean, m.m2), (kept.mean, kept.m2))
    from_empty = Moments.empty(3) + kept
    np.testing.assert_array_equal((from_empty.mean, from_empty.m2), (kept.mean, kept.m2))
    assert (Moments.empty(3) + Moments.empty(3)).count == 0


@pytest.mark.parametrize("ddof", (0, 1))
def test_variance_of_too_few_values_is_nan(ddof):
    m = Moments.empty(3)
    for _ in range(ddof):
        m.update(np.ones((1, 3, 1)))
    assert np.isnan(m.var(ddof=ddof)).all()
    assert np.isnan(m.std(ddof=ddof)).all()


def test_count_is_an_integer_that_never_rounds():
    m = Moments.empty(3).update(np.ones((2, 3), np.float32))
    assert type(m.count) is int
    huge = Moments(2**53, np.ones(3), np.zeros(3)).merge(Moments(1, np.ones(3), np.zeros(3)))
    assert huge.count == 2**53 + 1
    both = Moments(2**70, [1.0], [0.0]) + Moments(2**70 + 2, [3.0], [0.0])
    assert (both.count, both.mean.tolist()) == (2**71 + 2, [2.0])
    np.testing.assert_allclose(both.var(ddof=1), 1.0, rtol=1e-15)


@pytest.mark.parametrize("parts", (1, 2, 10, 1000))
@pytest.mark.parametrize("mean", (0.0, 1e6))
def test_no_digits_are_lost_however_it_is_split(mean, parts):
    x = sample(5000, mean=mean)
    m = Moments.empty(3)
    for part in np.array_split(x, parts):
        m.merge(Moments.empty(3).update(part))
    assert_moments_of(m, x, rtol=1e-9)


@pytest.mark.parametrize("mean", (0.0, 10.0, 1e6, 1e9))
def test_merging_is_associative_to_rounding(mean):
    for seed in range(20):
        a, b, c = (Moments.empty(3).update(sample(n, mean=mean, seed=seed + n)) for n in (3, 50, 8))
        left, right = (a + b) + c, a + (b + c)
        np.testing.assert_allclose(left.mean, right.mean, rtol=1e-15, atol=1e-15)
        np.testing.assert_allclose(left.m2, right.m2, rtol=1e-12)


def test_infinity_stays_in_its_channel():
    x = sample(50)
    x[7, 1, 2] = np.inf
    m = Moments.empty(3)
    for part in np.array_split(x, 5):
        m.update(part)
    assert m.mean[1] == np.inf
    assert np.isnan(m.var()[1])
    assert np.isfinite(m.mean[[0, 2]]).all()
    assert np.isfinite(m.m2[[0, 2]]).all()


def test_equality():
    m = Moments.empty(3).update(sample(5))
    assert m == Moments(m.count, m.mean, m.m2)
    assert m != Moments(m.count + 1, m.mean, m.m2)
    assert m != Moments(m.count, m.mean + 1, m.m2)
    assert m != "other"
    nan = Moments(1, [np.nan], [np.nan])
    assert nan == Moments(1, [np.nan], [np.nan])


def test_pickle_and_repr():
    m = Moments.empty(2).update(np.array([[1.0, 2.0], [3.0, 5.0]]))
    twin = pickle.loads(pickle.dumps(m))
    assert (twin.count, twin.mean.tolist(), twin.m2.tolist()) == (2, [2, 3.5], [2, 4.5])
    assert repr(m).startswith("Moments(")
    assert "2" in repr(m)


@pytest.mark.parametrize(
    "call, error, words",
    (
        (lambda m: m.update(np.ones((2, 4))), ValueError, ("3", "4")),
        (lambda m: m.update(np.ones((2, 3), "U1")), TypeError, ("<U1",)),
        (lambda m: m.update(np.ones((2, 3)), axis=5), ValueError, ("axis", "5")),
        (lambda m: m.merge(Moments.empty(4)), ValueError, ("3", "4")),
        (lambda m: m + Moments.empty(4), ValueError, ("3", "4")),
        (lambda m: m + 1, TypeError, ()),
        (lambda m: m.merge("other"), TypeError, ("str",)),
        (lambda _: Moments.empty(2.5), TypeError, ("2.5",)),
        (lambda _: Moments(-1, np.zeros(3), np.zeros(3)), ValueError, ("count", "-1")),
        (lambda _: Moments("2", np.zeros(3), np.zeros(3)), TypeError, ("count", "'2'")),
        (lambda _: Moments(None, np.zeros(3), np.zeros(3)), TypeError, ("count", "None")),
        (lambda _: Moments(np.nan, np.zeros(3), np.zeros(3)), ValueError, ("count", "nan")),
        (lambda _: Moments([1, 2], np.zeros(3), np.zeros(3)), ValueError, ("count", "(3,)", "(2,)")),
        (lambda _: Moments([1, -2, 3], np.zeros(3), np.zeros(3)), ValueError, ("count", "-2")),
        (lambda _: Moments(np.array([1, 2**63, 3], np.uint64), np.zeros(3), np.zeros(3)), ValueError, ("2**63",)),
        (lambda _: Moments(["a", "b", "c"], np.zeros(3), np.zeros(3)), TypeError, ("count", "'a'")),
        (lambda m: m.update(np.ones((2, 3), np.int64)), TypeError, ("uint8", "int64")),
        (lambda m: m.update(np.ones((2, 3)), nan_policy="raise"), ValueError, ("nan_policy", "'raise'")),
        (lambda m: m.update(np.ones((2, 3)), where=np.ones((2, 3))), TypeError, ("where", "float64")),
        (lambda m: m.update(np.ones((2, 3)), where=np.ones((3, 3), bool)), ValueError, ("where", "(2, 3)", "(3, 3)")),
        (lambda m: m.update(np.ones((2, 3)), where=np.ones((1, 2, 3), bool)), ValueError, ("where", "(1, 2, 3)")),
        (lambda m: m.update(np.ones((2, 3)), weights=[1.0, 2, 3]), ValueError, ("weights", "2 samples", "3")),
        (lambda m: m.update(np.ones((2, 3)), weights=[1.0, -1]), ValueError, ("weights", "negative")),
        (lambda m: m.update(np.ones((2, 3)), weights=[1.0, np.nan]), ValueError, ("weights", "finite")),
        (lambda m: m.update(np.ones((2, 3)), weights=["1", "2"]), TypeError, ("weights", "U1")),
        (lambda m: m.update(np.ones((2, 4)), weights=[1.0, 2]), ValueError, ("3", "4")),
        (lambda m: m + Moments([2**63 - 1, 5, 6], np.zeros(3), np.zeros(3)), OverflowError, ("2**63",)),
        (lambda _: Moments(2, np.zeros(3), -np.ones(3)), ValueError, ("m2", "-1")),
        (lambda _: Moments(2, np.zeros(3), np.zeros(4)), ValueError, ("m2", "3", "4")),
        (lambda _: Moments(2, np.zeros((3, 1)), np.zeros(3)), ValueError, ("mean", "(3, 1)")),
    ),
)
def test_errors_leave_the_moments_alone(call, error, words):
    m = Moments.empty(3).update(sample(5))
    kept = m.count, m.mean.tolist(), m.m2.tolist()
    with pytest.raises(error) as raised:
        call(m)
    for word in words:
        assert word in str(raised.value)
    assert (m.count, m.mean.tolist(), m.m2.tolist()) == kept


# --- image data -------------------------------------------------------------------------------------------------------

NARROW = tuple(np.dtype(name) for name in ("uint8", "int8", "uint16", "int16", "float16"))
# Long rows, short ones, one channel, whole vectors and none, less than one of them, more than one piece.
IMAGES = (
    ((3, 3, 50, 55), 1),
    ((50, 3, 32, 32), 1),
    ((5, 3, 7, 7), 1),
    ((3, 1, 20, 20), 1),
    ((2, 2, 300, 301), 1),
    ((2, 3), 1),
    ((5, 60, 61, 3), -1),
    ((30, 60, 61, 4), -1),
    ((500, 37), -1),
    ((7, 1009), -1),
    ((3, 5, 5, 1), -1),
)


def image_data(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(0)
    if dtype.kind == "f":
        return (5 + 100 * rng.standard_normal(shape)).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, endpoint=True, dtype=dtype)


def exact(x: np.ndarray, axis: int) -> list[tuple[Fraction, Fraction]]:
    """Mean and m2 of every channel of integers."""
    channels = np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1).astype(np.int64)
    sums = [(int(v.sum()), int((v * v).sum())) for v in channels]
    return [(Fraction(s, channels.shape[1]), Fraction(q) - Fraction(s * s, channels.shape[1])) for s, q in sums]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.usefixtures("keep_threads")
def test_image_data_of_every_dtype(dtype):
    for shape, axis in IMAGES:
        x = image_data(dtype, shape)
        m = fastbn.moments(x, axis=axis)
        fastbn.set_num_threads(1)
        assert fastbn.moments(x, axis=axis) == m
        fastbn.set_num_threads(CPUS)
        reduced = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
        wide = x.astype(np.longdouble)
        assert m.count == x.size // x.shape[axis]
        largest = float(abs(wide).max())
        np.testing.assert_allclose(m.mean, wide.mean(reduced).astype(float), rtol=1e-13, atol=1e-13 * largest)
        np.testing.assert_allclose(m.var(), wide.var(reduced).astype(float), rtol=1e-12)


@pytest.mark.parametrize("dtype", (np.uint8, np.int8, np.uint16, np.int16))
@pytest.mark.parametrize("shape, axis", (((3, 3, 300, 301), 1), ((3, 300, 301, 3), -1)), ids=("first", "last"))
def test_sums_of_integers_are_exact(backend, shape, axis, dtype):
    """The extreme values too, which overflow first."""
    limits = np.iinfo(dtype)
    for x in (image_data(np.dtype(dtype), shape), np.full(shape, limits.max, dtype), np.full(shape, limits.min, dtype)):
        m = fastbn.moments(x, axis=axis)
        for mean, m2, (true_mean, true_m2) in zip(m.mean, m.m2, exact(x, axis), strict=True):
            if backend == "numpy":
                np.testing.assert_allclose((mean, m2), (float(true_mean), float(true_m2)), rtol=1e-12, atol=1e-11)
            else:
                assert (mean, m2) == (float(true_mean), float(true_m2))


@pytest.mark.parametrize("dtype", (np.float16, np.float32, np.float64))
@pytest.mark.parametrize("shape, axis", (((4, 3, 50, 55), 1), ((4, 50, 55, 3), -1)), ids=("first", "last"))
def test_special_values_of_floats(shape, axis, dtype):
    x = image_data(np.dtype(dtype), shape)
    channels = np.moveaxis(x, axis, 0)
    channels[0, 1] = np.finfo(dtype).smallest_subnormal * 3
    channels[0, 2] = -np.finfo(dtype).smallest_subnormal
    channels[1] = np.asarray(-1.7, dtype)
    m = fastbn.moments(x, axis=axis)
    np.testing.assert_allclose(m.mean[0], channels[0].astype(float).mean(), rtol=1e-12)
    assert (m.mean[1], m.m2[1]) == (channels[1].flat[0], 0)
    for value in (np.inf, -np.inf, np.nan):
        for place in (0, 1, -1):
            spoilt = x.copy()
            np.moveaxis(spoilt, axis, 0)[2].flat[place] = value
            s = fastbn.moments(spoilt, axis=axis)
            np.testing.assert_array_equal(s.mean[2], value)
            assert np.isnan(s.m2[2])
            np.testing.assert_array_equal((s.mean[:2], s.m2[:2]), (m.mean[:2], m.m2[:2]))


def test_channels_last_images_need_not_be_dense():
    x = image_data(np.dtype(np.uint8), (9, 20, 22, 3))
    window = x[::2, 3:-2, ::-1]
    for same, of in ((window.copy(), window), (np.asfortranarray(x), x)):
        m, expected = fastbn.moments(same, axis=-1), fastbn.moments(of, axis=-1)
        assert m.count == expected.count
        np.testing.assert_allclose((m.mean, m.m2), (expected.mean, expected.m2), rtol=1e-12)


def test_no_copy_of_the_data_is_made():
    x = np.zeros((4, 3, 500, 500), np.uint8)
    nan = np.zeros((4, 3, 300, 300), np.float32)
    nan[0, 0, 0, 0] = np.nan
    fastbn.moments(x)
    tracemalloc.start()
    fastbn.moments(x)
    _, image_peak = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    fastbn.moments(nan, nan_policy="omit", where=np.ones(nan.shape, bool), weights=np.ones(4))
    _, masked_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert image_peak < (4 << 20 if fastbn.get_backend() == "numpy" else x.nbytes // 4)
    assert masked_peak < 6 << 20


# --- what counts, and how much ----------------------------------------------------------------------------------------


def test_values_that_do_not_count_are_not_looked_at():
    x = sample(200, mean=3)
    where = np.random.default_rng(1).random(x.shape) < 0.6
    where[:, 2] = False
    spoilt = np.where(where, x, np.nan)
    m = Moments.empty(3)
    for part, mask in zip(np.array_split(spoilt, 7), np.array_split(where, 7), strict=True):
        m.update(part, where=mask)
    assert m.count.dtype == np.int64
    np.testing.assert_array_equal(m.count, where.sum((0, 2)))
    for c in (0, 1):
        kept = x[:, c][where[:, c]]
        np.testing.assert_allclose((m.mean[c], m.var(1)[c]), (kept.mean(), kept.var(ddof=1)), rtol=1e-13)
    assert (m.mean[2], m.m2[2]) == (0, 0)
    assert np.isnan(m.var()[2])
    omitted = fastbn.moments(spoilt, nan_policy="omit")
    np.testing.assert_array_equal(omitted.count, m.count)
    np.testing.assert_allclose(omitted.m2, m.m2, rtol=1e-12)
    assert np.isnan(fastbn.moments(spoilt).mean).all()


def test_a_mask_of_samples_is_broadcast():
    x = image_data(np.dtype(np.uint8), (6, 10, 12, 3))
    chosen = np.array([True, False, True, True, False, True])
    m = fastbn.moments(x, axis=-1, where=chosen[:, None, None, None])
    expected = fastbn.moments(x[chosen], axis=-1)
    assert type(m.count) is int
    assert m.count == expected.count
    np.testing.assert_allclose((m.mean, m.m2), (expected.mean, expected.m2), rtol=1e-13)


def test_nothing_is_omitted_where_nothing_is_nan():
    x = sample(9)
    assert fastbn.moments(x, nan_policy="omit") == fastbn.moments(x)
    x[0, 0, 0], x[1, 0, 0] = np.inf, -np.inf
    m = fastbn.moments(x, nan_policy="omit")
    assert type(m.count) is int
    assert np.isnan(m.mean[0])
    assert np.isfinite(m.m2[1:]).all()


@pytest.mark.parametrize("axis", (1, -1))
def test_whole_weights_are_repetitions(axis):
    x = np.moveaxis(sample(40, mean=1e4), 1, axis)
    weights = np.random.default_rng(2).integers(0, 5, 40)
    m = Moments.empty(3)
    for part, weight in zip(np.array_split(x, 3), np.array_split(weights, 3), strict=True):
        m.update(part, axis, weights=weight.tolist())
    expected = fastbn.moments(np.repeat(x, weights, 0), axis=axis)
    assert type(m.count) is float
    assert m.count == expected.count
    np.testing.assert_allclose(m.mean, expected.mean, rtol=1e-15)
    np.testing.assert_allclose(m.var(ddof=1), expected.var(ddof=1), rtol=1e-11)


def test_weights_of_values_scale():
    x = sample(30)
    weights = np.random.default_rng(3).random(x.shape)
    weights[3] = 0
    x[3] = np.nan
    m = fastbn.moments(x, weights=weights)
    kept = weights > 0
    for c in range(3):
        v, w = x[:, c][kept[:, c]], weights[:, c][kept[:, c]]
        mean = np.average(v, weights=w)
        np.testing.assert_allclose((m.count[c], m.mean[c]), (w.sum(), mean), rtol=1e-13)
        np.testing.assert_allclose(m.var()[c], np.average((v - mean) ** 2, weights=w), rtol=1e-13)
    doubled = fastbn.moments(x, weights=2 * weights)
    np.testing.assert_allclose((doubled.mean, doubled.var()), (m.mean, m.var()), rtol=1e-13)
    assert fastbn.moments(x, weights=np.zeros(30)) == Moments.empty(3)


def uneven() -> Moments:
    x = sample(50)
    x[:20, 0] = np.nan
    return fastbn.moments(x, nan_policy="omit")


def test_counts_that_differ_take_part_in_everything():
    m, plain = uneven(), fastbn.moments(sample(10, seed=5))
    both = m + plain
    np.testing.assert_array_equal(both.count, m.count + plain.count)
    assert both.count.dtype == np.int64
    for twin in (pickle.loads(pickle.dumps(both)), copy.copy(both), copy.deepcopy(both), Moments.empty(3) + both):
        assert twin == both
    assert both != m
    assert both == Moments(both.count, both.mean, both.m2)
    assert "120" in repr(m)
    weighted = both + fastbn.moments(sample(4), weights=[0.5, 1, 2, 0])
    np.testing.assert_array_equal(weighted.count, both.count + 14.0)
    other = Moments([0, 80, 80], np.zeros(3), np.zeros(3))
    other += Moments([80, 0, 0], np.ones(3), np.ones(3))
    assert (other.count, other.mean.tolist(), other.m2.tolist()) == (80, [1, 0, 0], [1, 0, 0])


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "m",
    (uneven(), Moments(2**90 + 1, [1.0, 2], [3.0, 4]), Moments(2.5, [np.inf], [np.nan]), Moments.empty(0)),
    ids=repr,
)
def test_a_file_keeps_everything(m, tmp_path):
    for file in (tmp_path / "named.npz", str(tmp_path / "without_ending")):
        m.save(file)
        loaded = Moments.load(file)
        assert loaded == m
        assert type(loaded.count) is type(m.count)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["named.npz", "without_ending.npz"]
    stream = io.BytesIO()
    m.save(stream)
    stream.seek(0)
    assert Moments.load(stream) == m


def test_a_loaded_one_merges_as_the_saved_one(tmp_path):
    m, other = fastbn.moments(sample(50, mean=1e6)), fastbn.moments(sample(9, mean=1e6, seed=2))
    m.save(tmp_path / "m.npz")
    loaded = Moments.load(tmp_path / "m.npz")
    assert loaded + other == m + other


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.npz"
    m = uneven()
    m.save(path)
    before = path.read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="disk full"):
        Moments.empty(3).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_something_else_are_refused(tmp_path):
    path = tmp_path / "m.npz"
    uneven().save(path)
    complete = path.read_bytes()
    damaged = [b"", b"text", complete[: len(complete) // 2], complete.replace(b"mean", b"mexn")]
    for arrays in ({"mean": np.ones(3)}, {"count": "x", "mean": [1.0], "rest": [0.0], "m2": [1.0]}):
        np.savez(path, **arrays)
        damaged.append(path.read_bytes())
    np.savez(path, count="3", mean=[1.0], rest=[0.0, 0.0], m2=[1.0])
    damaged.append(path.read_bytes())
    np.savez(path, count=np.array([object()]), mean=[1.0], rest=[0.0], m2=[1.0])
    damaged.append(path.read_bytes())
    stream = io.BytesIO()
    np.save(stream, np.ones(3))
    damaged.append(stream.getvalue())
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"m\.npz.*Moments\.save"):
            Moments.load(path)
    with pytest.raises(FileNotFoundError):
        Moments.load(tmp_path / "none.npz")


def test_a_disk_that_cannot_be_read_is_no_damaged_file(tmp_path, monkeypatch):
    fastbn.Moments.empty(2).save(tmp_path / "m.npz")

    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(np, "load", fail)
    with pytest.raises(OSError, match="Input/output error"):
        fastbn.Moments.load(tmp_path / "m.npz")
