"""The device's key: how it gets one, shows it, renews it, and knows its server.

A key file, device-<cid>.pem, holds the device's private key, the certificate for it and that of
the server's authority. The key is made here and never leaves.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import socket
import ssl
import struct
import sys
import time
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from federated.errors import FederationError, NotYet, Refused
from plumbing.addresses import connected, other_service, parse_address
from plumbing.security import keys
from plumbing.security.complaints import bounded

logger = logging.getLogger(__name__)

ENROL = "/plumbing.Fleet/Enrol"
RENEW = "/plumbing.Fleet/Renew"
ENROL_REQUEST = "enrolment-bin"  # a key of the call's metadata
ANSWER_SECONDS = 20.0
PROBE_SECONDS = 5.0
RENEW_PAUSE_SECONDS = 600.0  # after a renewal that failed
MARK = b"# by token "  # begins a line of a key file
NO_PROXY = [("grpc.enable_http_proxy", 0)]  # a server on the local network is not behind one


def open_identity(directory: Path, cid: str, join: str | None) -> Identity | None:
    """Return the device's identity, or None if it has none and is given none: an open server's.

    Args:
        directory: where key files are.
        join: a token, the name of a file with one, "-" for standard input, or the name of a
            key file that the owner made with `server.py devices admit`.

    Raises:
        FederationError: any of this is wrong; the message shows no secret.
    """
    path = directory.expanduser() / f"device-{cid}.pem"
    try:
        if join is None and not path.exists():
            return None
    except OSError as error:
        raise FederationError(
            f"user {os.getuid()} may not look for its key in '{path.parent}' "
            f"({error.strerror}); use --insecure if it has none"
        ) from None
    keys.private_directory(directory)
    if join is None:
        return Identity(path, cid)
    text = _read_join(join)
    if "PRIVATE KEY" not in text:
        return Identity(path, cid, keys.parse_token(text))
    try:
        _, certificate, _ = keys.parse_key_file(text.encode())
    except ValueError as error:
        raise FederationError(f"--join {join} is no key file: {error}") from None
    if keys.common_name(certificate) != cid:
        raise FederationError(
            f"--join {join} is the key of device {keys.common_name(certificate)}, "
            f"not of device {cid}; start the client with that --cid"
        )
    here = keys.read_key_file(path)[1] if path.exists() else None
    if here is None or keys.key_hash(here) != keys.key_hash(certificate):
        keys.write_private(path, f"{text}\n".encode())
    return Identity(path, cid)


def _read_join(join: str) -> str:
    """Return the token or the key file that --join stands for."""
    if join.startswith(keys.TOKEN_PREFIX):
        return join
    try:
        if join == "-" and sys.stdin.isatty():
            return getpass.getpass("token (not shown): ").strip()
        if join == "-":
            return sys.stdin.read().strip()
        return Path(join).expanduser().read_text().strip()
    except (OSError, EOFError, UnicodeError):
        raise FederationError(
            "--join is neither a token (join1_…, as server.py prints it) nor a file that can be "
            "read; - reads standard input"
        ) from None


class Identity:
    """The key of one device, and the authority that its server must be of.

    Args:
        path: of the key file.
        token: to get the key file with, unless that was made with the same token before.
    """

    def __init__(self, path: Path, cid: str, token: keys.Token | None = None) -> None:
        self.path = path
        self.cid = cid
        self.token = token
        self.mark = self._mark(token) if token else b""
        self.renewal_failed = -RENEW_PAUSE_SECONDS
        try:
            if token is None or (path.exists() and self.mark in path.read_bytes()):
                self.token = None
                self._load()
        except OSError as error:
            raise FederationError(f"cannot read the key file '{path}': {error.strerror}") from None
        # The key that it will have, kept until the answer is here: who asks again must have
        # the same.
        self.pending = path.with_suffix(".pending")

    def prepare(self, server_address: str, seconds: float) -> None:
        """Get a certificate if there is none yet.

        Raises:
            NotYet: it may work later.
            Refused: it will not.
            grpc.RpcError: the server could not be reached, or does not admit this device.
        """
        if self.token:
            self._enrol(server_address, self.token, seconds)
            return
        begin, end = keys.life(self.certificate)
        if keys.now() < begin:
            raise NotYet(
                f"this device's clock shows {keys.now():%Y-%m-%d %H:%M} UTC, its certificate "
                f"begins at {begin:%Y-%m-%d %H:%M}; waiting for the time to be set"
            )
        if keys.now() > end:
            raise Refused(
                f"the certificate of device {self.cid} ended on {end:%Y-%m-%d}, and this device's "
                f"clock shows {keys.now():%Y-%m-%d}; if that is right, take its admission back "
                f"(server.py devices revoke {self.cid}), and join again with --join=TOKEN"
            )

    @property
    def authority_hash(self) -> str:
        """What its server must show: see keys.key_hash."""
        return self.token.authority_hash if self.token else keys.key_hash(self.authority)

    def channel(self, server_address: str, options: list[tuple[str, Any]]) -> grpc.Channel:
        """Return a channel on which both ends prove who they are."""
        return _channel(server_address, options, self.authority, self.credentials)

    def renew_if_due(self, server_address: str) -> None:
        """Get a new certificate for the same key when the old one nears its end."""
        since = time.monotonic() - self.renewal_failed
        if not keys.is_due(self.certificate) or since < RENEW_PAUSE_SECONDS:
            return
        try:
            with self.channel(server_address, NO_PROXY) as channel:
                pem = _ask(channel, RENEW)
            self._write(self.mark + self.credentials[0], pem, keys.certificate_pem(self.authority))
            self._load()
            logger.info(f"certificate renewed, until {keys.life(self.certificate)[1]:%Y-%m-%d}")
        except (grpc.RpcError, FederationError) as error:
            self.renewal_failed = time.monotonic()
            reason = error.details() if isinstance(error, grpc.RpcError) else error
            logger.info(f"certificate not renewed yet ({reason})")

    def _load(self) -> None:
        key, self.certificate, self.authority = keys.read_key_file(self.path)
        lines = self.path.read_bytes().splitlines(keepends=True)
        self.mark = b"".join(line for line in lines if line.startswith(MARK))
        self.credentials = keys.key_pem(key), keys.certificate_pem(self.certificate)

    def _enrol(self, server_address: str, token: keys.Token, seconds: float) -> None:
        authority = find_authority(server_address, token.authority_hash, seconds)
        key = self._pending_key()
        csr = keys.signing_request(key, self.cid).decode()
        request = json.dumps({"cid": self.cid, "token": str(token), "csr": csr}).encode()
        with _channel(server_address, NO_PROXY, authority, keys.nobody()) as channel:
            pem = _ask(channel, ENROL, [(ENROL_REQUEST, request)])
        self._write(self.mark + keys.key_pem(key), pem, keys.certificate_pem(authority))
        self.pending.unlink(missing_ok=True)
        self.token = None
        self._load()
        logger.info(f"admitted by {server_address} as device {self.cid}")

    def _pending_key(self) -> keys.PrivateKey:
        """Return the key to ask with: the one of the last time, or a new one, kept."""
        try:
            data = self.pending.read_bytes()
            key = load_pem_private_key(data, None)
            if self.mark in data and isinstance(key, keys.PrivateKey):
                return key
        except (OSError, ValueError):  # there is none, or nothing to be read
            pass
        key = keys.new_key()
        keys.write_private(self.pending, self.mark + keys.key_pem(key))
        return key

    def _write(self, key: bytes, certificate: bytes, authority: bytes) -> None:
        try:
            _, shown, root = keys.parse_key_file(key + certificate + authority)
            if keys.common_name(shown) != self.cid or not keys.is_issued_by(shown, root):
                raise ValueError("not what was asked for")
        except ValueError as error:
            raise FederationError(f"the server sent no usable certificate: {error}") from None
        keys.write_private(self.path, key + certificate + authority)

    @staticmethod
    def _mark(token: keys.Token) -> bytes:
        """Return a line of a key file that names the token it came by; PEM has comments."""
        return MARK + f"{token.mark}\n".encode()


def _channel(
    server_address: str,
    options: list[tuple[str, Any]],
    authority: x509.Certificate,
    credentials: tuple[bytes, bytes],
) -> grpc.Channel:
    tls = grpc.ssl_channel_credentials(keys.certificate_pem(authority), *credentials)
    return grpc.secure_channel(server_address, tls, options)


def _ask(
    channel: grpc.Channel, method: str, metadata: list[tuple[str, Any]] | None = None
) -> bytes:
    """Call a method that takes metadata alone, and return its one answer."""
    answers = channel.stream_stream(method)(iter(()), timeout=ANSWER_SECONDS, metadata=metadata)
    return next(answers, b"")


# --- Which server is that? ---


class NoTLS(NotYet):
    """Something else listens there."""


def shown_certificates(server_address: str, seconds: float) -> list[x509.Certificate]:
    """Return what the server shows of itself, proved by nothing so far.

    Raises:
        NotYet: nobody answers.
        NoTLS: it is not TLS 1.3 that is spoken there.
    """
    try:
        with connected(server_address, max(0.5, min(seconds, PROBE_SECONDS))) as plain:
            if sys.version_info < (3, 10):
                chain = _chain_by_openssl(plain)
            else:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
                context.minimum_version = ssl.TLSVersion.TLSv1_3
                context.set_alpn_protocols(["h2"])
                # On a connection that was reset already wrap_socket would do nothing, unnoticed.
                with context.wrap_socket(plain, do_handshake_on_connect=False) as tls:
                    tls.do_handshake()
                    # Public from Python 3.13 on, the same before.
                    public = hasattr(tls, "get_unverified_chain")
                    has_it: Any = tls if public else getattr(tls, "_sslobj")  # noqa: B009
                    chain = [_certificate(shown) for shown in has_it.get_unverified_chain()]
        for certificate in chain:
            keys.key_hash(certificate)  # of a key that can be read
        return chain
    except (UnsupportedAlgorithm, ValueError):
        raise NoTLS("what listens there shows a certificate that cannot be read") from None
    except socket.timeout:  # TimeoutError itself, from Python 3.10 on
        raise NotYet("no answer") from None
    except ssl.SSLError:
        raise NoTLS("what listens there speaks no TLS 1.3; start server.py with --secure") from None
    except OSError as error:
        if isinstance(error, ConnectionResetError):
            raise NoTLS(
                "what listens there closes TLS connections; start server.py with --secure"
            ) from None
        raise NotYet((error.strerror or str(error)).lower()) from None


def _chain_by_openssl(plain: socket.socket) -> list[x509.Certificate]:
    """Return what the server shows, on a Python whose own ssl gives the last certificate alone."""
    from OpenSSL import SSL

    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_alpn_protos([b"h2"])
    # pyOpenSSL takes sockets that block; the kernel ends them in time.
    timeout = struct.pack("ll", int(plain.gettimeout() or PROBE_SECONDS) + 1, 0)
    plain.settimeout(None)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
    tls = SSL.Connection(context, plain)
    tls.set_connect_state()
    try:
        tls.do_handshake()
    except SSL.WantReadError:
        raise socket.timeout from None
    except SSL.SysCallError as error:
        raise ConnectionResetError(*error.args) from None
    except SSL.Error:
        raise ssl.SSLError("no TLS 1.3") from None
    return [shown.to_cryptography() for shown in tls.get_peer_cert_chain() or []]


def _certificate(shown: Any) -> x509.Certificate:
    """Return one of the chain: bytes from Python 3.13 on, an object of ssl's before."""
    pem = shown if isinstance(shown, bytes) else shown.public_bytes()
    if isinstance(pem, str):
        return x509.load_pem_x509_certificate(pem.encode())
    return x509.load_der_x509_certificate(pem)


