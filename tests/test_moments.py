"""`Moments`: statistics of parts that merge, at any conditioning."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from fastbn import Moments

pytestmark = pytest.mark.usefixtures("backend")


def sample(n: int, *, mean: float = 0.0, seed: int = 0) -> np.ndarray:
    return mean + np.random.default_rng(seed).standard_normal((n, 3, 4))


def assert_moments_of(m: Moments, x: np.ndarray, rtol: float = 1e-12) -> None:
    wide = x.astype(np.longdouble)
    assert m.count == x.size // x.shape[1]
    np.testing.assert_allclose(m.mean, wide.mean((0, 2)).astype(float), rtol=rtol)
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


@pytest.mark.parametrize("parts", (1, 2, 10, 1000))
@pytest.mark.parametrize("mean", (0.0, 1e6))
def test_no_digits_are_lost_however_it_is_split(mean, parts):
    x = sample(5000, mean=mean)
    m = Moments.empty(3)
    for part in np.array_split(x, parts):
        m.merge(Moments.empty(3).update(part))
    assert_moments_of(m, x, rtol=1e-9)


@pytest.mark.parametrize(
    "offset, step, mean, std",
    (  # NIST's NumAcc2 to NumAcc4 are 1001 values of `offset + step * (2, 1, 3, 1, 3, ...)`, so that std is `step`
        (1.0, 0.1, 1.2, 0.1),
        (1000000.0, 0.1, 1000000.2, 0.1),
        (10000000.0, 0.1, 10000000.2, 0.1),
    ),
)
def test_nist_numerical_accuracy(offset, step, mean, std):
    values = offset + step * np.array([2.0] + [1.0, 3.0] * 500)
    m = Moments.empty(1).update(values[:, None])
    np.testing.assert_allclose(m.mean, mean, rtol=1e-15)
    np.testing.assert_allclose(m.std(ddof=1), std, rtol=1e-8)  # what float64 leaves of the values themselves


def test_merging_is_associative_to_rounding():
    a, b, c = (Moments.empty(3).update(sample(n, mean=10, seed=n)) for n in (3, 50, 8))
    left, right = (a + b) + c, a + (b + c)
    np.testing.assert_allclose(left.mean, right.mean, rtol=1e-15)
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
        (lambda _: Moments(1.5, np.zeros(3), np.zeros(3)), TypeError, ("count", "float")),
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
