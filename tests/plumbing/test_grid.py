"""The fleet over Flower's Grid, on a Grid in memory."""

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Error, Message, MetricRecord, RecordDict

from federated.rounds import Freed, Job, Joined, Left, Plan, Result, Resumed, synchronous
from federated.strategies import make_strategy
from plumbing import grid as module
from plumbing.grid import GridFleet
from tests.devices import Recorder, small_model
from tests.nodes import Info, MemoryGrid, properties, trained


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> MemoryGrid:
    make_strategy("FedAvg")  # Flower's messages can be made from here on
    monkeypatch.setattr(module, "NODES_SECONDS", 0.02)
    monkeypatch.setattr(module, "REPLIES_SECONDS", 0.01)
    return MemoryGrid()


def open_recorder(grid: MemoryGrid, admit: Any = lambda properties: None) -> Recorder:
    return Recorder(GridFleet(grid, {"seed": 7}, admit))


def test_nodes_join_under_the_names_that_they_report(grid):
    grid.add(11, cid="a")
    grid.add(12, cid="b")
    devices = open_recorder(grid).wait_for(2)
    assert [device.name for device in devices] == ["device a", "device b"]
    assert devices[0].properties["images"] == 10
    assert grid.asked == {(11, "query"): 1, (12, "query"): 1}


def test_reply_becomes_an_update_with_its_metrics(grid):
    grid.add(1, lambda message: trained(message, 0.5, loss=2.0, board="Pi"))
    recorder = open_recorder(grid)
    recorder.wait_for(1)
    model = small_model()
    [result] = recorder.exchange(model)
    assert result.update.num_examples == 10
    assert result.update.metrics == {"loss": 2.0, "board": "Pi"}
    np.testing.assert_array_equal(result.update.delta["w"], np.full((2, 3), 0.5))
    assert list(result.update.delta) == ["w", "b"]
    assert result.update.counters["n"] == 3
    assert result.bytes_sent > sum(array.nbytes for array in model.values())
    assert result.bytes_received > sum(array.nbytes for array in model.values())


def test_stock_app_that_counts_in_a_metric_record_is_understood(grid):
    def stock(message: Message) -> RecordDict:
        arrays = trained(message).array_records["arrays"]
        return RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 4})})

    grid.add(1, stock)
    recorder = open_recorder(grid)
    recorder.wait_for(1)
    [result] = recorder.exchange(small_model())
    assert result.update.num_examples == 4


def evaluated(message: Message, **metrics: Any) -> RecordDict:
    """Answer as a node whose loss is the first weight."""
    assert message.metadata.message_type == "evaluate"
    loss = float(message.content.array_records["arrays"]["w"].numpy().flat[0])
    return RecordDict({"metrics": MetricRecord({"loss": loss, "num-examples": 4, **metrics})})


def test_node_evaluates_weights_and_reports_its_loss(grid):
    grid.add(1, lambda message: evaluated(message, accuracy=0.5))
    recorder = open_recorder(grid)
    recorder.wait_for(1)
    [result] = recorder.exchange(small_model(), kind="evaluate")
    assert (result.score.loss, result.score.num_examples) == (1.0, 4)
    assert result.score.metrics == {"accuracy": 0.5}
    assert (result.problem, result.update) == ("", None)


@pytest.mark.parametrize(
    ("metrics", "problem"),
    [
        ({"loss": float("inf")}, "its loss is inf"),
        ({"num-examples": 0}, "evaluated on 0 examples"),
        ({"num-examples": 1.5}, "evaluated on 1.5 examples"),
    ],
)
def test_bad_score_is_the_nodes_fault(grid, metrics, problem):
    grid.add(1, lambda message: evaluated(message, **metrics))
    recorder = open_recorder(grid)
    recorder.wait_for(1)
    [result] = recorder.exchange(small_model(), kind="evaluate")
    assert (result.score, result.problem, result.at_fault) == (None, problem, True)


def test_rounds_over_a_grid_end_with_an_evaluation_by_nodes(grid):
    def answer(message: Message) -> RecordDict:
        evaluates = message.metadata.message_type == "evaluate"
        return evaluated(message, accuracy=0.5) if evaluates else trained(message)

    for node in (1, 2):
        grid.add(node, answer)
    fleet = GridFleet(grid, {}, lambda properties: None)
    plan = Plan(2, lambda n: {"lr": 0.1}, lambda weights: {"loss": 1.0}, min_num_clients=2)
    strategy = make_strategy("FedAvg", 1.0, 2, sample_fraction_evaluate=1.0)
    steps = list(synchronous(fleet, strategy, small_model(), plan))
    assert [step.device_scores.metrics for step in steps] == [
        {"loss": 2.0, "accuracy": 0.5}, {"loss": 3.0, "accuracy": 0.5},
    ]  # fmt: skip


def without_an_array(message: Message) -> RecordDict:
    content = trained(message)
    del content.array_records["arrays"]["b"]
    return content


def not_finite(message: Message) -> RecordDict:
    content = trained(message)
    content.array_records["arrays"]["w"] = Array(np.full((2, 3), np.nan, np.float32))
    return content


def pickled(message: Message) -> RecordDict:
    content = trained(message)
    content.array_records["arrays"]["w"].data = b"\x80\x04K\x01."
    return content


