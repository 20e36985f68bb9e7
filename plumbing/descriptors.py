"""File descriptors: each connection takes one, and some must be left for the run's own files.

Connections meet a limit that is RESERVE below what the process may open; the difference is
there for code that writes a file:

    with descriptors.reserve.released():
        path.write_bytes(data)

gRPC accepts connections until there is no descriptor left, and has no limit of its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from federated.errors import FederationError

RESERVE = 64
OTHERS = 64  # a server's own files, and connections that are being made
MOST = 1 << 14  # raised no further: at 20 kB a connection, strangers can take 330 MB of memory
PATIENCE_SECONDS = 30.0  # until strangers' connections that took the reserve are closed
PAUSE_SECONDS = 0.1

T = TypeVar("T")


class Reserve:
    """Descriptors of this process that connections cannot take, once `hold` was called."""

    def __init__(self) -> None:
        self.limit = 0  # of the process; 0 while nothing is held back
        self._users = 0
        self._lock = threading.Lock()

    def hold(self) -> None:
        """Raise the soft limit to the hard one or MOST, and hold RESERVE back."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.limit = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
        if soft != resource.RLIM_INFINITY:
            self.limit = max(self.limit, soft)  # the owner asked for more
        try:
            self._set(self.limit - RESERVE)
        except (OSError, ValueError):  # macOS names a hard limit that it does not grant
            self.limit = soft
            self._set(self.limit - RESERVE)

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Let this process open RESERVE more files within the block, also in other threads."""
        with self._lock:
            self._users += 1
            if self.limit:
                self._set(self.limit)
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self.limit and not self._users:
                    self._set(self.limit - RESERVE)

    def call(self, function: Callable[[], T]) -> T:
        """Call `function`, which opens files, with the reserve released.

        A flood of connections may take the reserve in this instant. It is free again when they
        are closed: until then the call is repeated, which must do no harm.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                with self.released():
                    return function()
            except OSError as error:
                if error.errno != errno.EMFILE or time.monotonic() > deadline:
                    raise
            time.sleep(PAUSE_SECONDS)

    @staticmethod
    def _set(soft: int) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


reserve = Reserve()


def check(num_devices: int) -> None:
    """Raise FederationError if this process cannot have that many connections."""
    needed = num_devices + RESERVE + OTHERS
    if reserve.limit and needed > reserve.limit:
        raise FederationError(
            f"{num_devices:,} devices need {needed:,} file descriptors, and this process may "
            f"have {reserve.limit:,}; raise the limit first: ulimit -n {needed} as root, or "
            f"LimitNOFILE={needed} in a systemd unit"
        )


def shortage() -> str | None:
    """Return why no further connection can be accepted for now, or None."""
    try:
        os.close(os.dup(2))
        return None
    except OSError as error:
        if error.errno != errno.EMFILE:
            return None
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    twice = 2 * (reserve.limit or limit)
    return (
        f"all {limit:,} file descriptors that connections may take are in use; for more devices "
        f"raise the limit to {twice:,} (ulimit -n {twice} as root), against strangers use a "
        "firewall: docs/security.md"
    )
