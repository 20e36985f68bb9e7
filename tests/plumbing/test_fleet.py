"""plumbing/stream/fleet.py and plumbing/stream/device.py against each other, over real gRPC."""

import contextlib
import gc
import queue
import re
import threading
import time
import weakref
from collections.abc import Callable

import grpc
import numpy as np
import pytest

from federated.errors import FederationError, Refused
from federated.rounds import Device, Job, Result
from plumbing.stream import device as transport
from plumbing.stream import fleet as fleet_module
from plumbing.stream import wire
from plumbing.stream.fleet import StreamFleet
from tests.conftest import Link
from tests.devices import Adder, Recorder, greeting, small_model


@pytest.fixture
def join() -> Callable[..., threading.Thread]:
    """Be a device in a thread of its own, until the run is over."""

    def start(client: Adder, fleet: StreamFleet | Link) -> threading.Thread:
        def serve() -> None:
            with contextlib.suppress(FederationError):  # its fleet is closed before it is back
                client.serve(fleet.address)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        return thread

    return start


def connected(recorder: Recorder, cid: str, other_than: Device | None = None) -> Device:
    """Return a device once it is connected, or connected again."""
    devices = recorder.fleet.devices
    recorder.until(lambda: devices.get(cid) not in (None, other_than))
    return devices[cid]


def test_devices_join_train_and_end_with_the_run(open_fleet, join):
    recorder = Recorder(fleet := open_fleet())
    threads = [join(Adder(str(cid), step=cid + 1), fleet) for cid in range(3)]
    devices = recorder.wait_for(3)
    assert [device.name for device in devices] == ["device 0", "device 1", "device 2"]
    assert devices[1].properties["greeted_with"] == 7
    assert sorted(line.partition(":")[0] for line in recorder.lines()) == [
        "device 0 joined", "device 1 joined", "device 2 joined",
    ]  # fmt: skip

    model = small_model()
    for cid, result in enumerate(recorder.exchange(model)):
        assert result.update.num_examples == 10
        for name in ("w", "b"):
            np.testing.assert_array_equal(
                result.update.delta[name], np.full_like(model[name], cid + 1)
            )
        assert result.bytes_sent > 0 and result.bytes_received > 0 and result.seconds > 0

    fleet.close(run_is_over=True)
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_a_fleets_settings_reach_the_device_with_their_types(open_fleet, join):
    seen = {}

    class Curious(Adder):
        def fit(self, parameters, config):
            seen.update(config)
            return super().fit(parameters, config)

    recorder = Recorder(fleet := open_fleet())
    join(Curious("0"), fleet)
    recorder.wait_for(1)
    config = {"lr": 0.5, "epochs": 3, "partition": "iid", "stop": True, "whole": 2.0}
    recorder.exchange(small_model(), "a-job", **config)
    assert {name: seen[name] for name in config} == config
    assert {name: type(seen[name]) for name in config} == {n: type(v) for n, v in config.items()}


@pytest.mark.parametrize("numbers", [1, 3_000_000])  # the larger model comes in pieces
def test_devices_evaluate_weights_and_report_their_loss(open_fleet, join, numbers):
    recorder = Recorder(fleet := open_fleet())
    threads = [join(Adder(str(cid), num_examples=10 + cid), fleet) for cid in range(2)]
    recorder.wait_for(2)
    model = {"w": np.full(numbers, 1.5, np.float32), "b": np.ones(numbers, np.float32)}
    for cid, result in enumerate(recorder.exchange(model, kind="evaluate", lr=0.25)):
        assert (result.problem, result.update) == ("", None)
        assert (result.score.loss, result.score.num_examples) == (1.5, 10 + cid)
        assert result.score.metrics == {"lr": 0.25}
        assert result.bytes_sent > 8 * numbers
    assert all(result.update for result in recorder.exchange(model, "2"))  # the same devices
    fleet.close(run_is_over=True)
    for thread in threads:
        thread.join(5)