def of_two_models(message: Message) -> RecordDict:
    content = trained(message)
    content["more"] = content.array_records["arrays"]
    return content


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (without_an_array, "2 arrays with other names than the model's"),
        (not_finite, "w has 6 non-finite values"),
        (pickled, "an array with the header"),
        (of_two_models, "its reply holds 2 models"),
        (lambda m: trained(m, **{"num-examples": -3}), "trained on -3 examples"),
        (lambda m: trained(m, **{"num-examples": "many"}), "trained on many examples"),
        (lambda m: RecordDict({"m": ConfigRecord({"problem": "no images"})}), "no images"),
        (lambda m: Error(2, "Traceback:\n  line\nValueError: x"), "failed (ValueError: x)"),
    ],
)
def test_bad_reply_is_the_nodes_fault(grid, answer, problem):
    grid.add(1, answer)
    recorder = open_recorder(grid)
    recorder.wait_for(1)
    [result] = recorder.exchange(small_model())
    assert result.update is None
    assert problem in result.problem
    assert result.at_fault


def test_lost_message_is_not_the_nodes_fault(grid):
    grid.add(1, lambda message: Error(4, "expired"))
    recorder = open_recorder(grid)
    recorder.wait_for(1)
    [result] = recorder.exchange(small_model())
    assert (result.problem, result.at_fault) == ("its reply was lost", False)


def test_node_with_an_objection_is_refused_with_one_line(grid):
    grid.add(1)
    grid.add(2)
    recorder = open_recorder(grid, lambda p: "it has no images" if p["cid"] == "1" else None)
    recorder.wait_for(1)
    assert list(recorder.fleet.devices) == ["2"]
    assert "refused device 1: it has no images" in recorder.lines()


def test_node_without_data_is_refused_with_its_reason(grid):
    problem = RecordDict({"metrics": ConfigRecord({"problem": "data directory '/d' is empty"})})
    grid.nodes[Info(9)] = lambda message: problem
    recorder = open_recorder(grid)
    recorder.until(lambda: recorder.events)
    assert recorder.lines() == ["refused node 9: data directory '/d' is empty"]
    assert not recorder.fleet.devices


def test_node_whose_first_answer_was_lost_is_asked_again(grid):
    answers = [Error(code=5, reason="Node Unavailable"), properties("1")]
    grid.nodes[Info(1)] = lambda message: answers.pop(0)
    recorder = open_recorder(grid)
    recorder.wait_for(1)
    assert not any("refused" in line for line in recorder.lines())


def test_node_that_is_restarted_gets_its_job_again(grid):
    grid.add(1)
    killed = grid.add(2, lambda message: None)
    recorder = open_recorder(grid)
    recorder.wait_for(2)
    job = Job("1", 0, small_model(), {})
    for device in recorder.fleet.idle():
        recorder.fleet.start(device, job)
    recorder.until(lambda: any(isinstance(e, Result) for e in recorder.events))
    del grid.nodes[killed]
    recorder.until(lambda: any(isinstance(e, Left) for e in recorder.events))
    grid.add(3, cid="2")
    recorder.until(lambda: sum(isinstance(e, Result) for e in recorder.events) == 2)
    kinds = [type(event) for event in recorder.events]
    assert kinds == [Joined, Joined, Result, Left, Joined, Resumed, Result]
    assert recorder.events[-1].device.cid == "2"
    assert recorder.events[-1].update is not None


def test_node_that_was_restarted_under_its_number_is_noticed(grid):
    old = grid.add(1, lambda message: None, since="12:00")
    recorder = open_recorder(grid)
    recorder.wait_for(1)
    recorder.fleet.start(recorder.fleet.idle()[0], Job("1", 0, small_model(), {}))
    del grid.nodes[old]
    grid.add(1, since="12:01")
    recorder.until(lambda: any(isinstance(e, Result) for e in recorder.events))
    assert recorder.events[-1].update is not None


def test_second_node_of_a_name_waits_until_the_first_is_gone(grid):
    first = grid.add(1, cid="a")
    recorder = open_recorder(grid)
    [device] = recorder.wait_for(1)
    grid.add(2, cid="a")
    recorder.until(lambda: any("is here twice" in line for line in recorder.lines()))
    assert recorder.fleet.devices["a"] is device
    del grid.nodes[first]
    recorder.until(lambda: recorder.fleet.devices.get("a") not in (None, device))


def test_reply_that_nobody_waits_for_only_frees_its_node(grid):
    answers: list[bool] = []
    grid.add(1, lambda message: trained(message) if answers else None)
    recorder = open_recorder(grid)
    [device] = recorder.wait_for(1)
    job = Job("1", 0, small_model(), {})
    recorder.fleet.start(device, job)
    recorder.fleet.abandon(device, job)
    assert device.state == "late"
    answers.append(True)
    recorder.until(lambda: any(isinstance(e, Freed) for e in recorder.events))
    assert device.state == "idle"
    assert not any(isinstance(event, Result) for event in recorder.events)
    assert "device 1 answered too late, which does not count" in recorder.lines()


def test_rounds_over_a_grid_give_the_weighted_mean(grid):
    grid.add(1, lambda message: trained(message, 1.0, **{"num-examples": 30}))
    grid.add(2, lambda message: trained(message, 5.0))
    fleet = GridFleet(grid, {}, lambda properties: None)
    plan = Plan(2, lambda n: {"lr": 0.1}, lambda weights: {"loss": 1.0}, min_num_clients=2)
    steps = list(synchronous(fleet, make_strategy("FedAvg", 1.0, 2), small_model(), plan))
    assert [len(step.contributions) for step in steps] == [2, 2]
    np.testing.assert_allclose(steps[1].weights["w"], small_model()["w"] + 2 * 2.0)


def test_node_without_a_name_is_refused(grid):
    info = Info(9)
    grid.nodes[info] = lambda message: RecordDict({"properties": ConfigRecord({"images": 3})})
    recorder = open_recorder(grid)
    recorder.until(lambda: any("refused" in line for line in recorder.lines()))
    assert not recorder.fleet.devices
