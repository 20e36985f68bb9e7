"""FedAvg's weighted mean: right, exact, and the same whoever comes first."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.strategies import RunningMean

SHAPES = [(3, 2, 5, 5), (7,), (), (0, 4)]


def updates_of(seed, count, shapes=SHAPES, dtype=np.float32):
    """Return `count` updates and their numbers of examples, up to 25,000."""
    rng = np.random.default_rng(seed)
    updates = [[rng.standard_normal(s).astype(dtype) for s in shapes] for _ in range(count)]
    return [*zip(updates, map(int, rng.integers(1, 25_000, count)), strict=True)]


def named(arrays):
    return {str(i): array for i, array in enumerate(arrays)}


def mean_of(updates):
    mean = RunningMean(named(updates[0][0]))
    for arrays, num_examples in updates:
        mean.add(named(arrays), num_examples)
    return [array for _, array in mean.means()]


def by_hand(updates):
    """Return the mean in float64, before it becomes the model's type."""
    total = sum(n for _, n in updates)
    arrays = zip(*(weights for weights, _ in updates), strict=True)
    return [
        sum(n / total * a.astype(np.float64) for a, (_, n) in zip(same, updates, strict=True))
        for same in arrays
    ]


def bits(weights):
    return [w.tobytes() for w in weights]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_it_is_the_mean_weighted_by_examples(dtype):
    updates = updates_of(0, 5, dtype=dtype)
    for found, expected, like in zip(
        mean_of(updates), by_hand(updates), updates[0][0], strict=True
    ):
        assert (found.shape, found.dtype) == (like.shape, np.float64)
        np.testing.assert_allclose(found, expected, rtol=np.finfo(dtype).eps, atol=1e-10)


def test_one_update_comes_back_as_it_was():
    weights = updates_of(1, 1)[0][0]
    for found, expected in zip(mean_of([(weights, 25_000)]), weights, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-11)


def test_twice_the_examples_have_twice_the_weight():
    zero, three = [np.zeros(2, np.float32)], [np.full(2, 3, np.float32)]
    np.testing.assert_array_equal(mean_of([(zero, 200), (three, 100)])[0], [1, 1])
    np.testing.assert_array_equal(mean_of([(zero, 100), (three, 200)])[0], [2, 2])


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.permutations(range(6)))
def test_the_order_of_arrival_does_not_change_a_bit(seed, order):
    updates = updates_of(seed, 6)
    assert bits(mean_of([updates[i] for i in order])) == bits(mean_of(updates))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(-1000, 1000, width=32), st.integers(1, 50_000)), min_size=1, max_size=10
    ),
    st.randoms(use_true_random=False),
)
def test_neither_does_it_with_values_far_apart(pairs, random):
    updates = [([np.array([value], np.float32)], n) for value, n in pairs]
    shuffled = random.sample(updates, len(updates))
    assert bits(mean_of(shuffled)) == bits(mean_of(updates))
    np.testing.assert_allclose(mean_of(updates)[0], by_hand(updates)[0], rtol=1e-6, atol=1e-7)


def test_arrays_larger_than_a_chunk_are_added_whole():
    updates = updates_of(2, 3, shapes=[(3 * RunningMean.CHUNK + 1,), (RunningMean.CHUNK,)])
    for found, expected in zip(mean_of(updates), by_hand(updates), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-10)


def test_large_finite_values_stay_finite():
    big = np.array([np.finfo(np.float32).max], np.float32)
    updates = [([sign * big], 25_000) for sign in (1, -1, 1, 1)]
    np.testing.assert_allclose(mean_of(updates)[0], big / 2, rtol=1e-6)


def test_fortran_order_and_read_only_arrays_are_added_as_they_are():
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)
    update = np.asfortranarray(weights)
    update.flags.writeable = False
    np.testing.assert_array_equal(mean_of([([weights], 100), ([update], 300)])[0], weights)


def test_it_does_not_touch_the_updates_and_owns_its_result():
    updates = updates_of(3, 2)
    before = [bits(weights) for weights, _ in updates]
    for array in mean_of(updates):
        np.asarray(array)[...] = 9
    assert [bits(weights) for weights, _ in updates] == before
