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
class Received:
    """What the server sent, with its frames, and the session that can be resumed."""

    data: bytes
    session: ssl.SSLSession | None


def call(
    address: str, tls: ssl.SSLContext, method: str, session: ssl.SSLSession | None = None
) -> tuple[bool, Received]:
    """Send one empty message; return whether the session was resumed, and the answer."""
    headers = {
        ":method": "POST",
        ":scheme": "https",
        ":path": method,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    request = (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + frame(SETTINGS, 0, 0, b"")
        + frame(HEADERS, END_HEADERS, 1, header_block(headers))
        + frame(DATA, END_STREAM, 1, bytes(5))
    )
    received = b""
    with (
        socket.create_connection(parse_address(address), timeout=10) as plain,
        contextlib.suppress(ssl.SSLError, ConnectionError, TimeoutError),
        tls.wrap_socket(plain, session=session) as connection,
    ):
        connection.sendall(request)
        while b"grpc-status" not in received and (more := connection.recv(1 << 16)):
            received += more
            connection.settimeout(2)
        return connection.session_reused, Received(received, connection.session)
    return False, Received(received, None)


def header_block(fields: dict[str, str]) -> bytes:
    """Return headers as HPACK has them, without compression."""

    def literal(text: str) -> bytes:
        return bytes([len(text)]) + text.encode()

    return b"".join(b"\0" + literal(name) + literal(value) for name, value in fields.items())


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload
