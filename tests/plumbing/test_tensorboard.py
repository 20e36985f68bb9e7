"""TensorBoard's own reader reads what a run writes."""

import time

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from federated.rounds import Contribution, Device, Joined, Started, Step
from plumbing.tensorboard import MAX_DEVICES, TensorBoard


def step(server_round: int, accuracy: float = 0.5, devices: int = 2, **metrics: object) -> Step:
    contributions = [
        Contribution(Device(str(cid)), 10, 10, 1.0, {"loss": 1.5, **metrics}, 2.0, 1, 1)
        for cid in range(devices)
    ]
    evaluation = {"loss": 1.25, "accuracy": accuracy, "class_accuracy": {"a cat": 0.75}}
    return Step(server_round, {}, evaluation, 2, contributions, [("device 9", "lost")], 3.0, 1.0)


def read(path) -> EventAccumulator:
    accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def values(found: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in found.Scalars(tag)]


def test_tensorboard_reads_test_results_and_devices(tmp_path):
    observe = TensorBoard(tmp_path)
    observe(Started({"loss": 2.5, "accuracy": 0.125}))
    for server_round in (1, 2):
        observe(step(server_round, 0.25 * server_round, cpu_temperature=61.0))
    found = read(tmp_path)
    assert values(found, "accuracy/test") == [(0, 0.125), (1, 0.25), (2, 0.5)]
    assert values(found, "loss/test") == [(0, 2.5), (1, 1.25), (2, 1.25)]
    assert values(found, "class_accuracy/a cat") == [(1, 0.75), (2, 0.75)]
    assert values(found, "device_1/loss") == [(1, 1.5), (2, 1.5)]
    assert values(found, "device_0/cpu_temperature") == [(1, 61.0), (2, 61.0)]
    assert values(found, "seconds/round") == [(1, 4.0), (2, 4.0)]
    assert values(found, "devices/dropped") == [(1, 1.0), (2, 1.0)]


def test_rounds_that_are_done_again_after_a_resume_replace_the_lost_ones(tmp_path):
    lost = TensorBoard(tmp_path)
    for server_round in (1, 2, 3):
        lost(step(server_round, 0.25))
    lost.writer.close()

    time.sleep(1.1)  # the name of an event file has its second
    TensorBoard(tmp_path)(step(2, 0.5))
    assert values(read(tmp_path), "accuracy/test") == [(1, 0.25), (2, 0.5)]


def test_before_the_first_finished_round_there_is_no_file(tmp_path):
    TensorBoard(tmp_path)(Joined(Device("0")))
    assert not list(tmp_path.iterdir())


def test_devices_words_and_their_number_are_bounded(tmp_path):
    TensorBoard(tmp_path)(step(1, float("nan"), 3 * MAX_DEVICES, loss="x", cpu_temperature=True))
    tags = read(tmp_path).Tags()["scalars"]
    assert "accuracy/test" not in tags
    assert "device_0/cpu_temperature" not in tags
    assert sum(tag.endswith("/seconds") for tag in tags) == MAX_DEVICES


def test_disk_that_takes_nothing_ends_no_run(tmp_path, capsys):
    observe = TensorBoard(tmp_path / "gone")
    observe(step(1))
    observe(step(2))
    assert capsys.readouterr().err.count("cannot write TensorBoard's events") == 1
