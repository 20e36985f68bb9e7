"""A device's reports of its progress: over real gRPC, beside the stream."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

import client
from federated.errors import BadReply
from federated.rounds import Device, Progress
from plumbing.stream import device as transport
from plumbing.stream import wire
from plumbing.stream.fleet import read_progress
from tests.devices import Adder, Recorder, greeting, small_model

REPORT = {"cid": "0", "step": 3, "steps": 8, "images_per_second": 50.0, "loss": 1.5}


class Reporting(Adder):
    """A device that reports while it trains, until it may stop."""

    def __init__(self, cid: str, *reports: dict) -> None:
        super().__init__(cid)
        self.reporter = transport.Reporter()
        self.reports = reports
        self.may_stop = threading.Event()

    def fit(self, parameters, config):
        for report in self.reports:
            self.reporter(report)
        self.may_stop.wait(10)
        return super().fit(parameters, config)

    def serve(self, address, max_wait_seconds=20, identity=None):
        transport.serve(address, self, lambda state: None, max_wait_seconds, reporter=self.reporter)


@pytest.fixture
def train(open_fleet):
    """Let a device do one job; return the reports that the schedule saw, and the result."""

    def run(device: Reporting, until=lambda seen: seen):
        recorder = Recorder(fleet := open_fleet())
        thread = threading.Thread(target=device.serve, args=(fleet.address,), daemon=True)
        thread.start()
        recorder.wait_for(1)

        def seen() -> list[Progress]:
            return [event for event in recorder.events if isinstance(event, Progress)]

        def stop_when_seen() -> None:
            deadline = time.monotonic() + 5
            while not until(seen()) and time.monotonic() < deadline:
                time.sleep(0.02)
            device.may_stop.set()

        threading.Thread(target=stop_when_seen, daemon=True).start()
        (result,) = recorder.exchange(small_model())
        return seen(), result

    return run


def test_report_reaches_the_schedule_with_its_device(train):
    (progress,), result = train(Reporting("0", {**REPORT, "throttled": "under-voltage"}))
    assert (progress.device.cid, progress.step, progress.steps) == ("0", 3, 8)
    assert progress.images_per_second == 50
    assert progress.metrics == {"loss": 1.5, "throttled": "under-voltage"}
    assert result.update


def test_report_changes_the_version_of_a_devices_data(train):
    (progress,), _ = train(Reporting("0", {**REPORT, "data_version": "changed"}))
    assert progress.device.properties["data_version"] == "changed"
    assert progress.metrics == {"loss": 1.5}


def test_of_a_flood_of_reports_one_a_second_counts(train):
    reports = [{**REPORT, "step": step} for step in range(8)] * 20
    seen, result = train(Reporting("0", *reports))
    assert len(seen) <= 2
    assert result.update


@pytest.mark.parametrize(
    "report",
    [
        {"cid": "0"},
        {**REPORT, "step": -1},
        {**REPORT, "step": 9},
        {**REPORT, "steps": 10**15, "step": 0},
        {**REPORT, "step": True},
        {**REPORT, "images_per_second": float("nan")},
        {**REPORT, "images_per_second": -1.0},
        {**REPORT, "note": "x" * 3000},
        {**REPORT, "cid": "1"},
        {**REPORT, "data_version": "x" * 65},
        {**REPORT, "data_version": 1},
    ],
)
def test_report_that_makes_no_sense_is_ignored_and_the_training_counts(train, report):
    device = Reporting("0", report)
    threading.Timer(0.3, device.may_stop.set).start()
    seen, result = train(device)
    assert not seen
    assert result.update


def test_report_from_another_connection_than_the_devices_is_ignored(open_fleet):
    recorder = Recorder(fleet := open_fleet())
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(fleet.address, options) as own:
        stream = own.stream_stream(transport.JOIN)(
            iter([wire.encode_properties_reply(greeting("0"))])
        )
        next(stream)
        recorder.wait_for(1)
        metadata = [(wire.PROGRESS_KEY, wire.encode_progress(REPORT))]
        with grpc.insecure_channel(fleet.address, options) as stranger:
            stranger.unary_unary(transport.PROGRESS)(b"", timeout=5, metadata=metadata)
        recorder.drain()
        assert not any(isinstance(event, Progress) for event in recorder.events)
        own.unary_unary(transport.PROGRESS)(b"", timeout=5, metadata=metadata)
        recorder.until(lambda: any(isinstance(event, Progress) for event in recorder.events))


def test_server_without_the_call_is_asked_once():
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    reporter = transport.Reporter()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        reporter.channel = channel
        reporter(REPORT)
        deadline = time.monotonic() + 5
        while reporter.channel and time.monotonic() < deadline:
            time.sleep(0.02)
        assert reporter.channel is None
        reporter(REPORT)
    server.stop(0)


def test_report_without_a_server_does_no_harm():
    reporter = transport.Reporter()
    reporter(REPORT)
    channel = grpc.insecure_channel("127.0.0.1:1")
    reporter.channel = channel
    reporter(REPORT)
    channel.close()
    reporter(REPORT)


def test_client_reports_a_few_times_a_minute_in_a_few_hundred_bytes():
    sent = []

    class Trainer:
        def fit(self, weights, settings, report):
            for step in range(1000):
                report(step, 1000, 0.5, 100.0)
            return {}, 10, {}

        names, lr = (), 0.1

    device = client.Client("0", Trainer(), sent.append)
    device.fit([], {})
    (report,) = sent
    assert (report["cid"], report["step"], report["steps"]) == ("0", 0, 1000)
    assert report["free_ram_mb"] > 0
    assert len(wire.encode_progress(report)) < 500
    assert 60 / client.REPORT_SECONDS <= 6


@pytest.mark.parametrize("data", [b"\xff" * 100, b"", wire.encode_fit_failure("no")])
def test_bytes_that_are_no_report_are_refused(data):
    with pytest.raises(BadReply):
        read_progress(Device("0"), wire.decode_progress(data))
