"""What people type: server addresses (192.168.1.10:8080, [fd00::1]:8080) and device names."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import re
import socket

from federated.errors import FederationError


def check_cid(cid: str) -> None:
    """Raise FederationError unless `cid` can stand in lines, files and messages as it is."""
    # Not '-' in front: a command would take such a name for a flag.
    if not re.fullmatch(r"[A-Za-z0-9._][A-Za-z0-9._-]{0,63}", cid):
        raise FederationError(
            f"--cid {cid[:64]!r} is not made of 1 to 64 letters, digits, '.', '_' and '-', "
            "with no '-' in front"
        )


class UnknownHost(FederationError):
    """A host name without an address; `may_pass` if the network may just be away."""

    def __init__(self, message: str, may_pass: bool) -> None:
        super().__init__(message)
        self.may_pass = may_pass


def parse_address(address: str) -> tuple[str, int]:
    """Split HOST:PORT, an IPv6 host in brackets.

    Raises:
        FederationError: it is not of that form.
    """
    if "://" in address:
        raise FederationError(
            f"server address '{address}' begins with the name of a protocol; "
            f"leave it out: {address.partition('://')[2].rstrip('/')}"
        )
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    if (
        not colon
        or not host
        or any(c.isspace() or c in "/[]" for c in host)
        or (":" in host) != bracketed
        or not (re.fullmatch("[0-9]+", port) and int(port) <= 65535)
    ):
        raise FederationError(
            f"server address '{address}' is not HOST:PORT; "
            "examples: 192.168.1.20:8080, laptop.local:8080, [fd00::1]:8080"
        )
    return host, int(port)


def check_destination(address: str) -> None:
    """Raise FederationError unless a device can go to HOST:PORT."""
    host, port = parse_address(address)
    if port == 0:
        raise FederationError(f"server address '{address}' has no port to go to")
    with contextlib.suppress(ValueError):  # a name
        if ipaddress.ip_address(host).is_unspecified:
            raise FederationError(
                f"server address '{address}' stands for all addresses of the machine that "
                "listens, and none to go to; use the one that server.py prints"
            )


def join_address(host: str, port: int) -> str:
    """Return HOST:PORT, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def resolve(address: str) -> list[tuple[str, int]]:
    """Return the numeric addresses that HOST:PORT stands for, in the system's order.

    Raises:
        FederationError: not of that form.
        UnknownHost: no such host, or nobody to ask.
    """
    host, port = parse_address(address)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise UnknownHost(
            f"cannot find the host '{host}' of server address '{address}'; "
            "check its spelling and the network, or use the IP address",
            may_pass=isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN,
        ) from error
    return list(dict.fromkeys((str(info[4][0]), port) for info in found))


def connected(address: str, seconds: float) -> socket.socket:
    """Return a connection to the first address of HOST:PORT that takes one, as gRPC does."""
    addresses = resolve(address)
    for i, numeric in enumerate(addresses):
        try:
            return socket.create_connection(numeric, timeout=seconds)
        except OSError:
            if i == len(addresses) - 1:
                raise
    raise AssertionError("resolve returns addresses or raises")


def other_service(address: str, seconds: float) -> str:
    """Return what listens at `address`, or "" if it is not known to be something else.

    It is asked as a browser would ask. An SSH server speaks first, a web server answers, and
    gRPC's answer is of bytes that are no text.
    """
    try:
        with connected(address, seconds) as probe:
            probe.sendall(b"GET / HTTP/1.0\r\n\r\n")
            answer = probe.recv(200)
    except OSError:
        return ""
    line = answer.partition(b"\n")[0].strip().decode("ascii", "replace")
    if not line or not line.isprintable() or "\ufffd" in line:
        return ""
    for start, kind in (("SSH-", "an SSH server"), ("HTTP/", "a web server")):
        if line.startswith(start):
            return f"{kind} ({line[:60]})"
    return f"another program ({line[:60]!r})"


def listening_addresses(address: str) -> list[tuple[str, int]]:
    """Return the numeric addresses of this machine that a server at `address` can take.

    gRPC reports only that it could not bind; a trial with a plain socket gives the reason.

    Raises:
        FederationError: none can be taken; the message gives the reason.
    """
    usable = []
    for host, port in resolve(address):
        try:
            dual = host == "::" and socket.has_dualstack_ipv6()  # as gRPC listens there
            with socket.create_server((host, port), family=_family(host), dualstack_ipv6=dual):
                usable.append((host, port))
        except OSError as error:
            problem = error.errno or 0
    if usable:
        return usable
    if problem == errno.EADDRINUSE:
        raise FederationError(
            f"port {port} of '{address}' is in use; stop the other server, "
            "or choose another port with --server_address"
        )
    if problem == errno.EACCES:
        raise FederationError(
            f"port {port} of '{address}' is for root alone; choose one from 1024 to 65535"
        )
    if problem == errno.EADDRNOTAVAIL:
        raise FederationError(
            f"'{host}' is not an address of this machine; "
            f"use 0.0.0.0:{port} to listen on all that it has"
        )
    raise FederationError(f"cannot listen at '{address}': {errno.errorcode.get(problem, problem)}")


def reachable_address(host: str, port: int) -> str:
    """Return the address to type on a device for a server that listens at `host`.

    For "all addresses" (0.0.0.0, ::) that is the one this machine uses towards its network.
    """
    if ipaddress.ip_address(host).is_unspecified:
        # Connecting a datagram socket sends nothing; it only asks the routing table.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))  # TEST-NET-1, RFC 5737
                host = probe.getsockname()[0]
            except OSError:
                host = "127.0.0.1"
    return join_address(host, port)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
