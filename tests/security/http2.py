"""One gRPC call by hand, over a TLS connection whose session can be kept and resumed."""

import contextlib
import socket
import ssl
import struct
from dataclasses import dataclass

from plumbing.addresses import parse_address

DATA, HEADERS, SETTINGS = 0, 1, 4
END_STREAM, END_HEADERS = 1, 4


@dataclass(frozen=True)
class Said:
    """What the server sent, frames and all, and the session to come back with."""

    data: bytes
    session: ssl.SSLSession | None


def call(
    address: str, tls: ssl.SSLContext, method: str, session: ssl.SSLSession | None = None
) -> tuple[bool, Said]:
    """Send one empty message; return whether the session was resumed, and the answer."""
    headers = {
        ":method": "POST",
        ":scheme": "https",
        ":path": method,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    block = b"".join(b"\0" + _text(name) + _text(value) for name, value in headers.items())
    request = (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + _frame(SETTINGS, 0, 0, b"")
        + _frame(HEADERS, END_HEADERS, 1, block)
        + _frame(DATA, END_STREAM, 1, bytes(5))
    )
    said = b""
    with (
        socket.create_connection(parse_address(address), timeout=10) as plain,
        contextlib.suppress(ssl.SSLError, ConnectionError, TimeoutError),
        tls.wrap_socket(plain, session=session) as connection,
    ):
        connection.sendall(request)
        while b"grpc-status" not in said and (more := connection.recv(1 << 16)):
            said += more
            connection.settimeout(2)
        return connection.session_reused, Said(said, connection.session)
    return False, Said(said, None)


def _text(text: str) -> bytes:
    """Return a string as HPACK has it, without compression."""
    return bytes([len(text)]) + text.encode()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload
