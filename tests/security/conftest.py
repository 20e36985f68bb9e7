"""An owner's secured fleet in this process, their devices, and what attackers bring along."""

import contextlib
import datetime
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from plumbing.addresses import parse_address
from plumbing.security import gate as gate_module
from plumbing.security import keys
from plumbing.security.gate import Gate
from plumbing.security.identity import ENROL, ENROL_REQUEST, Identity
from plumbing.stream import device as transport
from plumbing.stream.fleet import StreamFleet
from tests.conftest import ROOT, Process
from tests.devices import Adder, Recorder

HOUR = datetime.timedelta(hours=1)
LOCAL_NAMES = ["127.0.0.1", "::1", "localhost"]

# A key and its certificate, in PEM.
Pair = tuple[bytes, bytes]


def wait_until(condition: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


# --- The owner's side ---


@pytest.fixture
def make_gate(tmp_path: Path, monkeypatch) -> Callable[..., Gate]:
    """Make a gate; those of another owner by `owner="eve"`."""
    monkeypatch.setattr(gate_module, "PENALTY_SECONDS", 0.05)

    def make(owner: str = "owner", names: Iterable[str] = LOCAL_NAMES) -> Gate:
        return Gate(tmp_path / owner, lambda: list(names))

    return make


@pytest.fixture
def open_fleet(
    open_fleet: Callable[..., StreamFleet], make_gate: Callable[..., Gate]
) -> Callable[..., StreamFleet]:
    """Open a secured fleet."""

    def start(**options: Any) -> StreamFleet:
        gate = options.pop("gate") if "gate" in options else make_gate()
        return open_fleet(**{"keepalive_seconds": 1.0, **options, "gate": gate})

    return start


@pytest.fixture
def fleet(open_fleet: Callable[..., StreamFleet]) -> StreamFleet:
    return open_fleet()


@pytest.fixture
def recorder(fleet: StreamFleet) -> Recorder:
    """Take the events of `fleet`; its lines are what the owner reads."""
    return Recorder(fleet)


def admitted(gate: Gate, cid: str = "0", **how: Any) -> Pair:
    """Admit a device; return its key and certificate."""
    key = keys.new_key()
    pair = rogue(cid, signer=gate.authority, key=key, **how)
    gate.admissions.admit(cid, keys.public_key_hash(key.public_key()), pair[1])
    return pair


def token_for(gate: Gate, **limits: Any) -> keys.Token:
    return gate.admissions.make_token(gate.authority.hash, **limits)


# --- A device's side ---


@pytest.fixture
def identity(tmp_path: Path) -> Callable[..., Identity]:
    """Return the identity of a device: with a key file, or a token to get one with."""

    def make(
        cid: str = "0",
        pair: Pair | None = None,
        authority: bytes = b"",
        token: keys.Token | None = None,
        place: str = "",
    ) -> Identity:
        directory = keys.private_directory(tmp_path / (place or f"device-{cid}"))
        path = directory / f"device-{cid}.pem"
        if pair:
            keys.write_private(path, pair[0] + pair[1] + authority)
        return Identity(path, cid, token)

    return make


def serve(address: str, identity: Identity | None, client: Any = None, seconds: float = 20) -> None:
    """Be a device in this thread, until the run is over."""
    client = client or Adder(identity.cid if identity else "0")
    transport.serve(address, client, lambda state: None, seconds, identity=identity)


@pytest.fixture
def join() -> Callable[..., threading.Thread]:
    """Be a device in a thread of its own; how it ended is in the thread's `problem`."""

    def start(
        fleet: StreamFleet, identity: Identity | None, client: Any = None
    ) -> threading.Thread:
        def run() -> None:
            try:
                serve(fleet.address, identity, client)
            except Exception as error:
                thread.problem = error  # type: ignore[attr-defined]

        thread = threading.Thread(target=run, daemon=True)
        thread.problem = None  # type: ignore[attr-defined]
        thread.start()
        return thread

    return start


# --- The attacker's side ---


def rogue(
    common_name: str,
    signer: keys.Authority | Pair | None = None,
    key: keys.PrivateKey | None = None,
    begin: datetime.timedelta = -HOUR,
    end: datetime.timedelta = HOUR,
    purpose: x509.ObjectIdentifier | None = ExtendedKeyUsageOID.CLIENT_AUTH,
    names: Iterable[str] = (),
) -> Pair:
    """Make any certificate, and its key; self-signed without a signer, a CA's without purpose."""
    key = key or keys.new_key()
    subject = issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])
    signing = key
    if isinstance(signer, keys.Authority):
        issuer, signing = signer.certificate.subject, signer.key
    elif signer:
        signing, certificate, _ = keys.parse_key_file(b"".join(signer))
        issuer = certificate.subject
    now = datetime.datetime.now(datetime.UTC)
    signs = purpose is None
    builder = (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now + begin)
        .not_valid_after(now + end)
        .add_extension(x509.BasicConstraints(signs, None), critical=True)
        .add_extension(
            x509.KeyUsage(not signs, False, False, False, False, signs, signs, False, False),
            critical=True,
        )
    )
    if purpose:
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    if names:
        shown = x509.SubjectAlternativeName([keys.general_name(name) for name in names])
        builder = builder.add_extension(shown, critical=False)
    return keys.key_pem(key), keys.certificate_pem(builder.sign(signing, SHA256()))


