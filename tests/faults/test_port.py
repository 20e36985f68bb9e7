"""Whatever knocks at the port: real devices still join at once, and nothing is left behind.

Each visitor comes to one real server.py. Before and after them its memory, threads and open
files are read from /proc; in their midst a device joins, and the seconds are counted.
LONG=1 lets a client join and leave 1,000 times instead of 150.
"""

import contextlib
import json
import os
import re
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest

from plumbing.stream import wire
from plumbing.stream.device import JOIN
from tests.conftest import LONG
from tests.devices import greeting

TIMES = 1000 if LONG else 150
IDLE = 200
CLASSES = json.dumps([f"pattern {i}" for i in range(10)])  # of the synthetic images
STOCK_SAYS = "not measured"


@dataclass(frozen=True)
class Footprint:
    """What a process holds."""

    megabytes: float
    threads: int
    files: int

    @classmethod
    def of(cls, pid: int) -> "Footprint":
        status = Path(f"/proc/{pid}/status").read_text()
        kilobytes, threads = (
            int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "Threads")
        )
        return cls(kilobytes / 1000, threads, len([*Path(f"/proc/{pid}/fd").iterdir()]))

    def __str__(self) -> str:
        return f"{self.megabytes:.0f} MB, {self.threads} threads, {self.files} files"


def settled(pid: int, like: Footprint, seconds: float = 30) -> Footprint:
    """Wait until the process holds no more files than before, and return what it holds."""
    deadline = time.monotonic() + seconds
    while True:
        now = Footprint.of(pid)
        # gRPC takes another thread while the machine is busy.
        if (now.files <= like.files and now.threads <= like.threads + 1) or (
            time.monotonic() > deadline
        ):
            return now
        time.sleep(0.1)


def host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


