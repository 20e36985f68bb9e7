"""Every method of a secured server is behind the gate, also one that is added tomorrow."""

import asyncio
import ssl

import grpc
import pytest

from plumbing.security import keys
from plumbing.security.gate import Peer
from plumbing.security.identity import ENROL, RENEW
from plumbing.stream import device as transport
from tests.devices import Recorder
from tests.http2 import call
from tests.security.conftest import admitted, channel, rogue

TOMORROW = "/plumbing.Fleet/Tomorrow"


@pytest.fixture
def registered(monkeypatch) -> list[str]:
    """The methods that a fleet registers, and one more beside its own."""
    names: list[str] = []
    real = grpc.method_handlers_generic_handler

    async def tomorrow(messages, context, peer) -> None:
        await context.write(f"hello, {peer.cid}".encode())

    def record(service, handlers):
        if service == "plumbing.Fleet":
            added = grpc.stream_stream_rpc_method_handler(tomorrow)
            handlers = {**handlers, "Tomorrow": added}
        names.extend(f"/{service}/{name}" for name in handlers)
        return real(service, handlers)

    monkeypatch.setattr(grpc, "method_handlers_generic_handler", record)
    return names


def answer(fleet, pair, method: str) -> str:
    """Return what a method answers to a caller that sends nothing: "ok", or why not."""
    with channel(fleet, pair) as opened:
        stream = opened.stream_stream(method)(iter(()), timeout=10)
        try:
            next(stream)
            return "ok"
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
        finally:
            stream.cancel()


def test_every_registered_method_refuses_whoever_is_not_admitted(registered, open_fleet, make_gate):
    fleet = open_fleet()
    recorder = Recorder(fleet)
    assert {transport.JOIN, transport.HELLO, ENROL, RENEW, TOMORROW} <= set(registered)
    revoked = admitted(fleet.gate, "1")
    fleet.gate.admissions.revoke("1")
    strangers = {
        "nobody": (keys.nobody(), "UNAUTHENTICATED: join with --join=TOKEN first"),
        "foreign": (admitted(make_gate("eve"), "0"), "UNAVAILABLE: "),
        "revoked": (revoked, "PERMISSION_DENIED: device 1 was revoked"),
        "never admitted": (
            rogue("2", fleet.gate.authority),
            "PERMISSION_DENIED: the key of device 2 is not admitted here",
        ),
    }
    for method in registered:
        for who, (pair, refusal) in strangers.items():
            if method == ENROL and who != "foreign":
                refusal = "PERMISSION_DENIED: this is no enrolment"
            if method == transport.ANNOUNCE and who != "foreign":
                refusal = "ok"  # it says something of a connection that has joined, or nothing
            assert answer(fleet, pair, method).startswith(refusal), (method, who)
    recorder.drain()
    assert not fleet.devices


def test_admitted_device_is_known_to_the_handler(registered, open_fleet):
    fleet = open_fleet()
    pair = admitted(fleet.gate, "7")
    for method in set(registered) - {ENROL}:
        let_in = ("ok", "INVALID_ARGUMENT: this asks for no file")  # Fetch wants more than nothing
        assert answer(fleet, pair, method) in let_in, method
    with channel(fleet, pair) as opened:
        assert next(opened.stream_stream(TOMORROW)(iter(()))) == b"hello, 7"


def test_stock_client_has_no_key_that_could_be_renewed(open_fleet):
    fleet = open_fleet(stock_address="127.0.0.1:0")
    tls = grpc.ssl_channel_credentials(fleet.gate.authority.pem)
    with grpc.secure_channel(fleet.stock_address, tls) as opened:
        assert next(opened.stream_stream(transport.HELLO)(iter(()), timeout=10))
        with pytest.raises(grpc.RpcError) as error:
            next(opened.stream_stream(RENEW)(iter(()), timeout=10))
    assert error.value.details() == "there is no key to certify"


# --- TLS sessions that are resumed, which shows no certificate again ---


@pytest.fixture
def device_tls(fleet, tmp_path) -> ssl.SSLContext:
    """TLS as device 0 speaks it."""
    path = tmp_path / "device.pem"
    path.write_bytes(b"".join(admitted(fleet.gate)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(path)
    return context


def test_resumed_session_is_let_in_until_the_device_is_revoked(fleet, device_tls):
    _, first = call(fleet.address, device_tls, transport.HELLO)
    reused, answered = call(fleet.address, device_tls, transport.HELLO, first.session)
    assert reused and b"keepalive_seconds" in answered.data
    fleet.gate.admissions.revoke("0")
    reused, answered = call(fleet.address, device_tls, transport.HELLO, first.session)
    assert reused  # TLS itself knows nothing of it
    assert b"device 0 was revoked" in answered.data and b"keepalive_seconds" not in answered.data


def test_session_of_the_open_address_opens_nothing_at_the_other(open_fleet):
    fleet = open_fleet(stock_address="127.0.0.1:0")
    keyless = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    keyless.check_hostname, keyless.verify_mode = False, ssl.CERT_NONE
    keyless.set_alpn_protocols(["h2"])
    _, first = call(fleet.stock_address, keyless, transport.HELLO)
    assert b"keepalive_seconds" in first.data and first.session.has_ticket
    reused, answered = call(fleet.address, keyless, transport.HELLO, first.session)
    assert not reused and answered.data == b""


class Keyless:
    """A call on a connection that shows no certificate."""

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    async def abort(self, code: grpc.StatusCode, reason: str) -> None:
        raise PermissionError(code, reason)


def test_caller_without_certificate_is_let_in_only_where_an_address_is_open(make_gate):
    """TLS demands a certificate; if it once did not, nobody would be in."""
    gate = make_gate()
    gate.credentials()
    with pytest.raises(PermissionError, match="a key is needed here"):
        asyncio.run(gate.check(Keyless()))
    gate.credentials(demand_key=False)
    assert asyncio.run(gate.check(Keyless())) == Peer()
