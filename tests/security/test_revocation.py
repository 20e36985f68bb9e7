"""What the owner takes back: at once, in the middle of a round, and whatever is in the way."""

import contextlib
import sqlite3
import threading
import time

import grpc
import numpy as np
import pytest

from federated.errors import FederationError, Refused
from federated.rounds import Plan, Result, Step, synchronous
from federated.strategies import make_strategy
from plumbing.security import admissions as admissions_module
from plumbing.stream import device as transport
from plumbing.stream import fleet as fleet_module
from plumbing.stream import wire
from plumbing.stream.fleet import StreamFleet
from tests.devices import Adder, Recorder
from tests.security.conftest import admitted, channel, hello, serve, token_for, wait_until

MODEL = {"a": np.zeros((3, 2), np.float32), "b": np.ones(4, np.float32)}


class Trainee(Adder):
    """Adds `step`, once it may."""

    def __init__(self, cid: str, step: float, may_end: bool = True) -> None:
        super().__init__(cid, step)
        self.began, self.may_end = threading.Event(), threading.Event()
        if may_end:
            self.may_end.set()

    def fit(self, parameters, config):
        self.began.set()
        assert self.may_end.wait(60)
        return super().fit(parameters, config)


@pytest.fixture
def member(fleet, identity, join):
    """Let an admitted device join; return its thread."""

    def start(client, to=fleet):
        pair = admitted(fleet.gate, client.cid)
        return join(to, identity(client.cid, pair, fleet.gate.authority.pem), client)

    return start


class Round:
    """A round in a thread of its own."""

    def __init__(self, fleet: StreamFleet) -> None:
        self.recorder = Recorder(fleet)
        self.steps: list[Step] = []
        plan = Plan(1, lambda server_round: {}, lambda weights: {"loss": 1.0})

        def run() -> None:
            strategy = make_strategy("FedAvg")
            self.steps += synchronous(
                fleet, strategy, MODEL, plan, observe=self.recorder.events.append
            )

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def lines(self) -> list[str]:
        """Return what the operator has read of it."""
        return self.recorder.lines()

    def has_reply_of(self, cid: str) -> bool:
        """Return whether a device's update was decoded."""
        events = list(self.recorder.events)
        return any(isinstance(e, Result) and e.update and e.device.cid == cid for e in events)

    def end(self) -> Step:
        self.thread.join(30)
        assert self.steps, f"the round did not end: {self.lines()}"
        return self.steps[0]


def assert_only_the_honest_device_counts(step: Step) -> None:
    for name, array in MODEL.items():
        np.testing.assert_array_equal(step.weights[name], array + 1)
    assert [c.device.name for c in step.contributions] == ["device 0"]
    assert step.dropped == [("device 1", "it was revoked")]


def test_device_revoked_in_mid_round_is_cut_off_and_the_round_ends_with_the_others(
    fleet, member, recorder
):
    honest, bad = Trainee("0", 1), Trainee("1", 50, may_end=False)
    threads = [member(client) for client in (honest, bad)]
    recorder.wait_for(2)
    round_1 = Round(fleet)
    assert bad.began.wait(20)
    start = time.monotonic()
    fleet.gate.admissions.revoke("1")
    step = round_1.end()
    assert time.monotonic() - start < 3
    assert_only_the_honest_device_counts(step)
    recorder.until(lambda: list(fleet.devices) == ["0"])
    recorder.drain()
    lines = round_1.lines() + recorder.lines()
    assert lines.count("refused device 1: it was revoked") == 1
    assert lines.count("round 1: dropped device 1: it was revoked") == 1
    bad.may_end.set()
    threads[1].join(20)
    assert isinstance(threads[1].problem, Refused) and "was revoked" in str(threads[1].problem)


@pytest.mark.parametrize("watch_seconds", [0.1, 1000.0])
def test_reply_that_had_arrived_before_the_revocation_does_not_count(
    open_fleet, make_gate, identity, join, monkeypatch, watch_seconds
):
    monkeypatch.setattr(fleet_module, "WATCH_SECONDS", watch_seconds)
    fleet = open_fleet(gate=make_gate())
    slow, bad = Trainee("0", 1, may_end=False), Trainee("1", 50)
    for client in (slow, bad):
        pair = admitted(fleet.gate, client.cid)
        join(fleet, identity(client.cid, pair, fleet.gate.authority.pem), client)
    Recorder(fleet).wait_for(2)
    round_1 = Round(fleet)
    assert slow.began.wait(20) and bad.began.wait(20)
    wait_until(lambda: round_1.has_reply_of("1"))
    fleet.gate.admissions.revoke("1")
    if watch_seconds < 1:
        wait_until(lambda: "1" not in fleet.devices)
    slow.may_end.set()
    assert_only_the_honest_device_counts(round_1.end())


