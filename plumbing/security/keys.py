"""Keys, certificates and tokens: what a server and its devices recognise each other by.

Each owner has an authority of their own, a key that signs the certificates of their server and
of their devices. Nobody else is trusted, and nobody else trusts it.

    authority   made at the first start with --secure; its key never leaves the server's machine
    server      a certificate for this machine's names and addresses, made again at each start
    device      one for a cid; the device makes the key and shows only its public half
    nobody      what a device shows before it has its own (see `nobody`)

All keys are ECDSA on P-256: every TLS library knows them, and a Pi signs in about a millisecond.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import datetime
import fcntl
import hashlib
import ipaddress
import os
import re
import secrets
import stat
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from federated.errors import FederationError

DAY = datetime.timedelta(days=1)
CLOCK_SLACK = DAY  # certificates begin so much earlier: a Pi has no clock of its own
AUTHORITY_LIFE = 3650 * DAY
SERVER_LIFE = 60 * DAY
DEVICE_LIFE = 365 * DAY
NOBODY = "nobody"
AUTHORITY_NAME = "flower-embedded"  # begins the name of each authority

TOKEN_PREFIX = "join1_"
SECRET_BYTES = 16

PrivateKey = ec.EllipticCurvePrivateKey


def default_keys_dir() -> Path:
    """Return where keys are without --keys."""
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "flower-embedded"


def private_directory(path: Path) -> Path:
    """Make `path`, readable by its owner alone; return it without symbolic links.

    Raises:
        FederationError: others can look into it or replace it, or it cannot be made.
    """
    path = path.expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        link = path.lstat()
        path = path.resolve(strict=True)  # a link that points elsewhere later changes nothing
        state = path.stat()
        open_to_all = [parent for parent in path.parents if _anybody_may_replace_in(parent)]
    except OSError as error:
        raise FederationError(
            f"the keys directory '{path}' cannot be made ({error.strerror}); name another by --keys"
        ) from None
    mode = stat.S_IMODE(state.st_mode)
    for owner, what in ((state.st_uid, "it"), (link.st_uid, "the link to it")):
        if owner not in _our_users() and not (what != "it" and owner == 0):
            raise FederationError(
                f"user {os.geteuid()} does not own the keys directory '{path}': {what} belongs to "
                f"user {owner}, who could read or replace the keys; name another by --keys"
            )
    if mode & 0o077:
        raise FederationError(
            f"others on this machine can look into the keys directory '{path}' (mode {mode:03o}); "
            f"run chmod 700 '{path}', or name another by --keys"
        )
    if open_to_all:
        raise FederationError(
            f"anybody on this machine can replace the keys directory '{path}', since "
            f"'{open_to_all[0]}' is open to all; run chmod o-w '{open_to_all[0]}', or name another "
            "by --keys"
        )
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise FederationError(f"user {os.getuid()} may not use the keys directory '{path}'")
    return path


def _our_users() -> set[int]:
    """Return the users whose directories are ours: this one and, under sudo, who called it."""
    sudo = os.environ.get("SUDO_UID", "")
    return {os.geteuid()} | ({int(sudo)} if os.geteuid() == 0 and sudo.isdecimal() else set())


def _anybody_may_replace_in(directory: Path) -> bool:
    mode = directory.stat().st_mode
    return bool(mode & stat.S_IWOTH and not mode & stat.S_ISVTX)


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read, as a whole or not at all."""
    # A name of its own: a second program may write the same file at this instant.
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # or its new name is lost when the power is cut
        finally:
            os.close(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise FederationError(f"cannot write '{path}': {error.strerror}") from None


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Lock a directory while its content is set up; the lock ends with this process, too."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise FederationError(
            f"cannot use the keys directory '{directory}': {error.strerror}"
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


# --- Keys and certificates ---


def new_key() -> PrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def public_key_hash(public_key: Any) -> str:
    """Return SHA-256 of a public key (its DER SubjectPublicKeyInfo), in hex."""
    spki = public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


def key_hash(certificate: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """Return the hash of the public key that a certificate is for."""
    return public_key_hash(certificate.public_key())


def p256_key(
    holder: x509.Certificate | x509.CertificateSigningRequest,
) -> ec.EllipticCurvePublicKey:
    """Return the public key in it; ValueError for keys of another kind than ours."""
    key = holder.public_key()
    if not (isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp256r1"):
        raise ValueError("its key is not on P-256")
    return key


def common_name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""


def is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Return whether the authority itself signed it; its dates are not looked at."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def is_signed(data: bytes, signature: bytes, authority: x509.Certificate) -> bool:
    """Return whether the authority has signed the data."""
    try:
        public: Any = authority.public_key()
        public.verify(signature, data, ec.ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return True


def life(certificate: x509.Certificate) -> tuple[datetime.datetime, datetime.datetime]:
    """Return when a certificate begins and ends to be valid."""
    if hasattr(certificate, "not_valid_before_utc"):
        return certificate.not_valid_before_utc, certificate.not_valid_after_utc
    utc = datetime.timezone.utc  # cryptography 40, the last for Python 3.6, leaves that out
    begin, end = certificate.not_valid_before, certificate.not_valid_after
    return begin.replace(tzinfo=utc), end.replace(tzinfo=utc)


def is_due(certificate: x509.Certificate) -> bool:
    """Return whether two thirds of its life are over, or it has yet to begin: a new one is due."""
    begin, end = life(certificate)
    return not begin <= now() <= begin + (end - begin) * 2 / 3


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    begin: datetime.datetime,
    end: datetime.datetime,
    purpose: x509.ObjectIdentifier | None,
) -> x509.CertificateBuilder:
    """Return a certificate but for its number and signature; without a purpose, an authority's."""
    signs = purpose is None
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(signs, 0 if signs else None), critical=True)
        # BoringSSL, in gRPC, looks only at this to decide who may sign certificates.
        .add_extension(
            x509.KeyUsage(not signs, False, False, False, False, signs, signs, False, False),
            critical=True,
        )
    )
    if purpose is None:
        return builder
    return builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)


