"""Hang up on connections that send what is no message of ours, such as headers without end.

gRPC keeps the headers of a call until they end or have 18 MB, which takes up to 60 MB of memory,
on as many connections as there are [grpcio 1.85.1; 132,000 headers in frames of their own]. No
option of gRPC's bounds that. So what the kernel received on each connection is compared with
what was read of it. Linux only; elsewhere nothing is looked at.
"""

import contextlib
import ctypes
import math
import os
import socket
import struct
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from plumbing.addresses import plain_address

GROWTH_BYTES = 4 << 20  # when this process has grown by so much, connections are looked at
EVERY_SECONDS = 1.0  # and at least so often
SHARE = 50  # but no longer than one of so many seconds
# A connection may be ahead of what is read of it by so much, and for each second by so much more.
AHEAD_BYTES = 1 << 17  # without a device: an enrolment has 16 kB
AHEAD_BYTES_OF_DEVICES = 2 << 20  # and a message
BYTES_PER_SECOND = 10_000
TRIM_SECONDS = 2.0  # after one was closed, the memory that it took goes back to the system
FRAMING = 1.25  # bytes on the wire for each byte of a message, where frames are small
ACKNOWLEDGED = 0.05  # bytes that come back for each byte that is sent, likewise
# In Linux's struct tcp_info, from 4.1 on: acknowledged bytes, received bytes.
COUNTERS = struct.Struct("=120xQQ")

Peer = tuple[str, int]  # IP address and port


class Reader(Protocol):
    """What is known of a connection by which a device has joined."""

    bytes_read: int
    max_message_bytes: int  # one such message may be under way; -1 is of any size


@dataclass
class _Seen:
    time: float
    received: int = 0
    acknowledged: int = 0
    read: int = 0
    ahead: float = 0.0


class Traffic:
    """Watches this process's connections at some ports; the fleet calls it a few times a second."""

    def __init__(self, ports: Collection[int]) -> None:
        self.ports = ports
        self._seen: dict[Peer, _Seen] = {}
        self._looked = time.monotonic()
        self._took = 0.0  # of processor time
        self._trim_at = math.inf
        self._resident = resident_bytes()

    def is_due(self) -> bool:
        """Return whether connections should be looked at, which takes 20 µs each."""
        since = time.monotonic() - self._looked
        if since < SHARE * self._took:
            return False
        resident = resident_bytes()
        self._resident = min(self._resident, resident)
        return since > EVERY_SECONDS or resident - self._resident > GROWTH_BYTES

    def hang_up(self, readers: dict[Peer, Any]) -> list[str]:
        """Close the connections that are too far ahead; return their peers' addresses.

        Args:
            readers: of connections by which devices have joined; each is removed when its
                connection is closed, since what was under way arrives after a call's end.
        """
        self._looked, began = (now := time.monotonic()), time.thread_time()
        if self._trim_at < now:
            self._trim_at = math.inf
            with contextlib.suppress(AttributeError):  # no glibc
                ctypes.CDLL(None).malloc_trim(0)
        self._resident = resident_bytes()
        before, self._seen = self._seen, {}
        closed = []
        for connection, peer in self._connections():
            with contextlib.suppress(OSError, struct.error):  # it ended, or the kernel is older
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, COUNTERS.size)
                acknowledged, received = COUNTERS.unpack(info)
                reader = readers.get(peer)
                read = reader.bytes_read if reader else 0
                seen = self._seen[peer] = before.get(peer) or _Seen(now)
                ahead = received - seen.received - FRAMING * (read - seen.read)
                ahead -= ACKNOWLEDGED * (acknowledged - seen.acknowledged)
                ahead -= BYTES_PER_SECOND * (now - seen.time)
                seen.ahead = max(0.0, seen.ahead + ahead)
                seen.time, seen.received, seen.read = now, received, read
                seen.acknowledged = acknowledged
                if seen.ahead > allowed(reader):
                    reset(connection)
                    closed.append(peer[0])
                    self._trim_at = now + TRIM_SECONDS
        for peer in readers.keys() - self._seen.keys():
            del readers[peer]
        self._took = time.thread_time() - began
        return closed

    def _connections(self) -> Iterator[tuple[socket.socket, Peer]]:
        """Yield the connections, each for as long as the caller looks at it."""
        with contextlib.suppress(OSError):  # no /proc, or no descriptor left
            for path in Path("/proc/self/fd").iterdir():
                with contextlib.suppress(OSError):  # closed meanwhile, or no socket
                    connection = socket.socket(fileno=int(path.name))
                    try:
                        if connection.family in (socket.AF_INET, socket.AF_INET6):
                            host, port = connection.getpeername()[:2]
                            if connection.getsockname()[1] in self.ports:
                                yield connection, (plain_address(host), port)
                    finally:
                        connection.detach()  # it is gRPC's


def allowed(reader: Reader | None) -> float:
    """Return by how many bytes a connection may be ahead of what is read of it."""
    if not reader:
        return AHEAD_BYTES
    if reader.max_message_bytes < 0:
        return math.inf
    return AHEAD_BYTES_OF_DEVICES + FRAMING * reader.max_message_bytes


def reset(connection: socket.socket) -> None:
    """Reset a connection whose descriptor is somebody else's; they see that it was lost.

    Unlike `shutdown` this also drops what has arrived and was not read yet.
    """
    unspecified = bytes(16)  # a struct sockaddr with AF_UNSPEC
    ctypes.CDLL(None).connect(connection.fileno(), unspecified, len(unspecified))


def resident_bytes() -> int:
    """Return how much memory this process has; 0 where that is not known."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
