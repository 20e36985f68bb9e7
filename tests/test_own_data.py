"""The server's own photographs, and the gate that a new model must pass."""

import numpy as np
import pytest

from federated.rounds import Plan, synchronous
from federated.strategies import make_strategy
from federated.updates import Update
from plumbing.publish import Publication, is_worse
from tests.devices import MemoryFleet, adding

MODEL = {"w": np.zeros(2, np.float32)}


@pytest.mark.parametrize(
    ("right", "wrong", "worse"),
    [
        (0, 0, False),
        (0, 4, False),
        (0, 5, True),
        (3, 9, False),
        (3, 10, True),
        (50, 40, False),
        (2000, 0, False),
        (1000, 2000, True),
    ],
)
def test_exact_sign_test(right, wrong, worse):
    assert is_worse(right, wrong) is worse


def test_only_counts_that_can_be_and_of_this_version_are_taken(tmp_path):
    publication = Publication(tmp_path)
    version = publication.publish({}, {})
    publication.judge("a", version, (10, 2, 1))
    publication.judge("a", version, (10, 3, 1))  # a second report replaces the first
    publication.judge("b", version, (5, 0, 1))
    for counts in [(5, 6, 0), (5, -1, 0), (1000, 0, 900)]:
        publication.judge("c", version, counts)
    publication.judge("d", version - 1, (10, 0, 9))
    assert publication.judged() == (15, 3, 2)
    publication.publish({}, {})
    assert publication.judged() == (0, 0, 0)


def test_servers_own_update_counts_by_its_weight():
    plan = Plan(
        rounds=1,
        config=lambda server_round: {},
        evaluate=lambda weights: {"loss": 1.0},
        own=lambda server_round, weights: (Update({"w": np.full(2, 4.0)}, 10), 30),
    )
    fleet = MemoryFleet({"0": adding(0.0, 10)})
    (step,) = synchronous(fleet, make_strategy("FedAvg"), MODEL, plan)
    assert step.weights["w"].tolist() == [3.0, 3.0]  # (10 × 0 + 30 × 4) / 40


@pytest.mark.parametrize(("equal", "expected"), [(False, 1.0), (True, 2.0)])
def test_equal_weighting_counts_a_device_as_much_as_one_with_more_examples(equal, expected):
    plan = Plan(
        rounds=1,
        config=lambda server_round: {},
        evaluate=lambda weights: {"loss": 1.0},
        equal=equal,
        min_num_clients=2,
        min_sample_size=2,
    )
    fleet = MemoryFleet({"0": adding(0.0, 30), "1": adding(4.0, 10)})
    (step,) = synchronous(fleet, make_strategy("FedAvg"), MODEL, plan)
    assert step.weights["w"].tolist() == [expected, expected]
    assert [c.num_examples for c in step.contributions] == [30, 10]