@pytest.mark.parametrize(
    ("loss", "num_examples", "problem"),
    [
        (float("nan"), 10, "its loss is nan"),
        (1.0, 0, "evaluated on 0 examples"),
        (1.0, -5, "evaluated on -5 examples"),
        (ValueError("no images"), 10, "could not evaluate: ValueError('no images')"),
        (FederationError("no images"), 10, "could not evaluate: no images"),
    ],
)
def test_score_that_cannot_be_is_the_devices_bad_reply(
    open_fleet, join, loss, num_examples, problem
):
    class Odd(Adder):
        def evaluate(self, parameters, config):
            if isinstance(loss, Exception):
                raise loss
            return loss, num_examples, {}

    recorder = Recorder(fleet := open_fleet())
    join(Odd("0"), fleet)
    recorder.wait_for(1)
    (result,) = recorder.exchange(small_model(), kind="evaluate")
    assert (result.score, result.problem, result.at_fault) == (None, problem, True)
    (result,) = recorder.exchange(small_model(), "2")
    assert result.update


def test_update_where_a_score_is_asked_for_is_a_bad_reply(open_fleet):
    fleet = open_fleet()
    recorder = Recorder(fleet)
    replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    replies.put(wire.encode_properties_reply(greeting("0")))
    with grpc.insecure_channel(fleet.address) as channel:
        stream = channel.stream_stream(transport.JOIN)(iter(replies.get, None))
        recorder.wait_for(1)
        replies.put(wire.encode_fit_reply([], 10, {wire.ROUND_ID: "1"}))  # as if it had trained
        (result,) = recorder.exchange(small_model(), kind="evaluate")
        stream.cancel()
    assert result.problem == "a message of type fit_res, not evaluate_res"
    assert result.at_fault


def test_all_devices_train_at_the_same_time(open_fleet, join):
    together = threading.Barrier(20)

    class Meeting(Adder):
        def fit(self, parameters, config):
            together.wait(10)  # breaks, and with it the round, unless all are here
            return super().fit(parameters, config)

    recorder = Recorder(fleet := open_fleet())
    for cid in range(20):
        join(Meeting(str(cid)), fleet)
    recorder.wait_for(20)
    assert all(result.update for result in recorder.exchange(small_model()))


def test_second_device_with_a_cid_is_refused_and_the_first_stays(open_fleet, join):
    recorder = Recorder(fleet := open_fleet(keepalive_seconds=0.5))
    join(Adder("0"), fleet)
    recorder.wait_for(1)
    with pytest.raises(Refused, match="a device with --cid=0 is connected already; give each its"):
        Adder("0").serve(fleet.address)
    recorder.until(lambda: len(recorder.lines()) > 2)
    waits, refused = recorder.lines()[1:]
    assert waits.startswith("device 0 waits up to 2 s to join: another connection has --cid=0")
    assert refused.startswith("refused device 0: a device with --cid=0")
    (result,) = recorder.exchange(small_model())
    assert result.update


def test_device_that_comes_back_takes_its_place_again(open_fleet, join):
    recorder = Recorder(fleet := open_fleet())
    with grpc.insecure_channel(fleet.address) as channel:
        stream = channel.stream_stream(transport.JOIN)(
            iter([wire.encode_properties_reply(greeting("0"))])
        )
        next(stream)
        (ghost,) = recorder.wait_for(1)
    join(Adder("0"), fleet)
    back = connected(recorder, "0", other_than=ghost)
    assert [line.partition(":")[0] for line in recorder.lines()] == [
        "device 0 joined", "device 0 left", "device 0 joined",
    ]  # fmt: skip
    assert (ghost.state, ghost.gone) == ("gone", "the connection broke")
    assert back.state == "idle"
    (result,) = recorder.exchange(small_model())
    assert result.device is back


def test_work_lost_with_a_connection_is_fetched_and_not_trained_twice(open_fleet, join, make_link):
    class Breaking(Adder):
        def fit(self, parameters, config):
            trained.append(config)
            link.cut()
            left.wait(10)
            link.heal()
            return super().fit(parameters, config)

    trained, left = [], threading.Event()
    recorder = Recorder(fleet := open_fleet())
    link = make_link(fleet.address)
    join(Breaking("0", step=2), link)
    (device,) = recorder.wait_for(1)
    job = Job("the job", 0, small_model(), {})
    fleet.start(device, job)
    recorder.until(lambda: device.state == "gone")
    left.set()
    recorder.until(lambda: isinstance(recorder.events[-1], Result))
    result = recorder.events[-1]
    assert result.job is job
    assert (result.update.delta["w"] == 2).all()
    assert len(trained) == 1