def test_device_revoked_while_it_hands_over_its_weights_does_not_count(
    fleet, member, recorder, monkeypatch
):
    halfway, go_on = threading.Event(), threading.Event()
    real = wire.encode_parameters_reply

    def slowly(weights, *which_bytes):
        if weights and weights[0].flat[0] == 50:
            halfway.set()
            assert go_on.wait(30)
        return real(weights, *which_bytes)

    monkeypatch.setattr(wire, "encode_parameters_reply", slowly)
    for client in (Trainee("0", 1), Trainee("1", 50)):
        member(client)
    recorder.wait_for(2)
    round_1 = Round(fleet)
    assert halfway.wait(20)
    fleet.gate.admissions.revoke("1")
    step = round_1.end()
    go_on.set()
    assert_only_the_honest_device_counts(step)


def test_last_device_revoked_ends_its_part_and_the_round_waits_for_another(fleet, member, recorder):
    bad = Trainee("1", 50, may_end=False)
    member(bad)
    recorder.wait_for(1)
    round_1 = Round(fleet)
    assert bad.began.wait(20)
    fleet.gate.admissions.revoke("1")
    wait_until(lambda: not fleet.devices)
    assert round_1.thread.is_alive()
    member(Trainee("0", 1))
    assert_only_the_honest_device_counts(round_1.end())
    bad.may_end.set()


def test_idle_device_is_cut_off_and_cannot_come_back(fleet, member, identity, recorder):
    thread = member(Adder("0"))
    recorder.wait_for(1)
    start = time.monotonic()
    fleet.gate.admissions.revoke("0")
    thread.join(20)
    assert time.monotonic() - start < 5
    assert "device 0 was revoked" in str(thread.problem) or "it was revoked" in str(thread.problem)
    for _ in range(2):
        with pytest.raises(Refused, match="device 0 was revoked"):
            serve(fleet.address, identity("0"))


def test_device_revoked_while_it_is_away_is_refused_and_may_join_again(
    fleet, identity, join, devices, recorder
):
    key_file = identity("0", admitted(fleet.gate, "0"), fleet.gate.authority.pem)
    devices("revoke", "0")
    with pytest.raises(Refused, match="device 0 was revoked"):
        serve(fleet.address, key_file)
    again = identity("0", token=token_for(fleet.gate))
    old_key = key_file.credentials
    join(fleet, again)
    recorder.wait_for(1)
    assert "the key of device 0 is not admitted here" in hello(fleet, old_key)
    assert hello(fleet, identity("0").credentials) == "ok"


def test_revocation_closes_the_open_tokens(fleet, identity, devices):
    admitted(fleet.gate, "0")
    token = token_for(fleet.gate)
    assert "open tokens are closed" in devices("revoke", "0")
    with pytest.raises(Refused, match="this token is not known here"):
        serve(fleet.address, identity("1", token=token))


def test_revocation_holds_at_two_servers_of_one_owner(open_fleet, make_gate, identity, join):
    one, other = (open_fleet(gate=make_gate()) for _ in range(2))
    owners = [Recorder(fleet) for fleet in (one, other)]
    token = token_for(one.gate)
    device = identity("0", token=token)
    thread = join(one, device)
    owners[0].wait_for(1)
    join(other, identity("0"))
    owners[1].wait_for(1)
    one.gate.admissions.revoke("0")
    for owner in owners:
        owner.until(lambda owner=owner: not owner.fleet.devices)
        assert owner.lines().count("refused device 0: it was revoked") == 1
    thread.join(20)
    assert not thread.is_alive()


# --- Copies ---


def test_copy_of_a_devices_card_is_refused_and_reported_to_the_owner(
    fleet, identity, join, recorder
):
    pair = admitted(fleet.gate, "0")
    first = identity("0", pair, fleet.gate.authority.pem)
    copy = identity("0", pair, fleet.gate.authority.pem, place="copy")
    join(fleet, first)
    (here,) = recorder.wait_for(1)
    with pytest.raises(Refused, match=r"connected already.* is one a copy of the other's card\?"):
        serve(fleet.address, copy)
    recorder.drain()
    assert fleet.devices["0"] is here
    assert any(
        "refused device 0" in line and "a copy of the other's card?" in line
        for line in recorder.lines()
    )


