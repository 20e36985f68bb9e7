"""Devices evaluate each new model: who is asked, what counts, what a strategy makes of it."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from federated.errors import BadReply
from federated.rounds import Device, Dropped, Job, Notice, Plan, Result, Step, synchronous
from federated.strategies import make_strategy
from federated.updates import Score
from tests.devices import MemoryFleet, adding, small_model


@dataclass
class EvaluatingFleet(MemoryFleet):
    """Devices that add 1 to each weight, and evaluate.

    Args:
        scores: what each device reports, by its cid; None: nothing.
    """

    scores: dict[str, Score | BadReply | None] = field(default_factory=dict)

    def _start(self, device: Device, job: Job) -> None:
        if job.kind == "train":
            super()._start(device, job)
            return
        self.asked.append((device.cid, job))
        match self.scores[device.cid]:
            case Score() as score:
                self.events.append(Result(device, job, None, score=score))
            case BadReply() as problem:
                self.events.append(Result(device, job, None, str(problem), at_fault=True))

    @property
    def evaluated(self) -> list[tuple[str, Job]]:
        return [(cid, job) for cid, job in self.asked if job.kind == "evaluate"]


def fleet_of(*scores: Score | BadReply | None) -> EvaluatingFleet:
    by_cid = {str(cid): score for cid, score in enumerate(scores)}
    return EvaluatingFleet({cid: adding(1) for cid in by_cid}, scores=by_cid)


def run(
    fleet: EvaluatingFleet, fraction: float = 1.0, strategy: str = "FedAvg", **plan: Any
) -> tuple[list[Step], list[Any]]:
    """Return the rounds, and what was observed."""
    events: list[Any] = []
    settings: dict[str, Any] = {"rounds": 1, "min_num_clients": len(fleet.replies), **plan}
    flower = make_strategy(strategy, 1.0, 1, sample_fraction_evaluate=fraction)
    schedule = synchronous(
        fleet,
        flower,
        small_model(),
        Plan(config=lambda r: {"lr": 0.1}, evaluate=lambda w: {"loss": 1.0}, **settings),
        observe=events.append,
    )
    return list(schedule), events


def dropped(events: list[Any]) -> list[tuple[str, str]]:
    return [(e.device.name, e.reason) for e in events if isinstance(e, Dropped)]


def notices(events: list[Any]) -> list[str]:
    return [event.text for event in events if isinstance(event, Notice)]


def test_no_device_evaluates_unless_that_is_wanted() -> None:
    fleet = fleet_of(Score(1.0, 10), Score(1.0, 10))
    [step], _ = run(fleet, fraction=0.0)
    assert not fleet.evaluated
    assert step.device_scores is None


@pytest.mark.parametrize("strategy", ["FedAvg", "FedProx", "FedAdam", "FedMedian"])
def test_devices_evaluate_the_new_model_and_count_by_their_images(strategy: str) -> None:
    fleet = fleet_of(Score(1.0, 10, {"accuracy": 0.8}), Score(2.0, 30, {"accuracy": 0.4}))
    [step], _ = run(fleet, strategy=strategy)
    assert [cid for cid, _ in fleet.evaluated] == ["0", "1"]
    for _, job in fleet.evaluated:
        assert job.version == 1
        assert job.config["lr"] == 0.1 and job.config["server_round"] == 1
        for name, array in step.weights.items():
            np.testing.assert_array_equal(job.model[name], array)
    found = step.device_scores
    assert found and found.sampled == 2
    assert found.metrics["loss"] == pytest.approx(1.75)
    assert found.metrics["accuracy"] == pytest.approx(0.5)
    assert [(device.name, score.loss) for device, score in found.scores] == [
        ("device 0", 1.0), ("device 1", 2.0),
    ]  # fmt: skip


def test_fraction_of_the_devices_evaluates() -> None:
    fleet = fleet_of(*[Score(1.0, 10)] * 5)
    steps, _ = run(fleet, fraction=0.4, rounds=6)
    asked = [{cid for cid, job in fleet.evaluated if job.version == r} for r in range(1, 7)]
    assert {len(cids) for cids in asked} == {2}
    assert len(set().union(*asked)) > 2
    assert all(step.device_scores and step.device_scores.sampled == 2 for step in steps)


def test_bad_score_drops_its_device_alone_and_costs_the_round_nothing() -> None:
    fleet = fleet_of(BadReply("its loss is nan"), Score(2.0, 30))
    [step], events = run(fleet)
    assert dropped(events) == [("device 0", "evaluation: its loss is nan")]
    assert ("device 0", "evaluation: its loss is nan") in step.dropped
    assert len(step.contributions) == 2
    assert step.device_scores and step.device_scores.metrics["loss"] == 2.0
    assert fleet.devices["0"].failures == 1


def test_device_that_does_not_answer_in_time_is_late() -> None:
    fleet = fleet_of(None, Score(2.0, 30))
    [step], events = run(fleet, timeout=0.2)
    assert dropped(events) == [("device 0", "evaluation: no reply in 0.2 s")]
    assert fleet.devices["0"].state == "late"
    assert step.device_scores and len(step.device_scores.scores) == 1


def test_device_whose_connection_breaks_is_not_waited_for() -> None:
    fleet = fleet_of(None, Score(2.0, 30))

    def leave_when_asked(device: Device, job: Job) -> None:
        EvaluatingFleet._start(fleet, device, job)
        if job.kind == "evaluate" and device.cid == "0":
            fleet.leave("0")

    fleet._start = leave_when_asked  # type: ignore[method-assign]
    [step], events = run(fleet)
    assert dropped(events) == [("device 0", "evaluation: the connection broke")]
    assert step.device_scores and step.device_scores.metrics["loss"] == 2.0


def test_no_good_score_leaves_no_metrics() -> None:
    [step], _ = run(fleet_of(BadReply("no"), BadReply("no")))
    assert step.device_scores
    assert (dict(step.device_scores.metrics), list(step.device_scores.scores)) == ({}, [])


def test_device_that_reports_absurdly_many_images_counts_in_part() -> None:
    fleet = fleet_of(Score(1.0, 10), Score(1.0, 10), Score(9.0, 90_000_000))
    [step], _ = run(fleet)
    assert step.device_scores
    assert step.device_scores.metrics["loss"] == pytest.approx((1 + 1 + 20 * 9) / 22)


def test_only_numbers_that_all_devices_report_reach_the_strategy() -> None:
    one, other = {"accuracy": 0.5, "images": "test"}, {"accuracy": 0.7, "extra": 1}
    [step], _ = run(fleet_of(Score(1.0, 10, one), Score(1.0, 10, other)))
    assert step.device_scores
    assert set(step.device_scores.metrics) == {"loss", "accuracy"}
    assert [score.metrics for _, score in step.device_scores.scores] == [one, other]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a user's strategy into the working directory; return its module."""

    def write(methods: str) -> str:
        name = f"own_{abs(hash((tmp_path, methods)))}"
        head = (
            "from flwr.app import Message, MetricRecord, RecordDict\n"
            "from flwr.serverapp.strategy import FedAvg\n\n\n"
            "class Mine(FedAvg):\n"
            "    worst = 0.0\n"
        )
        body = textwrap.indent(textwrap.dedent(methods), "    ")
        (tmp_path / f"{name}.py").write_text(head + body)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        return f"{name}:Mine"

    return write


