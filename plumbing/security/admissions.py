"""Who may take part: the devices that the owner admitted, and the open tokens.

A SQLite file in the keys directory, so that a running server and `server.py devices` may use
it at once, and a token with one use left admits one device, however many ask at that instant.
It holds hashes of tokens and of public keys, no secret.
"""

import math
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from federated.errors import FederationError
from plumbing import descriptors
from plumbing.security.keys import DAY, SECRET_BYTES, Token, locked, private_directory

TOKEN_SECONDS = 24 * 3600.0
TOKEN_USES = 10
BUSY_SECONDS = 10.0  # to wait while another process writes

COLUMNS = "cid, key_hash, admitted, how, last_seen, last_address, revoked"
TABLES = """
CREATE TABLE IF NOT EXISTS tokens (
    mark TEXT PRIMARY KEY, expires REAL NOT NULL, uses_left INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS devices (
    cid TEXT PRIMARY KEY, key_hash TEXT NOT NULL, certificate BLOB NOT NULL,
    admitted REAL NOT NULL, how TEXT NOT NULL,
    last_seen REAL, last_address TEXT, revoked REAL
) STRICT;
"""


class NotAdmitted(FederationError):
    """A device that may not take part; the message is for its owner."""


class ListProblem(FederationError):
    """The list cannot be used for now, on a full disk for example. No device is to blame."""


@dataclass(frozen=True)
class Admission:
    """A device that was admitted; times in seconds since 1970."""

    cid: str
    key_hash: str
    admitted: float
    how: str  # "token" or "key file"
    last_seen: float | None
    last_address: str | None
    revoked: float | None