@contextmanager
def joined(address: str, cid: str) -> Iterator[None]:
    """Join as a device does, and stay for a while."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options) as channel:
        properties = greeting(cid, model="Net", classes=CLASSES)
        outgoing = [wire.encode_properties_reply(properties)]
        stream = channel.stream_stream(JOIN)(iter_and_wait(outgoing))
        assert wire.decode_request(next(stream)).kind == "get_properties"
        yield
        stream.cancel()


def iter_and_wait(messages: list[bytes]) -> Iterator[bytes]:
    """Yield the messages, and never end: the end would close our half of the stream."""
    yield from messages
    while True:
        time.sleep(0.05)
        yield from ()


@contextmanager
def counted_in(process, address: str, cid: str) -> Iterator[float]:
    """Join; yield the seconds until the server counts the device in."""
    start = time.monotonic()
    with joined(address, cid):
        process.wait_for(rf"device {cid} joined", 20)
        yield time.monotonic() - start


@pytest.fixture
def listening(start_server):
    """A server that waits for more devices than come, and what it holds once warm."""
    process, address = start_server(min_num_clients="1000", num_partitions="1000")
    for i in range(3):  # gRPC's own threads and files come with the first connections
        with counted_in(process, address, f"warm-{i}"):
            pass
        process.wait_for(f"device warm-{i} left", 20)
    time.sleep(1)
    return process, address, Footprint.of(process.popen.pid)


def connect(stack: ExitStack, address: str) -> socket.socket:
    return stack.enter_context(socket.create_connection(host_and_port(address), timeout=5))


def idle(stack: ExitStack, address: str) -> None:
    for _ in range(IDLE):
        connect(stack, address)


def random_bytes(stack: ExitStack, address: str) -> None:
    for _ in range(50):
        with contextlib.suppress(OSError):
            connect(stack, address).sendall(os.urandom(100_000))


def http1(stack: ExitStack, address: str) -> None:
    for _ in range(50):
        connect(stack, address).sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")


def tls_hello(stack: ExitStack, address: str) -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="here")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    hello = outgoing.read()
    assert hello[0] == 22  # a handshake record
    for _ in range(50):
        connect(stack, address).sendall(hello)


def half_http2(stack: ExitStack, address: str) -> None:
    """Speak HTTP/2 up to a frame that announces 16 MB and never comes."""
    settings = b"\0\0\0\4\0\0\0\0\0"
    for _ in range(50):
        frame = struct.pack(">I", (1 << 24) - 1)[1:] + b"\0\0" + struct.pack(">I", 1)
        connect(stack, address).sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings + frame)


def never_answers(stack: ExitStack, address: str) -> None:
    """Open the stream and do not answer what the server asks."""
    for _ in range(50):
        options = [("grpc.use_local_subchannel_pool", 1)]
        channel = stack.enter_context(grpc.insecure_channel(address, options))
        stream = channel.stream_stream(JOIN)(iter_and_wait([]))
        next(stream)
        stack.callback(stream.cancel)


def leaves_before_it_is_asked(stack: ExitStack, address: str) -> None:
    for _ in range(50):
        connection = connect(stack, address)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()  # with a reset


def until_hung_up_on(connections: list[socket.socket]) -> float:
    """Return the seconds until the other end has closed all of them."""
    start = time.monotonic()
    for connection in connections:
        connection.settimeout(30)
        while connection.recv(1000):  # the server's HTTP/2 settings, then the end
            pass
    return time.monotonic() - start


VISITORS = {
    "idle": (f"{IDLE} connections on which nothing is sent", idle),
    "random bytes": ("50 connections with 100 kB of random bytes each", random_bytes),
    "HTTP/1": ("50 requests in HTTP/1.1", http1),
    "TLS": ("50 TLS hellos", tls_hello),
    "half of HTTP/2": ("50 HTTP/2 frames that never end", half_http2),
    "no answer": ("50 clients that join and never answer", never_answers),
    "resets": ("50 connections that are reset at once", leaves_before_it_is_asked),
}


def test_visitors_neither_keep_devices_out_nor_leave_anything_behind(listening, record_fault):
    process, address, before = listening
    patience = ExitStack()
    silent = [connect(patience, address) for _ in range(20)]
    watcher = patience.enter_context(ThreadPoolExecutor(1))
    hung_up = watcher.submit(until_hung_up_on, silent)
    without_silent = before
    before = replace(before, files=before.files + len(silent))
    rows = []
    for number, (what, visit) in enumerate(VISITORS.values()):
        with ExitStack() as stack:
            visit(stack, address)
            with counted_in(process, address, f"real-{number}") as seconds:
                during = Footprint.of(process.popen.pid)
        assert seconds < 1, what
        after = settled(process.popen.pid, before)
        print(f"{what}: joined in {seconds:.2f} s; before {before}; during {during}; after {after}")
        assert after.files <= before.files, what
        assert after.threads <= before.threads + 1, what
        assert after.megabytes < before.megabytes + 12, what
        rows.append((what, seconds, after))
    assert process.popen.poll() is None
    with patience:
        seconds = hung_up.result()
    assert 4 < seconds < 15
    assert settled(process.popen.pid, without_silent).files <= without_silent.files
    record_fault(
        "at the port: 20 connections on which nothing is sent",
        "they stay open",
        f"hung up on after {seconds:.0f} s",
        seconds,
        STOCK_SAYS,
    )
    for what, seconds, after in rows:
        record_fault(
            f"at the port: {what}",
            "a device joins meanwhile",
            f"it joined in {seconds:.2f} s; afterwards {after}, as before ({before})",
            None,
            STOCK_SAYS,
        )


def test_client_that_joins_and_leaves_again_and_again_costs_nothing(listening, record_fault):
    process, address, _ = listening
    for _ in range(20):
        with joined(address, "restless"):
            pass
    time.sleep(1)
    before = Footprint.of(process.popen.pid)
    start = time.monotonic()
    for _ in range(TIMES):
        with joined(address, "restless"):
            pass
    each = (time.monotonic() - start) / TIMES
    with counted_in(process, address, "real") as seconds:
        assert seconds < 1
    after = settled(process.popen.pid, before)
    print(f"{TIMES} times: {1000 * each:.0f} ms each; before {before}; after {after}")
    assert after.files <= before.files
    assert after.threads <= before.threads + 1
    assert after.megabytes < before.megabytes + 10
    record_fault(
        f"a client that joins and leaves {TIMES} times",
        "one after the other, with one --cid",
        f"a device joined in {seconds:.2f} s; {after}, before {before}",
        None,
        STOCK_SAYS,
    )


def test_failed_greetings_and_long_words_are_few_and_short_lines(start_server, record_fault):
    process, address = start_server(min_num_clients="1000", num_partitions="1000")
    options = [("grpc.use_local_subchannel_pool", 1)]
    start = time.monotonic()
    with grpc.insecure_channel(address, options) as channel:
        call = channel.stream_stream(JOIN)
        for _ in range(TIMES):
            with pytest.raises(grpc.RpcError) as error:
                list(call(iter([b"\xff" * 40])))
            assert "it did not report what it is" in str(error.value.details())
    seconds = time.monotonic() - start
    with grpc.insecure_channel(address, options) as channel:
        words = dict.fromkeys(("board", "machine", "cores"), "x" * 1000)
        properties = greeting("talker", model="Net", classes=CLASSES, **words)
        stream = channel.stream_stream(JOIN)(
            iter_and_wait([wire.encode_properties_reply(properties)])
        )
        next(stream)
        process.wait_for("device talker joined", 20)
        stream.cancel()
    process.wait_for(r"refused 127.0.0.1 [0-9,]+ times more: it did not report what it is", 20)
    lines = [line for line in process.lines if line.startswith(("refused", "device"))]
    assert len(lines) <= 3 + 2 + 2 * (1 + seconds / 10)
    assert all(len(line) <= 300 and line.isprintable() for line in lines)
    record_fault(
        f"{TIMES} clients that join an open server and send nonsense",
        "one after the other, from one address",
        f"{sum(line.startswith('refused') for line in lines)} lines for the owner",
        None,
        STOCK_SAYS,
    )
