"""The server's door: TLS on the port, and who may come in.

    nobody's certificate    may enrol, and no more
    a device's certificate  may join as the cid in it, unless that was revoked
    none                    at the address that the owner may open for stock clients alone

gRPC sees to the connection: TLS 1.3, certificates of our authority, in their time. What a
device may do once it is connected is decided here.
"""

import asyncio
import contextlib
import ipaddress
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc
import psutil
from cryptography import x509

from federated.errors import FederationError
from plumbing.addresses import check_cid, parse_address, resolve
from plumbing.security import keys
from plumbing.security.admissions import Admissions, ListProblem
from plumbing.security.complaints import Refusals
from plumbing.security.identity import ENROL_REQUEST

WAITING = 64  # enrolments at a time
WAITING_EACH = 8  # of them from one address; others are turned away
PENALTY_SECONDS = 1.0  # that the answer to a wrong token is delayed
TRY_LATER = "the server cannot use its list of devices for now, try later"
PROBLEM_SECONDS = 10.0  # at least, between two lines on a list that cannot be used
LOOK_SECONDS = 10.0  # between two looks at the machine's addresses


def local_names(server_address: str, more: Iterable[str] = ()) -> list[str]:
    """Return the names and addresses by which devices may reach this machine.

    Raises:
        FederationError: one of `more` cannot be a name, or the server's address is unknown.
    """
    more = list(more)
    for name in more:
        if not re.fullmatch(r"[A-Za-z0-9.:_*-]{1,253}", name):
            raise FederationError(
                f"--names {name[:80]!a} is no host name or IP address; "
                "example: laptop.example,203.0.113.5"
            )
    host, _ = parse_address(server_address)
    name = socket.gethostname()
    names = ["localhost", name, f"{name}.local", host, *local_addresses(), *more]
    names += [address for address, _ in resolve(server_address)]
    return sorted({name for name in names if _can_be_certified(name)})


def local_addresses() -> list[str]:
    """Return the IP addresses of this machine, without those that need a zone."""
    families = (socket.AF_INET, socket.AF_INET6)
    interfaces = psutil.net_if_addrs().values()
    found = {a.address for interface in interfaces for a in interface if a.family in families}
    return sorted(address for address in found if "%" not in address)


def public_address(server_address: str) -> str | None:
    """Return an address that the whole Internet may reach, if the server would listen at one."""
    listening = [address for address, _ in resolve(server_address)]
    if everywhere := [a for a in listening if ipaddress.ip_address(a).is_unspecified]:
        listening += [a for a in local_addresses() if ":" not in a or "::" in everywhere]
    return next((a for a in listening if ipaddress.ip_address(a).is_global), None)


def _can_be_certified(name: str) -> bool:
    try:
        value = keys.general_name(name).value
    except ValueError:  # not in ASCII
        return False
    return not getattr(value, "is_unspecified", False)  # 0.0.0.0 and ::


class _ServerCertificate:
    """What gRPC shows to devices: asked for at each connection, made again when necessary."""

    def __init__(self, authority: keys.Authority, names: Callable[[], list[str]]) -> None:
        self.authority = authority
        self.names = names
        self.certified: set[str] = set()
        self.certificate: x509.Certificate | None = None
        self.looked = 0.0
        self.lock = threading.Lock()  # gRPC asks in threads of its own

    def make(self, names: set[str]) -> grpc.ServerCertificateConfiguration:
        self.looked = time.monotonic()
        self.certified = names
        key, certificate = self.authority.sign_server(sorted(self.certified))
        self.certificate = x509.load_pem_x509_certificate(certificate)
        return grpc.ssl_server_certificate_configuration(
            [(key, certificate + self.authority.pem)],
            root_certificates=self.authority.pem + keys.nobody()[1],
        )

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        """Return a new one if names were added or its end comes near."""
        with self.lock:
            if time.monotonic() < self.looked + LOOK_SECONDS:
                return None
            self.looked = time.monotonic()
            assert self.certificate
            try:
                names = set(self.names())
            except FederationError:  # the network is away, and with it its name servers
                names = set()
            if names <= self.certified and not keys.is_due(self.certificate):
                return None
            return self.make(names | self.certified)


@dataclass(frozen=True)
class Peer:
    """Whom a caller's certificate proves it to be; both are "" for a caller that needs none."""

    cid: str = ""
    key_hash: str = ""


