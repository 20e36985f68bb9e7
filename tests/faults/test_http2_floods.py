"""HTTP/2 that costs the sender little: floods of frames at a server that trains, a gzip bomb.

Bounded in number and time, towards this machine alone.
"""

import base64
import contextlib
import gzip
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from plumbing.addresses import parse_address
from plumbing.security import keys
from plumbing.security.admissions import Admissions
from plumbing.security.owner import admit
from plumbing.stream.device import ANNOUNCE, PROGRESS
from plumbing.stream.wire import PROGRESS_KEY, encode_progress
from tests.conftest import LONG
from tests.faults.conftest import token_of
from tests.http2 import DATA, END_HEADERS, END_STREAM, HEADERS, SETTINGS, frame, header_block

SECONDS = 3.0
CALL_SECONDS = 3.0 if LONG else 0.7
CONNECTIONS = 2
MOST_FRAMES = 1_000_000
RST_STREAM, PING, WINDOW_UPDATE, CONTINUATION = 3, 6, 8, 9
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


def ends(data: bytes) -> tuple[int, bytes]:
    """Return how many calls end in these frames, and the beginning of the next frame."""
    count = place = 0
    while len(data) >= place + 9 + (size := int.from_bytes(data[place : place + 3], "big")):
        kind, flags = data[place + 3 : place + 5]
        count += kind == RST_STREAM or (kind == HEADERS and bool(flags & END_STREAM))
        place += 9 + size
    return count, data[place:]


class Flood:
    """Sends frames until it is stopped; connects again when the server hangs up."""

    def __init__(
        self,
        address: str,
        make: Callable[[int], bytes],
        tls: ssl.SSLContext | None = None,
        awaits: bool = False,
    ) -> None:
        self.address = address
        self.make = make
        self.tls = tls
        self.awaits = awaits  # the answers to each 50 before it sends the next
        self.frames = self.connections = 0
        self.stopped = threading.Event()
        self.threads = [threading.Thread(target=self.run) for _ in range(CONNECTIONS)]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join()

    def is_on(self) -> bool:
        return not self.stopped.is_set() and self.frames < MOST_FRAMES

    def connect(self) -> socket.socket:
        peer = socket.create_connection(parse_address(self.address), timeout=0.5)
        if self.tls:
            peer.settimeout(5)
            peer = self.tls.wrap_socket(peer)
        self.connections += 1
        return peer

    def run(self) -> None:
        while self.is_on():
            with contextlib.suppress(OSError), self.connect() as peer:
                peer.sendall(PREFACE)
                number, answers, unread = 0, 0, b""
                while self.is_on():
                    peer.sendall(b"".join(self.make(number + i) for i in range(50)))
                    number += 50
                    self.frames += 50
                    while (self.awaits and answers < number) or self.has_data(peer):
                        if not (data := peer.recv(1 << 16)):
                            raise ConnectionError
                        ended, unread = ends(unread + data)
                        answers += ended

    @staticmethod
    def has_data(peer: socket.socket) -> bool:
        if isinstance(peer, ssl.SSLSocket) and peer.pending():
            return True
        return bool(select.select([peer], [], [], 0)[0])


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
        shown, found = flood_of(Flood(address, make), process, metrics, before, SECONDS)
        print(f"{kind}: {shown}; {found}")
        record_fault(f"a flood of HTTP/2 frames: {kind}", shown, found)


def flood_of(
    flood: Flood,
    process: psutil.Process,
    metrics: Path,
    before: int,
    seconds: float,
    most_megabytes: float = 60,
) -> tuple[str, str]:
    """Let a flood go on until a round is done meanwhile; return what was sent, what happened."""
    done, used, began = count(metrics), processor_seconds(process), time.monotonic()
    time.sleep(seconds)
    while count(metrics) == done and time.monotonic() < began + 20:
        time.sleep(0.1)
    rounds, cpu = count(metrics) - done, processor_seconds(process) - used
    seconds = time.monotonic() - began
    flood.stop()
    grown = (process.memory_info().rss - before) / 1e6
    shown = (
        f"{flood.frames:,} in {seconds:.1f} s on {flood.connections:,} connections, "
        f"{CONNECTIONS} at a time"
    )
    found = (
        f"a device trains {rounds / seconds:.1f} rounds a second meanwhile; the server uses "
        f"{cpu / seconds:.2f} cores, memory {grown:+.0f} MB"
    )
    assert flood.frames >= (100 if flood.awaits else 1000), shown
    assert rounds > 0, found
    assert grown < most_megabytes, f"{shown}; {found}"
    return shown, found


# Frames that a peer with TLS can send, and calls, whose answers it awaits.
BLOCK = header_block({"x-more": "y" * 100})
REPORT = base64.b64encode(encode_progress({"cid": "0", "step": 1, "steps": 2}))


def endless_headers(number: int) -> bytes:
    """The beginning of a call, and headers that never end."""
    return frame(CONTINUATION, 0, 1, BLOCK) if number else frame(HEADERS, 0, 1, CALL)


def calls_of(method: str, more: dict[str, str] | None = None) -> Callable[[int], bytes]:
    block = header_block({**FIELDS, ":scheme": "https", ":path": method, **(more or {})})
    room = frame(WINDOW_UPDATE, 0, 0, (250).to_bytes(4, "big"))  # for the answers to 50
    return lambda number: (
        frame(HEADERS, END_HEADERS | END_STREAM, 2 * number + 1, block)
        + (b"" if number % 50 else room)
    )


TLS_FLOODS = {
    "headers that never end": endless_headers,
    "streams that stay open": opened_streams,
    "calls of Announce": calls_of(ANNOUNCE),
    "calls of Progress": calls_of(PROGRESS, {PROGRESS_KEY: REPORT.decode()}),
}


@pytest.mark.timeout(240)
def test_device_trains_amid_floods_of_headers_and_calls_over_tls(
    start_server, start_device, record_fault, tmp_path
):
    owner = tmp_path / "owner"
    list(admit(keys.Authority(owner), Admissions(owner), ["flood"], tmp_path))
    nobody = tmp_path / "nobody.pem"
    nobody.write_bytes(b"".join(keys.nobody()))
    server, address = start_server(
        "--secure",
        f"--keys={owner}",
        rounds="100000",
        min_num_clients="1",
        min_sample_size="1",
    )
    device_keys = ("--keys", tmp_path / "keys")
    start_device(address, 0, "--add=0", "--join", token_of(server), *device_keys)
    server.wait_for("^round 5/")
    metrics, process = tmp_path / "run/metrics.jsonl", psutil.Process(server.popen.pid)
    before = process.memory_info().rss
    peers = {"without a key": nobody, "that is admitted": tmp_path / "device-flood.pem"}
    for who, pair in peers.items():
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
        tls.set_alpn_protocols(["h2"])
        tls.load_cert_chain(pair)
        for kind, make in TLS_FLOODS.items():
            flood = Flood(address, make, tls, awaits=kind.startswith("calls"))
            shown, found = flood_of(flood, process, metrics, before, CALL_SECONDS, 200)
            print(f"a peer {who}, {kind}: {shown}; {found}")
            record_fault(f"a peer with TLS {who} sends {kind}", shown, found)


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