# Signed deterministically (RFC 6979), which old versions of cryptography cannot do.
NOBODY_CERTIFICATE = b"""\
-----BEGIN CERTIFICATE-----
MIIBRjCB7qADAgECAgEBMAoGCCqGSM49BAMCMBExDzANBgNVBAMMBm5vYm9keTAg
Fw0yMDAxMDEwMDAwMDBaGA8yMTE5MTIwODAwMDAwMFowETEPMA0GA1UEAwwGbm9i
b2R5MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEqigm1VDIcTHHqZgIM0Fh0Dux
I02Yu9eVGKWihgtpzaM5k8nHdcbUFapE8HkWLw0Yec6l/8/r8dXRz6JFpBOQGKM1
MDMwDAYDVR0TAQH/BAIwADAOBgNVHQ8BAf8EBAMCB4AwEwYDVR0lBAwwCgYIKwYB
BQUHAwIwCgYIKoZIzj0EAwIDRwAwRAIgUCkCcvXChcbzgYCrQayK60NGMKo4MfZs
MXMKJtBMSZ4CIC3O7llL0q+spQaYxj/qCfPh7Ly16nxJPFE5TasORev4
-----END CERTIFICATE-----
"""


@lru_cache(maxsize=None)
def nobody() -> tuple[bytes, bytes]:
    """Return key and certificate (PEM) of a device that has none yet, the same everywhere.

    gRPC for Python can demand client certificates or not ask for them, but not leave it to
    the client. This pair is known to everybody, proves nothing, and opens nothing but
    enrolment: it stands for "no certificate", and enrolment needs no port of its own.
    """
    number = int.from_bytes(hashlib.sha256(b"flower-embedded: nobody").digest(), "big")
    key = ec.derive_private_key(number >> 1, ec.SECP256R1())
    return key_pem(key), NOBODY_CERTIFICATE


