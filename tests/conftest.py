"""Real servers and clients in processes of their own, on tiny synthetic data."""

import contextlib
import functools
import gc
import os
import queue
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from PIL import Image

from plumbing import cli

os.environ.update(cli.ENVIRONMENT)  # before gRPC is imported, which reads it then


from plumbing.stream.fleet import StreamFleet
from tests.preloaded import Preloaded, Program

ROOT = Path(__file__).resolve().parent.parent
LONG = os.environ.get("LONG") == "1"  # the long forms of some tests: CONTRIBUTING.md
TORCH_PROGRAMS = ("/server.py", "/client.py")

hypothesis.settings.register_profile("any machine", deadline=None)  # how fast one is proves nothing
hypothesis.settings.load_profile("any machine")

# Programs that tests start get SIGINT as in a terminal, though a CI may run us with it ignored.
# Not by preexec_fn: that forks, and where a test of this process has used gRPC, the child may
# hang in gRPC's threads before it is another program.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that wait: the others run meanwhile."""
    items.sort(key=lambda item: item.get_closest_marker("waits") is None)


def pytest_collection_finish() -> None:
    """Leave what the imports made out of all garbage collections, as cli.start() does.

    Krum, Bulyan and QFedAvg collect garbage after each update, which takes 0.3 s otherwise.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    if preloaded.cache_info().currsize:
        preloaded().close()


@pytest.fixture
def open_fleet() -> Iterator[Callable[..., StreamFleet]]:
    """Open a fleet on a free port."""
    fleets: list[StreamFleet] = []

    def start(**options: Any) -> StreamFleet:
        settings = {
            "server_address": "127.0.0.1:0",
            "greeting": {"seed": 7},
            "admit": lambda properties: None,
            **options,
        }
        fleets.append(StreamFleet(**settings))
        return fleets[-1]

    yield start
    for fleet in fleets:
        if not fleet.closing:
            fleet.close(run_is_over=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def complaint(main: Callable[..., Any], *arguments: str) -> str:
    """Return the one line that `main` ends with; the signal handlers stay as they are."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as ending:
            main(arguments)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    line = ending.value.code
    assert isinstance(line, str), f"exit code {line} without a message"
    assert "\n" not in line
    return line


@functools.cache
def preloaded() -> Preloaded:
    return Preloaded()


class Process:
    """A program of the project whose lines can be waited for.

    Args:
        from_scratch: start server.py and client.py as a shell does, which takes 2 s more.
    """

    def __init__(
        self, *command: str | Path, cwd: Path | None = None, from_scratch: bool = False
    ) -> None:
        self.lines: list[str] = []
        self._new: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        words = [str(part) for part in command]
        # One thread each, and not what flwr has set when a test of this process imported it.
        environment = {k: v for k, v in os.environ.items() if k != "GRPC_VERBOSITY"}
        environment |= {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        self.popen: subprocess.Popen[str] | Program
        from_scratch = from_scratch or "PYTHONPATH" in environment  # other packages are wanted
        if words[0] == sys.executable and words[1].endswith(TORCH_PROGRAMS) and not from_scratch:
            self.popen = preloaded().start(words[1:], cwd, environment)
        else:
            self.popen = subprocess.Popen(
                words,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=cwd,
                env=environment,
                start_new_session=True,
            )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.popen.stdout
        for line in self.popen.stdout:
            self._new.put(line.rstrip("\n"))
        self._new.put(None)

    def wait_for(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """Return the match of the next line, from where the last call stopped, that has it."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self._new.get(timeout=max(0, deadline - time.monotonic()))
            except queue.Empty:
                line = None
            if line is None:
                raise AssertionError(f"no line with {pattern!r} in:\n{self.output}")
            self.lines.append(line)
            if match := re.search(pattern, line):
                return match

    def finish(self, seconds: float = 60) -> int:
        """Wait for the end; return the exit code, the output is in `lines` then."""
        code = self.popen.wait(seconds)
        while (line := self._new.get(timeout=10)) is not None:
            self.lines.append(line)
        return code

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)


@pytest.fixture
def launch() -> Iterator[Callable[..., Process]]:
    """Start programs; whatever still runs when the test ends is killed."""
    started: list[Process] = []

    def start(*command: str | Path, **kwargs: Any) -> Process:
        started.append(Process(*command, **kwargs))
        return started[-1]

    yield start
    for process in started:
        if process.popen.poll() is None:
            os.killpg(process.popen.pid, signal.SIGKILL)
            process.popen.wait()


@pytest.fixture
def own_images(tmp_path: Path) -> Path:
    """Make a folder with 100 images to train on, and 20 to test on."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 50), ("test", 10)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def start_server(
    launch: Callable[..., Process], tmp_path: Path
) -> Callable[..., tuple[Process, str]]:
    """Start server.py on a free port; return it and its address once it listens."""

    def start(*arguments: str, **options: str) -> tuple[Process, str]:
        settings = {
            "server_address": "127.0.0.1:0",
            "data_dir": "synthetic:400",
            "run_dir": str(tmp_path / "run"),
            "threads": "1",
            **options,
        }
        flags = [f"--{name}={value}" for name, value in settings.items()]
        server = launch(sys.executable, ROOT / "server.py", *flags, *arguments)
        address = server.wait_for(r"waiting for \d+ devices? at (\S+) ")[1]
        return server, address

    return start


@pytest.fixture
def start_client(launch: Callable[..., Process]) -> Callable[..., Process]:
    """Start client.py against a server."""

    def start(address: str, cid: str | int, *arguments: str, **options: str) -> Process:
        settings = {
            "server_address": address,
            "cid": str(cid),
            "data_dir": "synthetic:400",
            "max_wait_seconds": "60",
            "threads": "1",  # bit for bit, and without trials
            **options,
        }
        flags = [f"--{name}={value}" for name, value in settings.items()]
        return launch(sys.executable, ROOT / "client.py", *flags, *arguments)

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
        """Reset all connections, and each new one."""
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