def test_job_for_a_device_that_has_just_left_is_lost(open_fleet):
    recorder = Recorder(fleet := open_fleet())
    with grpc.insecure_channel(fleet.address) as channel:
        stream = channel.stream_stream(transport.JOIN)(
            iter([wire.encode_properties_reply(greeting("0"))])
        )
        next(stream)
        (ghost,) = recorder.wait_for(1)
    time.sleep(0.3)  # the fleet knows by now, the schedule not yet
    fleet.start(ghost, Job("1", 0, small_model(), {}))
    assert ghost.state == "busy"
    recorder.until(lambda: ghost.state == "gone")
    assert ghost.gone == "the connection broke"


def test_reason_for_a_refusal_reaches_the_device(open_fleet):
    recorder = Recorder(
        fleet := open_fleet(admit=lambda properties: "no room, come to the other kitchen")
    )
    with pytest.raises(Refused, match="no room, come to the other kitchen"):
        Adder("0").serve(fleet.address)
    recorder.until(recorder.lines)
    assert recorder.lines() == ["refused device 0: no room, come to the other kitchen"]


@pytest.mark.parametrize("cid", ["../../x", "a\nb", "", "x" * 65, "ü", "?1"])
def test_cid_that_is_no_name_is_refused(open_fleet, cid):
    recorder = Recorder(fleet := open_fleet())
    with pytest.raises(Refused, match="is not made of 1 to 64 letters"):
        Adder(cid).serve(fleet.address)
    recorder.until(lambda: recorder.events)
    (event,) = recorder.events
    assert event.text.startswith("refused 127.0.0.1: ")
    assert event.text.isprintable()


@pytest.mark.parametrize("greeting", [b"", b"\xff\xff\xff", wire.encode_fit_reply({}, 1, {})])
def test_client_that_answers_nonsense_is_refused(open_fleet, greeting):
    recorder = Recorder(fleet := open_fleet())
    with grpc.insecure_channel(fleet.address) as channel:
        stream = channel.stream_stream(transport.JOIN)(iter([greeting]))
        with pytest.raises(grpc.RpcError) as error:
            list(stream)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    recorder.until(recorder.lines)
    assert "it did not report what it is" in recorder.lines()[0]
    assert fleet.devices == {}


def test_client_that_is_held_up_before_it_greets_may_try_again(open_fleet, monkeypatch):
    monkeypatch.setattr(fleet_module, "GREETING_SECONDS", 0.3)
    recorder = Recorder(fleet := open_fleet())
    silence = threading.Event()
    with grpc.insecure_channel(fleet.address) as channel:
        messages = (b"" for _ in range(1) if silence.wait(30))
        stream = channel.stream_stream(transport.JOIN)(messages)
        with pytest.raises(grpc.RpcError) as error:
            list(stream)
        silence.set()
    assert error.value.code() not in transport.REFUSALS
    recorder.until(recorder.lines)
    assert recorder.lines()[0].endswith("it did not report what it is in time")


def test_reply_far_larger_than_the_model_is_refused_before_it_is_read(open_fleet, join):
    class Braggart(Adder):
        def fit(self, parameters, config):
            return [np.zeros(1_000_000, np.float32)], 10, {}

    recorder = Recorder(fleet := open_fleet(model_bytes=1000))
    join(Braggart("0"), fleet)
    (device,) = recorder.wait_for(1)
    fleet.start(device, Job("1", 0, small_model(), {}))
    again = connected(recorder, "0", other_than=device)
    assert device.gone == "it sent a message that is too large"
    (result,) = [event for event in recorder.events if isinstance(event, Result)]
    assert result.problem == device.gone
    fleet.start(again, Job("2", 0, small_model(), {}))
    recorder.until(lambda: isinstance(recorder.events[-1], Result))
    result = recorder.events[-1]
    assert "its reply is too large: Received message larger than max" in result.problem
    assert result.at_fault


def test_device_that_has_left_is_forgotten(open_fleet):
    fleet = open_fleet()
    with grpc.insecure_channel(fleet.address) as channel:
        replies: queue.SimpleQueue = queue.SimpleQueue()
        replies.put(wire.encode_properties_reply(greeting("brief")))
        stream = channel.stream_stream(transport.JOIN)(iter(replies.get, None))
        next(stream)
        event = fleet.wait(20)
        device = weakref.ref(event.device)
        replies.put(None)
        stream.cancel()
        event = fleet.wait(20)
        assert event.device is device()
        assert event.device.gone
    del event
    deadline = time.monotonic() + 20
    while gc.collect() is not None and device():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.waits