class Door(grpc.aio.ServerInterceptor):
    """What every call passes: a handler hears only of peers that the gate admits.

    Handlers stream both ways and take the Peer as their third argument, so that one which is
    registered at a server without a door fails at its first call.

    Args:
        gate: None for an open server, where everybody may call everything.
        open_methods: such as /package.Service/Method, that need no admission.
    """

    def __init__(self, gate: "Gate | None", open_methods: Iterable[str] = ()) -> None:
        self.gate = gate
        self.open_methods = frozenset(open_methods)

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(details)
        if handler is None:  # no such method, as gRPC answers by itself
            return None
        if not handler.stream_stream:
            raise TypeError(f"{details.method} does not stream both ways")
        gate = None if details.method in self.open_methods else self.gate

        async def guarded(messages: Any, context: grpc.aio.ServicerContext) -> None:
            peer = await gate.check(context) if gate else Peer()
            await handler.stream_stream(messages, context, peer)

        return grpc.stream_stream_rpc_method_handler(guarded)


class Places:
    """Bounds how many devices enrol at a time, in all and from one address."""

    def __init__(self) -> None:
        self.taken: Counter[str] = Counter()  # by address

    @contextlib.contextmanager
    def take(self, address: str) -> Iterator[bool]:
        """Take a place; False if there is none left."""
        where = _neighbourhood(address)
        if self.taken.total() >= WAITING or self.taken[where] >= WAITING_EACH:
            yield False
            return
        self.taken[where] += 1
        try:
            yield True
        finally:
            self.taken[where] -= 1
            self.taken = +self.taken  # without those at 0


class Gate:
    """TLS and admission for a Fleet.

    Args:
        directory: where the authority and the list of devices are, made if missing.
        names: returns what this machine is called; asked again and again, since a laptop's
            addresses change.
        report: called with a line for the owner; a fleet that uses the gate sets its own.

    Raises:
        FederationError: the directory cannot be used.
    """

    def __init__(
        self, directory: Path, names: Callable[[], list[str]], report: Callable[[str], None] = print
    ) -> None:
        self.authority = keys.Authority(directory)
        directory = self.authority.directory
        self.admissions = Admissions(directory)
        if keys.Authority(directory).hash != self.authority.hash:
            raise FederationError(
                f"the keys directory '{directory}' was replaced while the server started; "
                "start it again"
            )
        self.names = names
        self.report = report
        self._open_address = False  # whether there is one for stock clients
        self.places = Places()
        self.refusals = Refusals(lambda line: self.report(line))
        self._problem_reported = -PROBLEM_SECONDS
        # Two pools, so that devices are let in while another program blocks writing to the list.
        self._reads = ThreadPoolExecutor(4, "list-read")
        self._writes = ThreadPoolExecutor(1, "list-write")

    def credentials(self, demand_key: bool = True) -> grpc.ServerCredentials:
        """Return TLS for a port; without `demand_key` for stock clients, which have none."""
        certificate = _ServerCertificate(self.authority, self.names)
        first = certificate.make(set(self.names()))
        self._open_address |= not demand_key
        return grpc.dynamic_ssl_server_credentials(first, certificate, demand_key)

    async def check(self, context: grpc.aio.ServicerContext) -> Peer:
        """Return whom the certificate proves the peer to be; end the call if it may not enter."""
        presented = context.auth_context().get("x509_pem_cert")
        if not presented:
            if not self._open_address:  # TLS demands a key at the other one
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a key is needed here")
            return Peer()
        if presented[0] == keys.nobody()[1]:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "join with --join=TOKEN first")
        cid = key_hash = ""
        try:
            cid, key_hash = read_certificate(presented[0], self.authority.certificate)
            objection = await asyncio.get_running_loop().run_in_executor(
                self._reads, self.admissions.objection, cid, key_hash
            )
        except ListProblem as error:
            self._report_problem(error)
            await context.abort(grpc.StatusCode.ABORTED, TRY_LATER)
        except FederationError as error:
            objection = str(error)
        if objection:
            self.refusals.add(peer_address(context), objection)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, objection)
        return Peer(cid, key_hash)

    async def note_seen(self, devices: Iterable[Any]) -> None:
        """Note for the owner's list which devices are here; if need be later, or not at all."""
        seen = [(device.cid, device.address) for device in devices if device.key_hash]
        try:
            await asyncio.get_running_loop().run_in_executor(
                self._writes, self.admissions.note_seen, seen
            )
        except ListProblem as error:
            self._report_problem(error)

    def revoked(self, devices: Iterable[Any]) -> list[Any]:
        """Return those of the devices whose keys are not admitted any more.

        While the list cannot be read, its owner cannot revoke either: then none.
        """
        try:
            admitted = {(d.cid, d.key_hash) for d in self.admissions.all() if d.revoked is None}
        except ListProblem as error:
            self._report_problem(error)
            return []
        return [d for d in devices if d.key_hash and (d.cid, d.key_hash) not in admitted]

    async def enrol(self, _: Any, context: grpc.aio.ServicerContext, peer: Peer) -> None:
        """Sign a certificate for the key of a device that has a token.

        The request travels in the call's metadata, of which gRPC takes 16 kB and no more: of
        somebody unknown no message is read.
        """
        address = peer_address(context)
        with self.places.take(address) as taken:
            if not taken:
                self.refusals.add(address, "too many enrolments at a time")
                await context.abort(grpc.StatusCode.ABORTED, "too many enrol at a time, try later")
            try:
                cid, token, csr = read_enrolment(context.invocation_metadata())
                certificate = await asyncio.get_running_loop().run_in_executor(
                    self._writes,
                    self.admissions.admit_by_token,
                    cid,
                    keys.key_hash(csr),
                    token.mark,
                    lambda: self.authority.sign_device(cid, keys.p256_key(csr)),
                )
            except ListProblem as error:
                self._report_problem(error)
                await context.abort(grpc.StatusCode.ABORTED, TRY_LATER)
            except FederationError as error:
                self.refusals.add(address, str(error))
                await asyncio.sleep(PENALTY_SECONDS)
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        self.report(f"device {cid} was admitted from {address}, key {keys.key_hash(csr)[:16]}…")
        await context.write(certificate)

    async def renew(self, _: Any, context: grpc.aio.ServicerContext, peer: Peer) -> None:
        """Sign a new certificate for the key by which a device is connected."""
        if not peer.key_hash:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "there is no key to certify")
        (pem,) = context.auth_context()["x509_pem_cert"]
        public_key = keys.p256_key(x509.load_pem_x509_certificate(pem))
        await context.write(self.authority.sign_device(peer.cid, public_key))

    def _report_problem(self, error: ListProblem) -> None:
        """Report that the list cannot be used, every PROBLEM_SECONDS at most."""
        if time.monotonic() >= self._problem_reported + PROBLEM_SECONDS:
            self._problem_reported = time.monotonic()
            self.report(str(error))