def signing_request(key: PrivateKey, cid: str) -> bytes:
    """Return the PEM by which a device asks for a certificate; it proves that it has the key."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_name(cid))
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM)


def read_signing_request(data: bytes) -> x509.CertificateSigningRequest:
    """Return a device's request, its key and signature checked.

    Raises:
        FederationError: it is none, or of another kind than `signing_request` makes.
    """
    try:
        request = x509.load_pem_x509_csr(data)
        p256_key(request)
        if not request.is_signature_valid:
            raise ValueError("it is not signed by its own key")
    except Exception as error:  # cryptography documents no list of what a parser may raise
        raise FederationError(f"no valid certificate request: {str(error)[:200]}") from None
    return request


class Authority:
    """Signs for one owner's server and devices.

    Args:
        directory: a private directory; the authority in it, or a new one, is used.

    Raises:
        FederationError: the directory or what is in it cannot be used.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = private_directory(directory)
        path = self.directory / "authority.pem"
        # For stock Flower clients and other programs, which need this half alone.
        public = path.with_name("authority.crt")
        with locked(self.directory):
            # A link to nowhere is a disk that is not there yet, and no reason for a new authority.
            if not (path.exists() or path.is_symlink()):
                write_private(path, b"".join(self._make()))
            self.key, self.certificate = read_authority(path)
            if not (public.is_file() and public.read_bytes() == self.pem):
                write_private(public, self.pem)
        begin, end = life(self.certificate)
        if not begin <= now() <= end:
            raise FederationError(
                f"this machine's clock shows {now():%Y-%m-%d %H:%M} UTC, the authority in '{path}' "
                f"is valid from {begin:%Y-%m-%d} to {end:%Y-%m-%d}; set the clock, or move the "
                "directory away and let all devices join again"
            )

    @property
    def pem(self) -> bytes:
        return certificate_pem(self.certificate)

    @property
    def hash(self) -> str:
        return key_hash(self.certificate)

    @staticmethod
    def _make() -> tuple[bytes, bytes]:
        key = new_key()
        name = _name(f"{AUTHORITY_NAME} {secrets.token_hex(4)}")
        builder = _builder(
            name, name, key.public_key(), now() - CLOCK_SLACK, now() + AUTHORITY_LIFE, None
        )
        certificate = builder.serial_number(x509.random_serial_number()).sign(key, SHA256())
        return key_pem(key), certificate_pem(certificate)

    def sign_server(self, names: Iterable[str]) -> tuple[bytes, bytes]:
        """Return a new key, and a certificate for such host names and IP addresses, in PEM."""
        key = new_key()
        general_names = [general_name(name) for name in names]
        builder = _builder(
            _name("server"),
            self.certificate.subject,
            key.public_key(),
            now() - CLOCK_SLACK,
            now() + SERVER_LIFE,
            ExtendedKeyUsageOID.SERVER_AUTH,
        ).add_extension(x509.SubjectAlternativeName(general_names), critical=False)
        return key_pem(key), certificate_pem(self._sign(builder))

    def sign_device(self, cid: str, public_key: ec.EllipticCurvePublicKey) -> bytes:
        """Return a certificate in PEM by which a device is `cid`."""
        builder = _builder(
            _name(cid),
            self.certificate.subject,
            public_key,
            now() - CLOCK_SLACK,
            now() + DEVICE_LIFE,
            ExtendedKeyUsageOID.CLIENT_AUTH,
        )
        return certificate_pem(self._sign(builder))

    def sign(self, data: bytes) -> bytes:
        """Return the authority's signature of some data, for `is_signed`."""
        return self.key.sign(data, ec.ECDSA(SHA256()))

    def _sign(self, builder: x509.CertificateBuilder) -> x509.Certificate:
        return builder.serial_number(x509.random_serial_number()).sign(self.key, SHA256())


def self_signed(names: Iterable[str]) -> tuple[bytes, bytes]:
    """Return a new key, and a certificate that it signs itself for such names, in PEM.

    For a device's own page: a browser warns of it, and a person compares `fingerprint`.
    """
    key, own = new_key(), _name(AUTHORITY_NAME)
    begin, purpose = now() - CLOCK_SLACK, ExtendedKeyUsageOID.SERVER_AUTH
    general_names = x509.SubjectAlternativeName([general_name(name) for name in names])
    builder = _builder(own, own, key.public_key(), begin, begin + DEVICE_LIFE, purpose)
    builder = builder.add_extension(general_names, critical=False)
    certificate = builder.serial_number(x509.random_serial_number()).sign(key, SHA256())
    return key_pem(key), certificate_pem(certificate)


