"""Peers that open a connection and then send nothing: they are hung up on, and hold nobody up."""

import socket
import ssl
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import pytest

from plumbing.addresses import parse_address
from plumbing.stream import device as transport
from plumbing.stream import fleet as fleet_module
from plumbing.stream import wire
from tests.conftest import LONG
from tests.devices import Recorder
from tests.security.conftest import admitted, channel, hello, token_for, wait_until

HALF_OPEN = 2000 if LONG else 300


def open_files() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


def opening() -> bytes:
    """Return the first message of TLS, as any client sends it."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


def read_to_the_end(peer: socket.socket) -> None:
    while peer.recv(1 << 16):
        pass


@pytest.mark.parametrize("sent", ["nothing", "half the opening", "the opening", "and a key"])
def test_half_open_handshakes_keep_nobody_out_and_end(
    open_fleet, identity, monkeypatch, tmp_path, sent
):
    monkeypatch.setattr(fleet_module, "HANDSHAKE_SECONDS", 2)
    fleet = open_fleet()
    pair = admitted(fleet.gate)
    hello(fleet, pair)
    before = open_files()
    (tmp_path / "device.pem").write_bytes(b"".join(pair))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(tmp_path / "device.pem")
    words = {"half the opening": opening()[:100], "the opening": opening()}.get(sent, b"")
    with ExitStack() as stack:
        peers = []
        for _ in range(50 if sent == "and a key" else HALF_OPEN):
            peer = socket.create_connection(parse_address(fleet.address), timeout=30)
            if sent == "and a key":  # TLS stands, but HTTP/2 does not come
                peer = context.wrap_socket(peer)
            peers.append(stack.enter_context(peer))
            if words:
                peer.sendall(words)
        start = time.monotonic()
        assert hello(fleet, pair) == "ok"
        identity("1", token=token_for(fleet.gate)).prepare(fleet.address, 5)
        assert time.monotonic() - start < 5
        for peer in peers:  # hung up on, one and all
            with suppress(ConnectionResetError, ssl.SSLError):
                read_to_the_end(peer)
    wait_until(lambda: open_files() <= before + 5)


def test_connection_of_a_stranger_that_asks_nothing_is_closed(open_fleet, monkeypatch):
    monkeypatch.setattr(fleet_module, "IDLE_SECONDS", 1)
    fleet = open_fleet()
    device = admitted(fleet.gate)
    with channel(fleet) as stranger, channel(fleet, device) as serving:
        grpc.channel_ready_future(stranger).result(10)
        states = []
        stranger.subscribe(states.append)
        stream = serving.stream_stream(transport.JOIN)(
            iter([wire.encode_properties_reply({"cid": "0", wire.VERSION: wire.PROTOCOL})])
        )
        next(stream)
        recorder = Recorder(fleet)
        recorder.wait_for(1, seconds=10)
        wait_until(lambda: grpc.ChannelConnectivity.IDLE in states)
        # A device that waits for its turn is not idle.
        time.sleep(1.5)
        recorder.drain()
        assert list(fleet.devices) == ["0"]
        stream.cancel()