def find_authority(server_address: str, authority_hash: str, seconds: float) -> x509.Certificate:
    """Return the certificate of the server's authority, whose key has this hash.

    Nothing is sent before that but the opening of the handshake. What the server shows could
    be a copy; that it has the key is proved by the connection that follows.

    Raises:
        Refused: the server there is of another authority.
        NotYet: as shown_certificates.
    """
    return _pick_authority(
        shown_certificates(server_address, seconds), server_address, authority_hash
    )


def _pick_authority(
    chain: list[x509.Certificate], server_address: str, authority_hash: str
) -> x509.Certificate:
    for certificate in chain:
        if keys.key_hash(certificate) == authority_hash:
            return certificate
    raise Refused(
        f"the server at {server_address} is not the one that this device trusts: its authority is "
        f"sha256:{keys.key_hash(chain[-1])}, not sha256:{authority_hash}. Either the server was "
        "set up again, then join with a new --join=TOKEN; or somebody is in between"
    )


def connection_problem(
    server_address: str, identity: Identity | None, seconds: float
) -> tuple[str, bool]:
    """Return why no connection comes about, as far as can be seen from here, or "".

    Also whether something listens there that is not server.py, or not as this device needs it.

    Raises:
        Refused: trying again would not help.
    """
    try:
        chain = shown_certificates(server_address, seconds)
        if not keys.common_name(chain[-1]).startswith(keys.AUTHORITY_NAME):
            return f"{_stranger(chain[0])} listens there, not server.py", True
        if identity is None:
            raise Refused(
                f"the server at {server_address} lets in only devices that its owner admitted; "
                "join with --join=TOKEN, as server.py prints it"
            )
        _pick_authority(chain, server_address, identity.authority_hash)
    except NoTLS as error:
        if other := other_service(server_address, max(0.5, min(seconds, PROBE_SECONDS))):
            return f"{other} listens there, not server.py", True
        return (
            ("", False) if identity is None else (f"{error}, or this client with --insecure", True)
        )
    except NotYet:
        return "", False
    host, _ = parse_address(server_address)
    with contextlib.suppress(x509.ExtensionNotFound, ValueError):
        names = chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        typed = str(keys.general_name(host).value)
        if typed.lower() not in (str(name.value).lower() for name in names):
            raise Refused(
                f"the server's certificate is not for {host} but for "
                f"{', '.join(str(name.value) for name in names)}; start server.py with "
                f"--names {host}"
            )
    begin, end = keys.life(chain[0])
    if not begin <= keys.now() <= end:
        return (
            f"this device's clock shows {keys.now():%Y-%m-%d %H:%M} UTC, the server's certificate "
            f"is for {begin:%Y-%m-%d} to {end:%Y-%m-%d}"
        ), False
    return "the server rejects this device's certificate", False


def _stranger(certificate: x509.Certificate) -> str:
    """Return what a server with such a certificate is; the name is a stranger's word."""
    name = bounded(keys.common_name(certificate) or "no name", 60)
    return f"another TLS server ({name!a})"