def names_in(certificate: x509.Certificate) -> set[str]:
    """Return the host names and IP addresses that a certificate is for."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    return {str(name.value) for name in found}


def fingerprint(certificate: x509.Certificate) -> str:
    """Return a certificate's SHA-256 as browsers show it: AB:CD:…"""
    return certificate.fingerprint(SHA256()).hex(":").upper()


def general_name(name: str) -> x509.GeneralName:
    """Return a certificate's entry for a host name or an IP address."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def read_key_file(path: Path) -> tuple[PrivateKey, x509.Certificate, x509.Certificate]:
    """Return what a key file holds: a key, its certificate, and the last certificate in it.

    Raises:
        FederationError: there is none, it is damaged, or key and certificate do not match.
    """
    try:
        return parse_key_file(path.read_bytes())
    except OSError as error:
        raise FederationError(f"cannot read the key file '{path}': {error.strerror}") from None
    except ValueError as error:
        raise FederationError(
            f"the key file '{path}' is damaged ({error}); remove it, and join again"
        ) from None


def read_authority(path: Path) -> tuple[PrivateKey, x509.Certificate]:
    """Return an authority's key and certificate.

    Raises:
        FederationError: as read_key_file; the message is for the owner.
    """
    try:
        state = path.stat()
        key, certificate, _ = parse_key_file(path.read_bytes())
    except OSError as error:
        raise FederationError(f"cannot read the authority '{path}': {error.strerror}") from None
    except ValueError as error:
        raise FederationError(
            f"the authority '{path}' is damaged ({error}); put it back from a copy, or move the "
            "directory away and let all devices join again"
        ) from None
    # A link may lead out of the private directory.
    if state.st_mode & 0o077 or state.st_uid not in _our_users():
        raise FederationError(
            f"others on this machine can read the authority '{path}'; run chmod 600 '{path}', and "
            f"chown it to user {os.geteuid()}"
        )
    return key, certificate


def parse_key_file(data: bytes) -> tuple[PrivateKey, x509.Certificate, x509.Certificate]:
    """Return a key file's content, as read_key_file does.

    Raises:
        ValueError: it is none; the message holds nothing of it.
    """
    try:
        key = load_pem_private_key(data, None)
        certificates = x509.load_pem_x509_certificates(data)
    except Exception:  # cryptography's message may quote the file
        raise ValueError("no private key with a certificate") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("a key of another kind")
    if key_hash(certificates[0]) != public_key_hash(key.public_key()):
        raise ValueError("its key and certificate do not belong together")
    return key, certificates[0], certificates[-1]


# --- Tokens ---


@dataclass(frozen=True)
class Token:
    """What a device joins with: a secret for the server, and whom to show it to."""

    secret: bytes
    authority_hash: str  # see key_hash

    def __repr__(self) -> str:
        return f"Token(authority_hash={self.authority_hash!r})"

    def __str__(self) -> str:
        data = self.secret + bytes.fromhex(self.authority_hash)
        data += zlib.crc32(data).to_bytes(4, "big")  # so that a typing error is reported as one
        return TOKEN_PREFIX + base64.urlsafe_b64encode(data).decode().rstrip("=")

    @property
    def mark(self) -> str:
        """A name for it that reveals nothing of the secret."""
        return hashlib.sha256(self.secret).hexdigest()


def parse_token(text: str) -> Token:
    """Return the token that `text` is.

    Raises:
        FederationError: it is none, or mistyped; the message does not show it.
    """
    problem = "--join is no token: it must be as server.py prints it, join1_ and 70 characters more"
    if len(text.split()) > 1:
        raise FederationError("the token of --join has spaces or line breaks; leave them out")
    if not re.fullmatch(TOKEN_PREFIX + "[A-Za-z0-9_-]*", text):
        raise FederationError(problem)
    try:
        data = base64.b64decode(text[len(TOKEN_PREFIX) :] + "==", b"-_", validate=True)
    except binascii.Error:
        raise FederationError(problem) from None
    token = Token(data[:SECRET_BYTES], data[SECRET_BYTES:-4].hex())
    if len(data) != SECRET_BYTES + 32 + 4 or str(token) != text:  # its checksum, too
        raise FederationError(f"{problem}; a character of it is wrong or missing")
    return token
