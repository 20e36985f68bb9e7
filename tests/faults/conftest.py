"""What the tests of faults have in common: injecting them, and noting what came of it."""

import contextlib
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, Process

LONG = os.environ.get("LONG") == "1"  # set by report.py --long


@pytest.fixture
def record_fault() -> Callable[..., None]:
    """Note a row for report.py's table.

    Args:
        fault: what goes wrong, in an operator's words.
        injected: how this test makes it go wrong.
        happened: what the run did about it, as asserted.
        noticed_seconds: from the fault until somebody was told; None where that says nothing.
        stock: what stock Flower does, as measured (report.py says on what).
    """

    def record(
        fault: str,
        injected: str,
        happened: str,
        noticed_seconds: float | None = None,
        stock: str = "not measured",
    ) -> None:
        row = {
            "fault": fault,
            "injected": injected,
            "happened": happened,
            "noticed_seconds": noticed_seconds,
            "stock": stock,
        }
        if path := os.environ.get("FAULT_RECORDS"):
            with Path(path).open("a") as file:
                file.write(json.dumps(row) + "\n")

    return record


@pytest.fixture
def start_device(launch: Callable[..., Process]) -> Callable[..., Process]:
    """Start tests/faults/device.py against a server."""

    def start(address: str, cid: str | int, *arguments: str | Path) -> Process:
        return launch(sys.executable, ROOT / "tests/faults/device.py", address, cid, *arguments)

    return start


@pytest.fixture
def edited_client(launch: Callable[..., Process], tmp_path: Path) -> Callable[..., Process]:
    """Start client.py beside a utils.py in which a user has replaced a line."""

    def start(address: str, cid: str | int, line: str, replacement: str) -> Process:
        home = tmp_path / f"edited-{cid}"
        home.mkdir()
        for room in ("federated", "plumbing"):
            (home / room).symlink_to(ROOT / room)
        for name in ("client.py", "torch_trainer.py"):
            (home / name).write_text((ROOT / name).read_text())
        text = (ROOT / "utils.py").read_text()
        assert text.count(line) == 1, f"{line!r} is not once in utils.py"
        (home / "utils.py").write_text(text.replace(line, replacement))
        return launch(
            sys.executable,
            home / "client.py",
            f"--server_address={address}",
            f"--cid={cid}",
            "--data_dir=synthetic:400",
            "--max_wait_seconds=60",
        )

    return start


class Link:
    """A stretch of network in front of a server: a TCP proxy that can be cut or fall silent."""

    def __init__(self, server_address: str) -> None:
        host, _, port = server_address.rpartition(":")
        self.target = (host, int(port))
        self.attempts: list[float] = []  # when somebody tried to connect
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._carries, self._connects = True, True
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def silence(self) -> None:
        """Carry nothing any more; connections stay open, and new ones are not answered."""
        self._carries = False

    def cut(self) -> None:
        """Reset all connections, and whoever connects anew."""
        self._connects = False
        self._reset_all()

    def heal(self) -> None:
        """Carry new connections; the silent ones have been given up by a router in between."""
        self._reset_all()
        self._carries = self._connects = True

    def close(self) -> None:
        self._connects = False
        self._listener.close()
        self._reset_all()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.attempts.append(time.monotonic())
            self._sockets.append(near)
            if not self._connects:
                self._reset(near)
            elif self._carries:
                try:
                    far = socket.create_connection(self.target)
                except OSError:
                    self._reset(near)
                    continue
                self._sockets.append(far)
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if self._carries:
                    sink.sendall(data)
        while not self._carries:  # the end is lost like all else
            time.sleep(0.05)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _reset_all(self) -> None:
        while self._sockets:
            self._reset(self._sockets.pop())

    @staticmethod
    def _reset(end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads it
        end.close()


@pytest.fixture
def make_link() -> Iterator[Callable[[str], Link]]:
    links: list[Link] = []

    def make(server_address: str) -> Link:
        links.append(Link(server_address))
        return links[-1]

    yield make
    for link in links:
        link.close()
