"""What every split of a data set keeps, whatever its size, classes and skew."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.errors import FederationError
from federated.partitions import partition
from federated.settings import parse_partition

SEEDS = st.integers(0, 2**32 - 1)
SCHEMES = st.just("iid") | st.floats(-6, 6).map(lambda power: f"dirichlet:{10**power!r}")


@st.composite
def labels_and_parts(draw):
    """Draw up to 10 classes, some perhaps far larger than others, and 1 to 20 parts."""
    counts = draw(st.lists(st.integers(0, 60), min_size=1, max_size=10).filter(any))
    labels = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng(draw(SEEDS)).shuffle(labels)
    return labels, draw(st.integers(1, min(20, len(labels))))


@settings(max_examples=300, deadline=None)
@given(labels_and_parts(), SCHEMES, SEEDS)
def test_parts_are_disjoint_complete_balanced_and_repeatable(data, scheme, seed):
    labels, num_partitions = data
    parts = partition(labels, num_partitions, scheme, seed)
    assert len(parts) == num_partitions
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
    assert all((np.diff(part) > 0).all() for part in parts)
    again = partition(labels.copy(), num_partitions, scheme, seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def mixes(labels, parts):
    """Return the share of each class in each part, (parts, classes)."""
    counts = np.array([np.bincount(labels[part], minlength=10) for part in parts])
    return counts / counts.sum(1, keepdims=True)


LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 500))


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_small_alpha_gives_parts_of_few_classes(seed):
    parts = partition(LABELS, 10, "dirichlet:0.001", seed)
    largest_two = np.sort(mixes(LABELS, parts))[:, -2:].sum(1)
    assert np.median(largest_two) > 0.9  # 0.2 if the classes were even


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_large_alpha_gives_nearly_the_overall_mix(seed):
    parts = partition(LABELS, 10, "dirichlet:100000", seed)
    assert np.abs(mixes(LABELS, parts) - 0.1).max() < 0.12  # 7 deviations of such a draw


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_iid_gives_nearly_the_overall_mix(seed):
    assert np.abs(mixes(LABELS, partition(LABELS, 10, "iid", seed)) - 0.1).max() < 0.12


def test_skew_falls_as_alpha_grows():
    skews = [
        np.abs(mixes(LABELS, partition(LABELS, 10, f"dirichlet:{alpha}", 0)) - 0.1).mean()
        for alpha in (0.01, 1, 10, 1000)
    ]
    assert skews == sorted(skews, reverse=True)


def test_dirichlet_follows_an_uneven_overall_mix():
    labels = np.repeat([0, 1], [4000, 1000])
    shares = [(labels[part] == 1).mean() for part in partition(labels, 5, "dirichlet:100000", 0)]
    assert shares == pytest.approx([0.2] * 5, abs=0.07)


@pytest.mark.parametrize("scheme", ["iid", "dirichlet:0.5"])
def test_another_seed_gives_other_parts(scheme):
    one, other = (partition(LABELS, 2, scheme, seed)[0] for seed in (0, 1))
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("scheme", "first"),
    [
        ("iid", [5, 16, 20, 36, 52, 72, 82, 90, 93, 94]),
        ("dirichlet:0.5", [2, 12, 22, 32, 34, 55, 62, 72, 82, 92]),
    ],
)
def test_parts_are_the_same_on_every_machine(scheme, first):
    parts = partition(np.arange(100) % 10, 10, scheme, 0)
    assert parts[0].tolist() == first


@pytest.mark.parametrize("scheme", ["iid", "dirichlet:0.5"])
def test_one_part_is_everything(scheme):
    assert partition(LABELS, 1, scheme, 0)[0].tolist() == list(range(len(LABELS)))


@pytest.mark.parametrize("scheme", ["iid", "dirichlet:0.5"])
@pytest.mark.parametrize("num_partitions", [0, -1, 4])
def test_empty_part_is_refused(scheme, num_partitions):
    with pytest.raises(
        FederationError, match=rf"cannot split 3 images into {num_partitions} parts"
    ):
        partition(np.array([0, 1, 2]), num_partitions, scheme, 0)


@pytest.mark.parametrize("scheme", ["auto", "none"])
def test_auto_and_none_are_no_split(scheme):
    assert parse_partition(scheme) == (scheme, 0)
    with pytest.raises(ValueError, match=f"'{scheme}' does not split"):
        partition(LABELS, 2, scheme, 0)


def test_scheme_is_read_with_its_alpha():
    assert parse_partition("iid") == ("iid", 0)
    assert parse_partition("dirichlet:0.5") == ("dirichlet", 0.5)
    assert parse_partition("dirichlet:1e3") == ("dirichlet", 1000)


@pytest.mark.parametrize(
    "scheme",
    ["", "even", "iid:2", "auto:2", "dirichlet"]
    + [f"dirichlet:{alpha}" for alpha in ("", "0", "-1", "x", "nan", "inf", "1e-9")],
)
def test_unknown_scheme_is_refused(scheme):
    with pytest.raises(
        FederationError, match=f"no partition '{scheme}'; choose auto, iid, none or dir"
    ):
        parse_partition(scheme)