# --- When the list is in use, or away ---


@pytest.fixture
def lock_list():
    """Keep others from writing the list, as an owner does who looks at it with sqlite3."""

    @contextlib.contextmanager
    def lock(gate):
        with contextlib.closing(sqlite3.connect(gate.admissions.path, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            yield
            db.execute("ROLLBACK")

    return lock


def test_admitted_devices_get_in_while_the_list_is_locked(
    fleet, identity, lock_list, recorder, monkeypatch
):
    monkeypatch.setattr(admissions_module, "BUSY_SECONDS", 0.3)
    pairs = [admitted(fleet.gate, str(cid)) for cid in range(10, 20)]
    token = token_for(fleet.gate)
    with lock_list(fleet.gate):
        for cid, pair in enumerate(pairs, 10):
            assert hello(fleet, pair) == "ok", cid
        device = identity("10", pairs[0], fleet.gate.authority.pem)
        threading.Thread(target=serve, args=(fleet.address, device), daemon=True).start()
        recorder.wait_for(1)
        recorder.until(lambda: "database is locked" in str(recorder.lines()))
        with pytest.raises(
            FederationError, match="the server cannot use its list of devices for now, try later"
        ) as error:
            serve(fleet.address, identity("0", token=token), seconds=0.5)
        assert not isinstance(error.value, Refused)
    recorder.drain()
    assert sum("database is locked" in line for line in recorder.lines()) == 1
    device = identity("0", token=token)
    threading.Thread(target=serve, args=(fleet.address, device), daemon=True).start()
    recorder.wait_for(2)


def test_device_that_leaves_while_it_is_noted_is_not_left_registered(
    fleet, lock_list, recorder, monkeypatch
):
    monkeypatch.setattr(admissions_module, "BUSY_SECONDS", 1.0)
    pair = admitted(fleet.gate, "0")
    with lock_list(fleet.gate):
        with channel(fleet, pair) as opened:
            answers = iter(
                [wire.encode_properties_reply({"cid": "0", wire.VERSION: wire.PROTOCOL})]
            )
            stream = opened.stream_stream(transport.JOIN)(answers)
            next(stream)
            recorder.wait_for(1)
            stream.cancel()
        recorder.until(lambda: not fleet.devices)


def test_devices_revoke_waits_for_the_list_and_reports_if_it_stays_locked(
    fleet, devices, lock_list, monkeypatch
):
    admitted(fleet.gate, "0")
    with lock_list(fleet.gate):
        release = threading.Timer(1.0, lambda: None)
        release.start()
        output = []
        thread = threading.Thread(target=lambda: output.append(devices("revoke", "0")))
        thread.start()
        release.join()
        assert not output
    thread.join(20)
    assert "device 0 is revoked" in output[0]
    with (
        lock_list(fleet.gate),
        monkeypatch.context() as patch,
        pytest.raises(FederationError, match=r"cannot use '.*sqlite': database is locked"),
    ):
        patch.setattr(admissions_module, "BUSY_SECONDS", 0.1)
        fleet.gate.admissions.revoke("0")


def test_list_that_is_gone_lets_nobody_new_in_and_ends_nothing(fleet, member, recorder, tmp_path):
    member(Trainee("0", 1))
    recorder.wait_for(1)
    wait_until(lambda: fleet.gate.admissions.all()[0].last_seen)
    stranger = admitted(fleet.gate, "1")
    (tmp_path / "owner").rename(tmp_path / "away")
    assert hello(fleet, stranger).startswith("ABORTED: the server cannot use its list")
    round_1 = Round(fleet)
    np.testing.assert_array_equal(round_1.end().weights["a"], MODEL["a"] + 1)
    recorder.until(lambda: "cannot use" in str(round_1.lines() + recorder.lines()))
    assert list(fleet.devices) == ["0"]
    (tmp_path / "away").rename(tmp_path / "owner")
    assert hello(fleet, stranger) == "ok"
    fleet.gate.admissions.revoke("0")  # is seen still
    recorder.until(lambda: not fleet.devices)


def test_renewal_is_refused_to_the_revoked(fleet):
    pair = admitted(fleet.gate, "0")
    with channel(fleet, pair) as opened:
        assert next(opened.stream_stream("/plumbing.Fleet/Renew")(iter(()), timeout=10))
        fleet.gate.admissions.revoke("0")
        with pytest.raises(grpc.RpcError, match="device 0 was revoked"):
            next(opened.stream_stream("/plumbing.Fleet/Renew")(iter(()), timeout=10))