def key_without_right(certificate: bytes) -> bytes:
    """Return a key file that every TLS library takes for the certificate's, and is not.

    It holds the certificate's public key beside another private one: libraries compare the
    public halves alone.
    """
    own = keys.new_key()
    theirs = x509.load_pem_x509_certificate(certificate).public_key()
    point = (Encoding.X962, PublicFormat.UncompressedPoint)
    der = own.private_bytes(Encoding.DER, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    mine = own.public_key().public_bytes(*point)
    assert isinstance(theirs, ec.EllipticCurvePublicKey) and der.count(mine) == 1
    forged = der.replace(mine, theirs.public_bytes(*point))
    return ssl.DER_cert_to_PEM_cert(forged).replace("CERTIFICATE", "EC PRIVATE KEY").encode()


@pytest.fixture
def knock(tmp_path: Path) -> Callable[..., bytes]:
    """Open TLS with a certificate; return the server's first bytes, b"" if it hangs up.

    With OpenSSL, which is not what gRPC uses. A server that lets a peer in speaks first:
    HTTP/2's settings.
    """

    def open_tls(address: str, pair: Pair | None, **limits: ssl.TLSVersion) -> bytes:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        for name, version in limits.items():
            setattr(context, name, version)
        if pair:
            path = tmp_path / "knock.pem"
            path.write_bytes(b"".join(pair))
            context.load_cert_chain(path)
        with (
            socket.create_connection(parse_address(address), timeout=10) as plain,
            contextlib.suppress(ssl.SSLError, ConnectionError),
            context.wrap_socket(plain) as tls,
        ):
            return tls.recv(9)
        return b""

    return open_tls


def channel(fleet: StreamFleet, pair: Pair | None = None) -> grpc.Channel:
    """Return a channel to a fleet, as nobody or with a certificate."""
    assert fleet.gate
    tls = grpc.ssl_channel_credentials(fleet.gate.authority.pem, *(pair or keys.nobody()))
    # Each with a connection of its own.
    return grpc.secure_channel(fleet.address, tls, [("grpc.use_local_subchannel_pool", 1)])


def hello(fleet: StreamFleet, pair: Pair | None = None) -> str:
    """Return what the server answers to a greeting: "ok", or why not."""
    with channel(fleet, pair) as opened:
        try:
            answer = opened.unary_unary(transport.HELLO)(b"", timeout=10)
            assert json.loads(answer)["keepalive_seconds"] > 0
            return "ok"
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"


def enrolment(cid: Any, token: Any, csr: Any = None) -> bytes:
    """Return the request of a device that wants in."""
    csr = keys.signing_request(keys.new_key(), "any").decode() if csr is None else csr
    return json.dumps({"cid": cid, "token": str(token), "csr": csr}).encode()


def ask(opened: grpc.Channel, request: bytes, method: str = ENROL) -> bytes:
    """Send a request for a certificate; return the answer or raise grpc.RpcError."""
    call = opened.stream_stream(method)
    return next(call(iter(()), timeout=30, metadata=[(ENROL_REQUEST, request)]), b"")


def refusal(opened: grpc.Channel, request: bytes, method: str = ENROL) -> str:
    """Return why a request for a certificate is refused."""
    with pytest.raises(grpc.RpcError) as error:
        ask(opened, request, method)
    return f"{error.value.code().name}: {error.value.details()}"


class Impostor:
    """Listens where devices look for their server; keeps what they send."""

    def __init__(self, pair: Pair, chain: bytes, folder: Path) -> None:
        path = folder / f"impostor-{id(self)}.pem"
        path.write_bytes(pair[0] + pair[1] + chain)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(path)
        self.context.set_alpn_protocols(["h2"])
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.heard = b""  # what came through TLS
        self.visits = 0
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                plain, _ = self.listener.accept()
            except OSError:
                return
            self.visits += 1
            plain.settimeout(5)
            with contextlib.suppress(OSError), self.context.wrap_socket(plain, True) as tls:
                while data := tls.recv(1 << 16):
                    self.heard += data


@pytest.fixture
def impostor(tmp_path: Path) -> Iterator[Callable[..., Impostor]]:
    made: list[Impostor] = []

    def make(pair: Pair, chain: bytes = b"") -> Impostor:
        made.append(Impostor(pair, chain, tmp_path))
        return made[-1]

    yield make
    for one in made:
        one.listener.close()


# --- Programs ---


@pytest.fixture
def devices(tmp_path: Path) -> Callable[..., str]:
    """Run server.py devices on the keys in tmp_path/owner; return its output."""

    def run(*arguments: str | Path, code: int = 0) -> str:
        command, *rest = arguments or ("list",)
        done = run_python(
            ROOT / "server.py", "devices", command, f"--keys={tmp_path / 'owner'}", *rest
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def run_python(*command: str | Path, **kwargs: Any) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=60, **kwargs
    )


@pytest.fixture
def start_secure_server(
    start_server: Callable[..., tuple[Process, str]], tmp_path: Path
) -> Callable[..., tuple[Process, str, str]]:
    """Start server.py --secure; return it, its address and the token that it printed."""

    def start(*arguments: str, **options: str) -> tuple[Process, str, str]:
        options = {"keys": str(tmp_path / "owner"), **options}
        server, address = start_server("--secure", *arguments, **options)
        return server, address, token_in(server)

    return start


def token_in(server: Process) -> str:
    (line,) = [line for line in server.lines if "--join=" in line]
    return line.partition("--join=")[2].split()[0]
