"""Start programs in processes that have torch loaded already.

To import torch takes 2 s of processor time, and the tests start server.py and client.py some 200
times. So one process imports it, does nothing else, and forks for each program. What it starts
has a process number, a session, sockets and signals of its own, like a program of a shell's.
"""

import gc
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

# Not gRPC, whose threads would not survive a fork, nor anything that imports it. httpx is the
# largest of flwr's imports.
PACKAGES = (
    "numpy", "torch", "matplotlib.figure", "matplotlib.backends.backend_agg", "PIL.Image",
    "safetensors.numpy", "cryptography.x509", "google.protobuf.message", "httpx",
)  # fmt: skip


class Program:
    """A program that was started; what the tests need of subprocess.Popen."""

    def __init__(self, pid: int, stdout: int) -> None:
        self.pid = pid
        self.stdout = os.fdopen(stdout, encoding="utf-8", errors="replace")
        self.returncode: int | None = None
        self._ended = threading.Event()

    def end(self, returncode: int) -> None:
        self.returncode = returncode
        self._ended.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout) or self.returncode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class Preloaded:
    """The process that forks, from the side of the tests."""

    def __init__(self) -> None:
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(other.fileno())],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # which torch reads when it is loaded
            pass_fds=[other.fileno()],
            start_new_session=True,
        )
        other.close()
        self._programs: dict[int, Program] = {}
        self._started = threading.Semaphore(0)
        self._pid = 0
        self._lock = threading.Lock()
        self._outputs: list[int] = []
        threading.Thread(target=self._read, daemon=True).start()

    def start(
        self, arguments: Sequence[str], cwd: Path | None, environment: Mapping[str, str]
    ) -> Program:
        """Run `python ARGUMENTS`; its output, also that on stderr, is in `stdout`."""
        ours, theirs = os.pipe()
        request = [[*arguments], str(cwd or Path.cwd()), dict(environment)]
        with self._lock:
            self._outputs.append(ours)
            socket.send_fds(self._socket, [json.dumps(request).encode()], [theirs])
            os.close(theirs)
            self._started.acquire()
            return self._programs[self._pid]

    def close(self) -> None:
        """End the process that forks."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._process.wait(10)

    def _read(self) -> None:
        while data := self._socket.recv(1000):
            pid, status = json.loads(data)
            if status is not None:
                self._programs.pop(pid).end(os.waitstatus_to_exitcode(status))
                continue
            self._programs[pid] = Program(pid, self._outputs.pop())
            self._pid = pid
            self._started.release()


def fork_for_each_request(connection: socket.socket) -> list[str]:
    """Fork until the tests end; return, in each child, the arguments of its program."""
    awake, asleep = os.pipe()
    os.set_blocking(asleep, False)
    signal.set_wakeup_fd(asleep)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([connection, awake], [], [])
        if awake in ready:
            os.read(awake, 1000)
            report_ended(connection)
        if connection in ready:
            data, outputs, _, _ = socket.recv_fds(connection, 1 << 20, 1)
            if not data:
                sys.exit()
            if os.fork() == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.close(awake)
                os.close(asleep)
                return become(connection, json.loads(data), outputs[0])
            os.close(outputs[0])


def report_ended(connection: socket.socket) -> None:
    """Report all children that have ended."""
    try:
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            connection.send(json.dumps(ended).encode())
    except ChildProcessError:  # there is none left
        pass


def become(connection: socket.socket, request: list, output: int) -> list[str]:
    """Make this process what the request asks for; return the arguments of its program."""
    arguments, directory, environment = request
    os.setsid()
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    connection.send(json.dumps([os.getpid(), None]).encode())
    connection.close()
    return arguments


def main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        for name in PACKAGES:
            __import__(name)
        assert "grpc" not in sys.modules
        assert len([*Path("/proc/self/task").iterdir()]) == 1, "a thread would not survive a fork"
        gc.collect()
        gc.freeze()
        sys.argv = fork_for_each_request(connection)
        random.seed()  # no two devices wait equally long
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