def test_device_that_takes_nothing_of_the_model_is_dropped_by_name(open_fleet):
    recorder = Recorder(fleet := open_fleet())
    model = {"w": np.zeros(150_000, np.float32)}
    unread = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16)]
    with grpc.insecure_channel(fleet.address, unread) as channel:
        replies: queue.SimpleQueue = queue.SimpleQueue()
        replies.put(wire.encode_properties_reply(greeting("deaf", **{wire.PIECES: True})))
        stream = channel.stream_stream(transport.JOIN)(iter(replies.get, None))
        next(stream)
        recorder.wait_for(1)
        (result,) = recorder.exchange(model, seconds=30)
        replies.put(None)
    assert re.fullmatch(r"did not take 600,\d+ bytes of the model in 10 s", result.problem)


def test_no_host_of_that_name_ends_the_client():
    with pytest.raises(FederationError, match=r"cannot find the host 'no\.such\.host\.invalid'"):
        Adder("0").serve("no.such.host.invalid:8080")


def test_device_that_joins_while_the_run_ends_hears_of_it_too(open_fleet, join):
    class Slow(Adder):
        def get_properties(self, config):
            asked.set()
            time.sleep(1)
            return super().get_properties(config)

    asked = threading.Event()
    recorder = Recorder(fleet := open_fleet())
    thread = join(Slow("0"), fleet)
    assert asked.wait(10)
    fleet.close(run_is_over=True)
    thread.join(5)
    assert not thread.is_alive()
    assert recorder.lines() == []


def test_refusal_of_any_length_and_lettering_arrives(open_fleet):
    recorder = Recorder(fleet := open_fleet(admit=lambda properties: "no\n\033[31m" + "x" * 30_000))
    with pytest.raises(Refused, match="no"):
        Adder("0").serve(fleet.address)
    recorder.until(lambda: recorder.events)
    assert recorder.events[0].text.isprintable()
    assert len(recorder.events[0].text) <= 300


def test_late_result_is_dropped_and_the_device_is_free_again(open_fleet, join):
    class Slow(Adder):
        def fit(self, parameters, config):
            begun.set()
            done.wait(10)
            return super().fit(parameters, config)

    begun, done = threading.Event(), threading.Event()
    recorder = Recorder(fleet := open_fleet())
    join(Slow("0"), fleet)
    (device,) = recorder.wait_for(1)
    job = Job("1", 0, small_model(), {})
    fleet.start(device, job)
    assert device.state == "busy"
    assert begun.wait(10)
    fleet.abandon(device, job, patience=20)
    assert device.state == "late"
    assert fleet.idle() == []
    done.set()
    recorder.until(lambda: device.state == "idle")
    assert recorder.lines()[-1] == "device 0 answered too late, which does not count"
    assert not any(isinstance(event, Result) for event in recorder.events)


def test_device_whose_job_is_abandoned_before_it_is_sent_is_free_again(open_fleet, join):
    recorder = Recorder(fleet := open_fleet())
    join(Adder("0"), fleet)
    (device,) = recorder.wait_for(1)
    for _ in range(20):
        job = Job("1", 0, small_model(), {})
        fleet.start(device, job)
        fleet.abandon(device, job)
        recorder.until(lambda: device.state == "idle", 5)
    (result,) = recorder.exchange(small_model())
    assert result.update


def test_device_that_is_late_for_too_long_is_hung_up_on(open_fleet, join):
    class Hung(Adder):
        def fit(self, parameters, config):
            begun.set()
            done.wait(20)
            return super().fit(parameters, config)

    begun, done = threading.Event(), threading.Event()
    recorder = Recorder(fleet := open_fleet())
    join(Hung("0"), fleet)
    (device,) = recorder.wait_for(1)
    job = Job("1", 0, small_model(), {})
    fleet.start(device, job)
    assert begun.wait(10)
    start = time.monotonic()
    fleet.abandon(device, job, patience=0.5)
    recorder.until(lambda: device.state == "gone")
    assert 0.4 < time.monotonic() - start < 5
    done.set()
