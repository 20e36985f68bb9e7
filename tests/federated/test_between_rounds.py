"""What happens while a schedule evaluates is known before the next round begins."""

import pytest

from federated.errors import FederationError
from federated.rounds import Dropped, Left, Plan, Result, synchronous
from federated.strategies import make_strategy
from tests.devices import MemoryFleet, adding, small_model


def test_next_round_asks_who_joined_and_not_who_left_during_the_evaluation():
    fleet = MemoryFleet({"0": adding(1), "1": adding(1)})
    seen = []

    def evaluate(weights):
        if not seen:
            fleet.events.append(Left(fleet.devices["1"]))
            fleet.replies["2"] = adding(1)
            fleet.join("2")
        seen.append([cid for cid, _ in fleet.asked])
        return {"loss": 1.0}

    observed = []
    plan = Plan(2, lambda server_round: {}, evaluate, min_num_clients=2)
    steps = list(
        synchronous(fleet, make_strategy("FedAvg"), small_model(), plan, observe=observed.append)
    )
    names = [[c.device.name for c in step.contributions] for step in steps]
    assert names == [["device 0", "device 1"], ["device 0", "device 2"]]
    assert not any(isinstance(event, Dropped) for event in observed)


def test_device_that_hangs_up_on_a_job_is_not_asked_again():
    """Its result comes just before the event that it has left."""

    def hang_up(job):
        device = fleet.devices["0"]
        fleet.events += [Result(device, job, None, "hung up"), Left(device)]

    fleet = MemoryFleet({"0": hang_up, "1": adding(1)})
    plan = Plan(
        rounds=1,
        config=lambda server_round: {},
        evaluate=lambda weights: {"loss": 1.0},
        min_sample_size=2,
        min_replies=2,
        retries=1,
    )
    with pytest.raises(FederationError, match="no new model in 2 attempts"):
        list(synchronous(fleet, make_strategy("FedAvg"), small_model(), plan))
    assert [cid for cid, _ in fleet.asked] == ["1", "0", "1"]  # in the first attempt last
