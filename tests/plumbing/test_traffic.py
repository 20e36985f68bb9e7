"""Connections that send what nobody reads, over real sockets."""

import socket
import sys
import threading
import time

import numpy as np
import pytest

from plumbing.addresses import parse_address
from plumbing.stream.device import JOIN
from tests.devices import Adder, Recorder
from tests.http2 import END_HEADERS, HEADERS, SETTINGS, frame, header_block

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's counters are Linux's")

CONTINUATION = 9
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, b"")
CALL = header_block(
    {
        ":method": "POST",
        ":scheme": "http",
        ":path": JOIN,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
)
MORE = frame(CONTINUATION, 0, 3, header_block({"x-more": "y" * 100})) * 100
LINE = "refused 127.0.0.1: it sends far more than is read"


def is_reset(peer: socket.socket, kilobytes: int, seconds: float) -> bool:
    """Begin a call whose headers never end; return whether the server resets the connection."""
    peer.settimeout(seconds)
    try:
        peer.sendall(frame(HEADERS, 0, 3, CALL))
        for _ in range(kilobytes * 1000 // len(MORE)):
            peer.sendall(MORE)
        while peer.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    raise AssertionError("closed, but not reset")


@pytest.mark.parametrize(
    "address, joins, most_kilobytes",
    [("127.0.0.1:0", False, 100), ("127.0.0.1:0", True, 3000), ("[::]:0", True, 3000)],
)
def test_headers_without_end_are_hung_up_on(open_fleet, address, joins, most_kilobytes):
    fleet = open_fleet(server_address=address, model_bytes=1000)
    recorder = Recorder(fleet)
    _, port = parse_address(fleet.address)
    for kilobytes, reset in ((most_kilobytes, False), (2 * most_kilobytes, True)):
        with socket.create_connection(("127.0.0.1", port)) as peer:
            peer.sendall(PREFACE)
            if joins:
                peer.sendall(frame(HEADERS, END_HEADERS, 1, CALL))
                peer.settimeout(10)
                while b"seed" not in peer.recv(1 << 16):  # its settings: the stream stands
                    pass
            # Longer than from one look to the next.
            assert is_reset(peer, kilobytes, 20 if reset else 1.5) is reset
    # The first connection was none the worse for what it sent.
    recorder.until(lambda: [line for line in recorder.lines() if "more than" in line] == [LINE])


def test_device_that_sends_much_in_short_time_is_left_alone(open_fleet):
    model = {"w": np.zeros(200_000, np.float32)}
    fleet = open_fleet(model_bytes=model["w"].nbytes)
    recorder = Recorder(fleet)
    threading.Thread(target=Adder("0").serve, args=[fleet.address], daemon=True).start()
    recorder.wait_for(1)
    began, rounds = time.monotonic(), 0
    while time.monotonic() < began + 1.5:
        (result,) = recorder.exchange(model, str(rounds := rounds + 1))
        assert result.update
    assert rounds * model["w"].nbytes > 10_000_000, rounds
    fleet.close(run_is_over=True)
