"""HTTP/2 that costs the sender little: floods of frames at a server that trains, a gzip bomb.

Bounded in number and time, towards this machine alone.
"""

import contextlib
import gzip
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from plumbing.addresses import parse_address
from tests.http2 import DATA, END_HEADERS, HEADERS, SETTINGS, frame, header_block

SECONDS = 3.0
CONNECTIONS = 2
MOST_FRAMES = 1_000_000
RST_STREAM, PING = 3, 6
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, b"")
FIELDS = {
    ":method": "POST",
    ":scheme": "http",
    ":path": "/flwr.proto.FlowerService/Join",
    ":authority": "localhost",
    "te": "trailers",
    "content-type": "application/grpc",
}
CALL = header_block(FIELDS)


def opened_streams(number: int) -> bytes:
    return frame(HEADERS, END_HEADERS, 2 * number + 1, CALL)


def rapid_resets(number: int) -> bytes:
    cancel = (8).to_bytes(4, "big")
    return opened_streams(number) + frame(RST_STREAM, 0, 2 * number + 1, cancel)


FLOODS = {
    "rapid resets": rapid_resets,
    "streams that stay open": opened_streams,
    "settings": lambda number: frame(SETTINGS, 0, 0, b"\0\x04" + (65_535).to_bytes(4, "big")),
    "pings": lambda number: frame(PING, 0, 0, number.to_bytes(8, "big")),
}


class Flood:
    """Sends frames until the time is over; connects again when the server hangs up."""

    def __init__(self, address: str, make: Callable[[int], bytes]) -> None:
        self.address = address
        self.make = make
        self.frames = self.connections = 0
        self.end = time.monotonic() + SECONDS
        self.threads = [threading.Thread(target=self.run) for _ in range(CONNECTIONS)]
        for thread in self.threads:
            thread.start()

    def is_on(self) -> bool:
        return time.monotonic() < self.end and self.frames < MOST_FRAMES

    def run(self) -> None:
        while self.is_on():
            with (
                contextlib.suppress(OSError),
                socket.create_connection(parse_address(self.address), timeout=0.5) as peer,
            ):
                self.connections += 1
                peer.sendall(PREFACE)
                number = 0
                while self.is_on():
                    peer.sendall(b"".join(self.make(number + i) for i in range(50)))
                    number += 50
                    self.frames += 50
                    while select.select([peer], [], [], 0)[0]:
                        if not peer.recv(1 << 16):
                            raise ConnectionError


def processor_seconds(process: psutil.Process) -> float:
    return sum(process.cpu_times()[:2])


def count(metrics: Path) -> int:
    return metrics.read_bytes().count(b"\n")


@pytest.mark.timeout(240)
def test_device_trains_amid_floods_of_frames_and_memory_stays(
    start_server, start_device, record_fault, tmp_path
):
    server, address = start_server(rounds="100000", min_num_clients="1", min_sample_size="1")
    start_device(address, 0, "--add=0")
    server.wait_for("^round 5/")
    metrics, process = tmp_path / "run/metrics.jsonl", psutil.Process(server.popen.pid)
    before = process.memory_info().rss
    for kind, make in FLOODS.items():
        done, used, began = count(metrics), processor_seconds(process), time.monotonic()
        flood = Flood(address, make)
        for thread in flood.threads:
            thread.join()
        seconds = time.monotonic() - began
        rounds, cpu = count(metrics) - done, processor_seconds(process) - used
        grown = (process.memory_info().rss - before) / 1e6
        shown = (
            f"{flood.frames:,} frames in {seconds:.1f} s on {flood.connections:,} connections, "
            f"{CONNECTIONS} at a time"
        )
        found = (
            f"a device trains {rounds} rounds meanwhile; the server uses {cpu / seconds:.2f} "
            f"cores, memory {grown:+.0f} MB"
        )
        print(f"{kind}: {shown}; {found}")
        assert flood.frames > 1000
        assert rounds > 0
        assert grown < 60
        record_fault(f"a flood of HTTP/2 frames: {kind}", shown, found)


def test_gzip_that_unpacks_beyond_the_limit_is_refused(open_fleet, record_fault):
    fleet = open_fleet(model_bytes=1000)  # the limit is 1 MB
    packed = gzip.compress(bytes(50_000_000))
    message = b"\1" + len(packed).to_bytes(4, "big") + packed
    call = header_block({**FIELDS, "grpc-encoding": "gzip"})
    received = b""
    with socket.create_connection(parse_address(fleet.address), timeout=10) as peer:
        peer.sendall(PREFACE + frame(HEADERS, END_HEADERS, 1, call))
        for start in range(0, len(message), 16_000):
            peer.sendall(frame(DATA, 0, 1, message[start : start + 16_000]))
        while b"grpc-message" not in received and (more := peer.recv(1 << 16)):
            received += more
    assert b"Decompressed message larger than max" in received
    record_fault(
        "a gzip bomb as a greeting",
        f"{len(packed):,} bytes that unpack to 50 MB, at a limit of 1 MB",
        "refused at the limit",
    )