def test_users_strategy_chooses_who_evaluates_and_combines_the_scores(mine) -> None:
    choice = mine(
        """
        def configure_evaluate(self, server_round, arrays, config, grid):
            config["top"] = 5
            record = RecordDict({"arrays": arrays, "config": config})
            return [Message(record, node, "evaluate") for node in grid.get_node_ids()]

        def aggregate_evaluate(self, server_round, replies):
            losses = [reply.content["metrics"]["loss"] for reply in replies]
            self.worst = max(losses)
            return MetricRecord({"worst": self.worst})
        """
    )
    fleet = fleet_of(Score(1.0, 10), Score(3.0, 10))
    [step], _ = run(fleet, fraction=0.0, strategy=choice)
    assert [job.config["top"] for _, job in fleet.evaluated] == [5, 5]
    assert step.device_scores and step.device_scores.metrics == {"worst": 3.0}


def test_users_strategy_that_fails_to_combine_scores_costs_no_round(mine, capsys) -> None:
    choice = mine(
        """
        def aggregate_evaluate(self, server_round, replies):
            self.worst = 7.0
            raise RuntimeError("not today")
        """
    )
    steps, events = run(fleet_of(Score(1.0, 10)), strategy=choice, rounds=2)
    assert len(steps) == 2 and steps[1].device_scores is None
    assert notices(events)[0] == (
        "round 1: no evaluation by devices: Mine cannot aggregate: not today"
    )
    assert "RuntimeError: not today" in capsys.readouterr().err


def test_evaluation_waits_for_as_many_devices_as_a_users_strategy_wants(mine) -> None:
    choice = mine(
        """
        def configure_evaluate(self, server_round, arrays, config, grid):
            self.min_evaluate_nodes = 3
            return super().configure_evaluate(server_round, arrays, config, grid)
        """
    )
    fleet = fleet_of(Score(1.0, 10), Score(1.0, 10))
    fleet.replies["2"], fleet.scores["2"] = adding(1), Score(1.0, 10)
    asked_twice = fleet._next

    def join_meanwhile(timeout: float | None) -> Any:
        if timeout is None and "2" not in fleet.devices and not fleet.events:
            fleet.join("2")
        return asked_twice(timeout)

    fleet._next = join_meanwhile  # type: ignore[method-assign]
    [step], _ = run(fleet, strategy=choice, min_num_clients=2)
    assert {cid for cid, _ in fleet.evaluated} == {"0", "1", "2"}
    assert step.sampled == 2