class Admissions:
    """The list of a keys directory.

    Raises:
        ListProblem: the file cannot be used, from any method.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "admissions.sqlite"
        try:
            with locked(private_directory(directory)):
                self.path.touch(mode=0o600)
                with closing(sqlite3.connect(self.path, BUSY_SECONDS)) as db:
                    db.execute("PRAGMA journal_mode = WAL")  # readers and a writer at once
                    db.executescript(TABLES)
        except (OSError, sqlite3.Error) as error:
            raise ListProblem(f"cannot use '{self.path}': {error}") from None

    def make_token(
        self, authority_hash: str, uses: int = TOKEN_USES, seconds: float = TOKEN_SECONDS
    ) -> Token:
        """Open a token for `uses` devices, valid for `seconds`."""
        token = Token(secrets.token_bytes(SECRET_BYTES), authority_hash)
        with self._open() as db:
            # Not those that were just used up: a device may have to ask a second time.
            limit = time.time() - DAY.total_seconds()
            db.execute("DELETE FROM tokens WHERE expires < ?", [limit])
            db.execute(
                "INSERT INTO tokens VALUES (?, ?, ?)", [token.mark, time.time() + seconds, uses]
            )
        return token

    def admit_by_token(
        self, cid: str, key_hash: str, mark: str, sign: Callable[[], bytes]
    ) -> bytes:
        """Use a token up by one and return a certificate for a device.

        A device whose answer was lost on the way may ask again with the same key, until it
        has been seen: it gets the same certificate, and the token is not used again.

        Args:
            mark: the token's.
            sign: makes the certificate.

        Raises:
            NotAdmitted: no such token, none left of it, or the cid is taken.
        """
        with self._open() as db:
            token = db.execute("SELECT expires, uses_left FROM tokens WHERE mark = ?", [mark])
            expires, uses_left = token.fetchone() or (0.0, 0)
            device = self._find(db, cid)
            asks_again = device and device.key_hash == key_hash and not device.revoked
            if device and asks_again and expires and device.last_seen is None:
                row = db.execute("SELECT certificate FROM devices WHERE cid = ?", [cid]).fetchone()
                return row[0]
            if not expires:
                raise NotAdmitted("this token is not known here; take a new one from the server")
            if expires < time.time():
                raise NotAdmitted("this token has expired; take a new one from the server")
            if uses_left < 1:
                raise NotAdmitted("this token is used up; take a new one from the server")
            self._check_free(cid, device)
            db.execute("UPDATE tokens SET uses_left = uses_left - 1 WHERE mark = ?", [mark])
            certificate = sign()
            self._insert(db, cid, key_hash, certificate, "token")
            return certificate

    def admit(self, cid: str, key_hash: str, certificate: bytes) -> None:
        """Admit a device for which the owner made the key.

        Raises:
            NotAdmitted: the cid is taken.
        """
        with self._open() as db:
            self._check_free(cid, self._find(db, cid))
            self._insert(db, cid, key_hash, certificate, "key file")

    def objection(self, cid: str, key_hash: str) -> str | None:
        """Return why the device with this key may not take part as `cid`, or None."""
        with self._open("DEFERRED") as db:
            device = self._find(db, cid)
        if device is None or device.key_hash != key_hash:
            return f"the key of device {cid} is not admitted here; join again with --join=TOKEN"
        if device.revoked is not None:
            return f"device {cid} was revoked"
        return None

    def note_seen(self, seen: Iterable[tuple[str, str]]) -> None:
        """Note which devices are here, by cid and address."""
        rows = [(time.time(), address, cid) for cid, address in seen]
        with self._open(durable=False) as db:
            db.executemany("UPDATE devices SET last_seen = ?, last_address = ? WHERE cid = ?", rows)

    def revoke(self, cid: str) -> None:
        """Take a device's admission back, and close all tokens: it may know one.

        Raises:
            FederationError: there is no such device, or it is revoked already.
        """
        with self._open() as db:
            device = self._find(db, cid)
            if device is None:
                raise FederationError(
                    f"no device {cid[:64]!a} is admitted; server.py devices lists them"
                )
            if device.revoked is not None:
                when = time.strftime("%Y-%m-%d %H:%M", time.localtime(device.revoked))
                raise FederationError(f"device {cid} was revoked already, on {when}")
            db.execute("UPDATE devices SET revoked = ? WHERE cid = ?", [time.time(), cid])
            db.execute("DELETE FROM tokens")

    def prune(self, days: float = math.inf) -> list[str]:
        """Remove the revoked, and devices not seen for `days`; return their cids.

        Neither is let in afterwards: only keys on the list are. A device that was never seen
        counts from its admission on.
        """
        limit = time.time() - days * DAY.total_seconds()
        old = "revoked IS NOT NULL OR coalesce(last_seen, admitted) < ?"
        with self._open() as db:
            cids = [row[0] for row in db.execute(f"SELECT cid FROM devices WHERE {old}", [limit])]
            db.execute(f"DELETE FROM devices WHERE {old}", [limit])
        return cids

    def all(self) -> list[Admission]:
        """Return all devices, also the revoked, by name."""
        with self._open("DEFERRED") as db:
            devices = [Admission(*row) for row in db.execute(f"SELECT {COLUMNS} FROM devices")]
        return sorted(devices, key=lambda d: (not d.cid.isdigit(), d.cid.zfill(64), d.cid))

    def _check_free(self, cid: str, device: Admission | None) -> None:
        if device is not None and device.revoked is None:
            raise NotAdmitted(
                f"a device {cid} is admitted already; choose another --cid, or if it is the same "
                f"board, take its old key's admission back first: server.py devices revoke {cid}"
            )

    def _find(self, db: sqlite3.Connection, cid: str) -> Admission | None:
        row = db.execute(f"SELECT {COLUMNS} FROM devices WHERE cid = ?", [cid]).fetchone()
        return Admission(*row) if row else None

    def _insert(
        self, db: sqlite3.Connection, cid: str, key_hash: str, certificate: bytes, how: str
    ) -> None:
        db.execute(
            "INSERT OR REPLACE INTO devices VALUES (?, ?, ?, ?, ?, NULL, NULL, NULL)",
            [cid, key_hash, certificate, time.time(), how],
        )

    @contextmanager
    def _open(self, kind: str = "IMMEDIATE", durable: bool = True) -> Iterator[sqlite3.Connection]:
        """Yield a connection within one transaction, by default one that writes."""
        try:
            # Not made again if somebody removed it: an empty list would be a wrong one.
            uri = f"{self.path.absolute().as_uri()}?mode=rw"
            with (
                descriptors.reserve.released(),
                closing(sqlite3.connect(uri, BUSY_SECONDS, isolation_level=None, uri=True)) as db,
            ):
                # A device that got the answer must be admitted after a power cut, too.
                # Without FULL a write waits for the disk only where it moves what others have
                # written, such as a revocation, from SQLite's log into the list.
                db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                db.execute(f"BEGIN {kind}")
                try:
                    yield db
                except BaseException:
                    db.execute("ROLLBACK")
                    raise
                db.execute("COMMIT")
        except sqlite3.Error as error:
            raise ListProblem(f"cannot use '{self.path}': {error}") from None
