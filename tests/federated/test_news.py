"""A service's rounds begin when enough devices have something new to train on."""

import pytest

from federated.rounds import Notice, Plan, Progress, synchronous
from federated.strategies import make_strategy
from tests.devices import MemoryFleet, adding, small_model


def rounds_of(fleet, rounds, count, new_rounds=2):
    """Return what is asked in each round, and the notices."""
    notices = []

    def observe(event):
        if isinstance(event, Notice):
            notices.append(event.text)

    plan = Plan(
        rounds,
        lambda server_round: {},
        lambda weights: {"loss": 1.0},
        min_num_clients=count,
        min_sample_size=count,
        new_rounds=new_rounds,
    )
    asked = []
    try:
        for _ in synchronous(fleet, make_strategy("FedAvg"), small_model(), plan, observe=observe):
            asked.append(sorted(cid for cid, _ in fleet.asked))
            fleet.asked.clear()
    except AssertionError as error:  # it waits, and nothing more will come
        assert "waits for what never comes" in str(error)
    return asked, notices


def fridges(**versions):
    properties = {cid: {"data_version": version} for cid, version in versions.items()}
    return MemoryFleet({cid: adding(1) for cid in versions}, properties)


def test_no_round_begins_when_all_have_trained_on_what_they_have():
    asked, notices = rounds_of(fridges(a="1", b="2"), rounds=9, count=2)
    assert asked == [["a", "b"]] * 2
    assert notices == ["round 3 begins when 2 device(s) have new data; 0 of 2 have"]


def test_device_that_comes_back_with_new_photographs_begins_rounds_again():
    fleet = fridges(a="1", b="2")
    waits = fleet._next

    def come_back(timeout):
        if timeout is None and not fleet.events and fleet.properties["a"]["data_version"] == "1":
            fleet.properties["a"] = {"data_version": "changed"}
            fleet.leave("a")
            fleet.join("a")
        return waits(timeout)

    fleet._next = come_back
    asked, _ = rounds_of(fleet, rounds=9, count=1)
    assert len(asked) == 4


def test_device_that_comes_back_with_the_same_photographs_begins_none():
    fleet = fridges(a="1", b="2")
    waits, times = fleet._next, []

    def come_back(timeout):
        if timeout is None and not fleet.events and not times:
            times.append(1)
            fleet.leave("a")
            fleet.join("a")
        return waits(timeout)

    fleet._next = come_back
    assert len(rounds_of(fleet, rounds=9, count=1)[0]) == 2


@pytest.mark.parametrize("new_rounds", [0, 2])
def test_devices_that_report_no_version_are_always_new(new_rounds):
    fleet = MemoryFleet({"a": adding(1), "b": adding(1)})
    assert len(rounds_of(fleet, rounds=5, count=2, new_rounds=new_rounds)[0]) == 5


def test_run_with_an_end_does_not_ask_for_news():
    assert len(rounds_of(fridges(a="1"), rounds=5, count=1, new_rounds=0)[0]) == 5


def test_device_that_reports_new_photographs_begins_rounds_again():
    fleet = fridges(a="1", b="2")
    waits = fleet._next

    def report(timeout):
        device = fleet.devices.get("a")
        if timeout is None and not fleet.events and device.properties["data_version"] == "1":
            return Progress(device, 0, 0, 0.0, {}, "changed")
        return waits(timeout)

    fleet._next = report
    asked, _ = rounds_of(fleet, rounds=9, count=1)
    assert len(asked) == 4
