"""Floods of HTTP/2 frames that cost the sender little: a device trains meanwhile.

Bounded in number and time, towards this machine alone.
"""

import contextlib
import select
import socket
import threading
import time

import psutil
import pytest

from plumbing.addresses import parse_address
from tests.devices import Adder, Recorder, small_model
from tests.http2 import END_HEADERS, HEADERS, SETTINGS, frame, header_block

SECONDS = 3.0
MOST_FRAMES = 200_000
RST_STREAM, PING = 3, 6
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, b"")


def headers() -> bytes:
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/flwr.proto.FlowerService/Join",
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    return header_block(fields)


def rapid_resets(number: int) -> bytes:
    stream = 2 * number + 1
    cancel = (8).to_bytes(4, "big")
    return frame(HEADERS, END_HEADERS, stream, headers()) + frame(RST_STREAM, 0, stream, cancel)


FLOODS = {
    "rapid reset": rapid_resets,
    "settings": lambda number: frame(SETTINGS, 0, 0, b"\0\x04" + (65_535).to_bytes(4, "big")),
    "pings": lambda number: frame(PING, 0, 0, number.to_bytes(8, "big")),
}


def flood(address: str, make, end: float, sent: list[int]) -> None:
    """Send frames until the time is over; connect again when the server hangs up."""
    while time.monotonic() < end and sum(sent) < MOST_FRAMES:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(parse_address(address), timeout=0.5) as peer,
        ):
            peer.sendall(PREFACE)
            number = 0
            while time.monotonic() < end and sum(sent) < MOST_FRAMES:
                peer.sendall(b"".join(make(number + i) for i in range(50)))
                number += 50
                sent.append(50)
                while select.select([peer], [], [], 0)[0]:
                    if not peer.recv(1 << 16):
                        raise ConnectionError


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", FLOODS)
def test_device_trains_amid_a_flood_of_frames_and_memory_stays(open_fleet, record_fault, kind):
    fleet = open_fleet()
    recorder = Recorder(fleet)
    threading.Thread(target=Adder("0").serve, args=(fleet.address,), daemon=True).start()
    recorder.wait_for(1)
    me = psutil.Process()
    recorder.exchange(small_model(), "warm")
    before, cpu = me.memory_info().rss, sum(me.cpu_times()[:2])
    end, sent = time.monotonic() + SECONDS, []
    threads = [
        threading.Thread(target=flood, args=(fleet.address, FLOODS[kind], end, sent))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    longest, rounds = 0.0, 0
    while time.monotonic() < end:
        start = time.monotonic()
        (result,) = recorder.exchange(small_model(), f"{rounds}")
        assert result.update is not None, result.problem
        longest, rounds = max(longest, time.monotonic() - start), rounds + 1
    for thread in threads:
        thread.join()
    grown = (me.memory_info().rss - before) / 1e6
    print(
        f"{kind}: {sum(sent)} frames in {SECONDS:g} s, {rounds} rounds meanwhile, the longest "
        f"{longest:.2f} s; {sum(me.cpu_times()[:2]) - cpu:.1f} s of processor time with the "
        f"flood's own, {grown:.0f} MB more"
    )
    assert sum(sent) > 1000
    assert longest < 5
    assert grown < 100
    record_fault(
        f"a flood of HTTP/2 frames: {kind}",
        f"{sum(sent):,} frames in {SECONDS:g} s from two connections on the same machine",
        f"a device trains {rounds} rounds meanwhile, the longest in {longest:.1f} s; "
        f"memory {grown:+.0f} MB",
    )
