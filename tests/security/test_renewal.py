"""Certificates that end, names that change, clocks that are wrong."""

import contextlib
import datetime
import logging
import socket
import sqlite3
import ssl
import threading
import time
from types import SimpleNamespace

import pytest
from cryptography import x509

from federated.errors import FederationError, Refused
from plumbing.security import admissions as admissions_module
from plumbing.security import gate as gate_module
from plumbing.security import identity as identity_module
from plumbing.security import keys
from tests.devices import Adder, Recorder, small_model
from tests.security.conftest import (
    HOUR,
    admitted,
    hello,
    serve,
    token_for,
    wait_until,
)

SECOND = datetime.timedelta(seconds=1)


def shown_by(fleet) -> x509.Certificate:
    """Return the certificate that a server shows."""
    host, port = fleet.address.rsplit(":", 1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection((host, int(port)), 10) as s, context.wrap_socket(s) as tls:
        return x509.load_der_x509_certificate(tls.getpeercert(binary_form=True))


def ask_all(recorder: Recorder, job_id: str = "1") -> int:
    """Run a round; return how many good replies came."""
    return sum(bool(result.update) for result in recorder.exchange(small_model(), job_id))


# --- The device's ---


def test_device_renews_its_certificate_by_itself(fleet, identity, recorder, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    token = token_for(fleet.gate, uses=1)
    with monkeypatch.context() as patch:
        patch.setattr(keys, "DEVICE_LIFE", HOUR)  # after a day of slack: it is due at once
        identity("0", token=token).prepare(fleet.address, 5)
    path = identity("0").path
    old_key, old, _ = keys.read_key_file(path)
    assert keys.is_due(old)

    client = Adder("0")
    device = identity("0")
    threading.Thread(target=serve, args=(fleet.address, device, client), daemon=True).start()
    recorder.wait_for(1)
    assert ask_all(recorder) == 1
    key, new, _ = keys.read_key_file(path)
    assert new.not_valid_after_utc > old.not_valid_after_utc + 300 * keys.DAY
    assert key.private_numbers() == old_key.private_numbers()
    assert path.stat().st_mode & 0o777 == 0o600
    assert caplog.text.count("certificate renewed, until") == 1
    assert hello(fleet, identity("0").credentials) == "ok"
    # A container that starts again with the same command line, its token long expired.
    assert identity("0", token=token).token is None


def test_device_renewed_while_it_trains_outlives_its_old_certificate(fleet, identity, recorder):
    pair = admitted(fleet.gate, "0", begin=-HOUR, end=2 * SECOND)
    device = identity("0", pair, fleet.gate.authority.pem)
    began, may_end = threading.Event(), threading.Event()

    class Slow(Adder):
        def fit(self, parameters, config):
            began.set()
            assert may_end.wait(30)
            return super().fit(parameters, config)

    threading.Thread(target=serve, args=(fleet.address, device, Slow("0")), daemon=True).start()
    recorder.wait_for(1)
    replies = []
    thread = threading.Thread(target=lambda: replies.append(ask_all(recorder)))
    thread.start()
    assert began.wait(20)
    old = x509.load_pem_x509_certificate(pair[1])
    wait_until(lambda: keys.now() > old.not_valid_after_utc + SECOND)
    may_end.set()
    thread.join(20)
    assert replies == [1]
    recorder.drain()
    (line,) = recorder.lines()
    assert line.startswith("device 0 joined: ")
    assert hello(fleet, pair) != "ok"
    assert hello(fleet, identity("0").credentials) == "ok"


@pytest.mark.parametrize("trouble", ["full disk", "a server that does not answer"])
def test_renewal_that_fails_ends_nothing_and_is_not_tried_at_each_message(
    fleet, identity, join, recorder, monkeypatch, caplog, trouble
):
    caplog.set_level(logging.INFO)
    pair = admitted(fleet.gate, "0", begin=-HOUR, end=60 * SECOND)
    device = identity("0", pair, fleet.gate.authority.pem)
    if trouble == "full disk":

        def full(path, data):
            raise FederationError(f"cannot write '{path}': No space left on device")

        monkeypatch.setattr(keys, "write_private", full)
    else:
        monkeypatch.setattr(identity_module, "RENEW", "/plumbing.Fleet/Nothing")
    join(fleet, device)
    recorder.wait_for(1)
    assert [ask_all(recorder, job_id) for job_id in "123"] == [1, 1, 1]
    assert caplog.text.count("certificate not renewed yet (") == 1
    assert ("No space left" in caplog.text) == (trouble == "full disk")


def test_server_that_sends_another_key_back_is_not_believed(fleet, identity, join, monkeypatch):
    """A certificate for another key, cid or by another authority would lock the device out."""
    eve = keys.new_key().public_key()
    real = fleet.gate.authority.sign_device
    for wrong in (
        lambda cid, key: real(cid, eve),
        lambda cid, key: real("other", key),
        lambda cid, key: b"junk",
        lambda cid, key: b"",
    ):
        monkeypatch.setattr(fleet.gate.authority, "sign_device", wrong)
        device = identity("0", token=token_for(fleet.gate))
        with pytest.raises(FederationError, match="the server sent no usable certificate"):
            device.prepare(fleet.address, 5)
        assert not device.path.exists()
        with contextlib.closing(sqlite3.connect(fleet.gate.admissions.path)) as db, db:
            db.execute("DELETE FROM devices")


# --- The server's ---


def test_server_certificate_is_renewed_when_a_name_is_added(
    open_fleet, make_gate, identity, join, monkeypatch
):
    monkeypatch.setattr(gate_module, "LOOK_SECONDS", 0.0)
    names = ["127.0.0.1"]
    gate = make_gate()
    gate.names = lambda: list(names)
    fleet = open_fleet(gate=gate)
    port = fleet.address.rpartition(":")[2]
    device = identity("0", admitted(gate), gate.authority.pem)
    join(fleet, device)
    recorder = Recorder(fleet)
    recorder.wait_for(1)
    other = identity("1", admitted(gate, "1"), gate.authority.pem)
    with pytest.raises(Refused, match=r"certificate is not for localhost but for 127.0.0.1"):
        serve(f"localhost:{port}", other)
    first = shown_by(fleet)
    assert shown_by(fleet) == first
    names.append("localhost")
    shown_by(fleet)  # is asked for while the old one is in use
    threading.Thread(target=serve, args=(f"localhost:{port}", other), daemon=True).start()
    recorder.wait_for(2)
    assert ask_all(recorder) == 2  # the first is connected still
    names.remove("127.0.0.1")  # a laptop that is carried elsewhere, and back
    assert hello(fleet, device.credentials) == "ok"


def test_server_certificate_is_renewed_before_it_ends(open_fleet, make_gate, monkeypatch):
    gate = make_gate()
    with monkeypatch.context() as patch:
        patch.setattr(keys, "SERVER_LIFE", HOUR)  # after a day of slack
        fleet = open_fleet(gate=gate)
    old = shown_by(fleet)
    assert keys.is_due(old)
    monkeypatch.setattr(gate_module, "LOOK_SECONDS", 0.0)
    new = shown_by(fleet)
    assert new.not_valid_after_utc > keys.now() + 50 * keys.DAY
    assert keys.key_hash(new) != keys.key_hash(old)
    assert hello(fleet, admitted(gate)) == "ok"


def test_names_that_cannot_be_looked_up_leave_the_certificate_as_it_is(
    open_fleet, make_gate, monkeypatch, caplog
):
    monkeypatch.setattr(gate_module, "LOOK_SECONDS", 0.0)
    gate = make_gate()
    fleet = open_fleet(gate=gate)

    def no_network():
        raise FederationError("cannot find the host 'laptop.example'")

    gate.names = no_network
    pair = admitted(gate)
    assert [hello(fleet, pair) for _ in range(3)] == ["ok"] * 3
    assert not caplog.records


# --- Clocks ---


def test_device_whose_clock_is_behind_waits_for_the_time_to_be_set(fleet, identity):
    pair = admitted(fleet.gate, begin=HOUR, end=9 * HOUR)
    with pytest.raises(
        FederationError, match=r"this device's clock shows .* waiting for the time to be set"
    ) as error:
        serve(fleet.address, identity("0", pair, fleet.gate.authority.pem), seconds=0.5)
    assert not isinstance(error.value, Refused)


def test_device_whose_certificate_has_ended_reports_that_and_its_clock(fleet, identity):
    pair = admitted(fleet.gate, begin=-9 * HOUR, end=-HOUR)
    with pytest.raises(
        Refused,
        match=r"certificate of device 0 ended on .* clock shows .* revoke 0\), and join again",
    ):
        serve(fleet.address, identity("0", pair, fleet.gate.authority.pem))


@pytest.mark.parametrize("known", [True, False], ids=["known", "new"])
def test_device_behind_the_servers_certificate_waits(
    open_fleet, make_gate, identity, monkeypatch, known
):
    """As a Pi without a clock, at its first start, to which the server is of the future."""
    monkeypatch.setattr(gate_module, "LOOK_SECONDS", 0.0)
    gate = make_gate()
    device = identity(
        "0",
        admitted(gate) if known else None,
        gate.authority.pem,
        None if known else token_for(gate),
    )
    with monkeypatch.context() as patch:
        patch.setattr(keys, "is_due", lambda certificate: False)
        patch.setattr(keys, "CLOCK_SLACK", -HOUR)
        fleet = open_fleet(gate=gate)
        with pytest.raises(FederationError) as error:
            serve(fleet.address, device, seconds=0.5)
        assert "this device's clock shows" in str(error.value)
        assert "the server's certificate is for" in str(error.value)
        assert not isinstance(error.value, Refused)
    # As after the server's own clock was set back: it makes a new certificate.
    threading.Thread(target=serve, args=(fleet.address, device), daemon=True).start()
    Recorder(fleet).wait_for(1, seconds=30)


def test_authority_of_another_time_is_reported(make_gate, monkeypatch):
    make_gate()
    for years in (-1, 11):
        with monkeypatch.context() as patch:
            real = keys.now()
            patch.setattr(keys, "now", lambda real=real, y=years: real + y * 365 * keys.DAY)
            with pytest.raises(FederationError, match=r"this machine's clock shows .*; set the"):
                make_gate()


def test_clock_that_jumps_ahead_closes_tokens_and_back_opens_no_used_one(
    fleet, identity, monkeypatch
):
    token, used = token_for(fleet.gate), token_for(fleet.gate, uses=1)
    identity("0", token=used).prepare(fleet.address, 5)

    def clock(hours):
        return SimpleNamespace(time=lambda: time.time() + hours * 3600)

    with monkeypatch.context() as patch:
        patch.setattr(admissions_module, "time", clock(25))
        with pytest.raises(Exception, match="this token has expired"):
            identity("1", token=token).prepare(fleet.address, 5)
        token_for(fleet.gate)  # throws away what has long expired
    with monkeypatch.context() as patch:
        patch.setattr(admissions_module, "time", clock(-25))
        with pytest.raises(Exception, match="this token is used up"):
            identity("2", token=used).prepare(fleet.address, 5)
    assert [d.cid for d in fleet.gate.admissions.all()] == ["0"]