def _neighbourhood(address: str) -> str:
    """Return what one peer can have addresses in: of IPv6 that is a whole network."""
    try:
        return str(ipaddress.IPv6Network((address.partition("%")[0], 64), strict=False))
    except ValueError:
        return address


def peer_address(context: grpc.aio.ServicerContext) -> str:
    """Return the peer's IP address, of gRPC's ipv4:192.168.1.7:40112 or ipv6:%5B::1%5D:40112."""
    host = unquote(context.peer()).partition(":")[2].rpartition(":")[0]
    return host.strip("[]").removeprefix("::ffff:")


def read_certificate(pem: bytes, authority: x509.Certificate) -> tuple[str, str]:
    """Return the cid and key hash that a peer's certificate is for.

    Raises:
        FederationError: it cannot be read, or another authority signed it.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        if keys.is_issued_by(certificate, authority):
            return keys.common_name(certificate), keys.key_hash(certificate)
    except Exception as error:  # cryptography documents no list of what a parser may raise
        raise FederationError(f"its certificate cannot be read ({type(error).__name__})") from None
    raise FederationError("its certificate is not of this authority")


def read_enrolment(
    metadata: Iterable[tuple[str, Any]] | None,
) -> tuple[str, keys.Token, x509.CertificateSigningRequest]:
    """Return the cid, token and signing request in the metadata of an enrolment.

    Raises:
        FederationError: it is none.
    """
    try:
        request = json.loads(dict(metadata or ())[ENROL_REQUEST])
        cid, token, csr = (request[name] for name in ("cid", "token", "csr"))
        if not all(isinstance(value, str) for value in (cid, token, csr)):
            raise TypeError
        data = csr.encode()
    except Exception:  # of bytes from anyone: nearly anything
        raise FederationError("this is no enrolment") from None
    check_cid(cid)
    request = keys.read_signing_request(data)
    return cid, keys.parse_token(token), request
