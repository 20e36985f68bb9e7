"""Who may open the labelling page.

    ./run_fridgecam.sh label          this machine alone
    ./run_fridgecam.sh label --lan    the local network, too: TLS, and a code for each browser

The certificate is this device's own, made at the first start and kept in keys/label.pem, so that a
browser warns of it once. The code is on the screen of who started the page. It lets one browser
in, which gets a cookie that no script can read and no other site's request carries.
"""

import contextlib
import hmac
import os
import secrets
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

from cryptography import x509

from federated.errors import FederationError
from plumbing.addresses import join_address, reachable_address
from plumbing.security import keys

LOCAL = ("127.0.0.1", "localhost", "::1")
ALL = "0.0.0.0"
ENTRANCE = "/code"
CERTIFICATE = "label.pem"
DIGITS = 8
WRONG_CODES = 5  # then no code is taken any more: one guess in 20 million is right


class Code:
    """A code that lets one browser in; the next one gets another.

    Args:
        show: called with each line for the person at the screen.
    """

    def __init__(self, show: Callable[[str], None] = print) -> None:
        self.show = show
        self.wrong = 0
        self._next()

    @property
    def spent(self) -> bool:
        """Return whether there were too many wrong codes."""
        return self.wrong >= WRONG_CODES

    def take(self, typed: str) -> bool:
        """Return whether this is the code; it is that once."""
        digits = "".join(c for c in typed if c.isdecimal())
        if self.spent or not hmac.compare_digest(digits.encode(), self.digits.encode()):
            self.wrong += 1
            if self.wrong == WRONG_CODES:
                self.show(f"{WRONG_CODES} wrong codes: none is taken any more; start it again")
            return False
        self.wrong = 0
        self.show("a browser was let in; a further one needs another code")
        self._next()
        return True

    def _next(self) -> None:
        self.digits = "".join(secrets.choice("0123456789") for _ in range(DIGITS))
        self.show(f"code for one browser: {self.digits[:4]} {self.digits[4:]}")


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; FederationError if it cannot."""
    try:
        return socket.create_server((host, port), backlog=128)
    except OSError as error:
        raise FederationError(
            f"cannot listen at port {port} ({os.strerror(error.errno or 0)}); choose another --port"
        ) from None


def lan_names() -> list[str]:
    """Return the names and addresses by which the local network may reach this device."""
    name = socket.gethostname()
    names = {*LOCAL, name, f"{name}.local", reachable_address(ALL, 0).rpartition(":")[0]}
    with contextlib.suppress(OSError):
        names |= {str(info[4][0]) for info in socket.getaddrinfo(name, None, socket.AF_INET)}
    return sorted(names)


def own_certificate(folder: Path, names: list[str]) -> tuple[ssl.SSLContext, str]:
    """Return TLS with this device's own certificate, and the certificate's fingerprint.

    A new one is made where there is none, when it ends soon, or for another address.

    Raises:
        FederationError: the folder is not private, or the file in it is damaged.
    """
    path = keys.private_directory(folder) / CERTIFICATE
    if not (path.exists() and _is_good(keys.read_key_file(path)[1], names)):
        keys.write_private(path, b"".join(keys.self_signed(names)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(path)
    return context, keys.fingerprint(keys.read_key_file(path)[1])


def _is_good(certificate: x509.Certificate, names: list[str]) -> bool:
    return not keys.is_due(certificate) and set(names) <= keys.names_in(certificate)


def lan_address(port: int) -> str:
    """Return the address to open on a phone."""
    host = reachable_address(ALL, 0).rpartition(":")[0]
    return f"https://{join_address(host, port)}/"
