"""An hour of rounds, with LONG=1: memory, threads and open files stay where they are.

A secured server.py, two real client.py, a device that is killed and started again every
minute, and strangers at the port every ten seconds.
"""

import contextlib
import os
import re
import signal
import socket
import statistics
import time
from pathlib import Path

import pytest

from plumbing.addresses import parse_address
from tests.conftest import LONG
from tests.faults.conftest import token_of

SECONDS = int(os.environ.get("SOAK_SECONDS", "3600"))
EVERY_SECONDS = 10.0


def footprint(pid: int) -> dict[str, int]:
    """Return resident kilobytes, threads and open files of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident, threads = (
        int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "Threads")
    )
    return {"kB": resident, "threads": threads, "files": len([*Path(f"/proc/{pid}/fd").iterdir()])}


def medians(samples: list[dict[str, int]]) -> dict[str, float]:
    return {name: statistics.median(s[name] for s in samples) for name in samples[0]}


def in_words(held: dict[str, float]) -> str:
    return f"{held['kB'] / 1000:.1f} MB, {held['threads']:.0f} threads, {held['files']:.0f} files"


@pytest.mark.skipif(not LONG, reason="an hour; LONG=1 runs it")
@pytest.mark.timeout(SECONDS + 600)  # a busy machine takes minutes until the first round
def test_an_hour_of_rounds_leaves_memory_threads_and_files_as_they_were(
    start_server, start_client, start_device, record_fault, tmp_path
):
    server, address = start_server(
        "--secure", keys=str(tmp_path / "owner"), rounds="1000000", data_dir="synthetic:2000"
    )
    token = token_of(server)
    clients = [
        start_client(
            address, cid, "--threads=1", f"--join={token}", f"--keys={tmp_path / 'device'}",
            data_dir="synthetic:2000",
        )
        for cid in (0, 1)
    ]  # fmt: skip
    server.wait_for(r"^round 1\b", 120)
    watched = {"server.py": server.popen.pid, "client.py": clients[0].popen.pid}
    held: dict[str, list[dict[str, int]]] = {name: [] for name in watched}
    end, minute, restless = time.monotonic() + SECONDS, 0.0, None
    while time.monotonic() < end:
        if time.monotonic() > minute + 60:
            minute = time.monotonic()
            if restless:
                restless.signal(signal.SIGKILL)
            restless = start_device(
                address, 2, "--add=0", "--join", token, "--keys", tmp_path / "device"
            )
        strangers = contextlib.ExitStack()
        with strangers, contextlib.suppress(OSError):
            for number in range(20):
                peer = socket.create_connection(parse_address(address), timeout=5)
                strangers.enter_context(peer)
                peer.sendall(os.urandom(1000 * (number % 2)))
            time.sleep(EVERY_SECONDS / 2)
        time.sleep(EVERY_SECONDS / 2)
        for name, pid in watched.items():
            held[name].append(footprint(pid))
    changes: dict[str, dict[str, float]] = {}
    rounds = len((tmp_path / "run/metrics.jsonl").read_text().splitlines())
    server.signal(signal.SIGINT)
    assert server.finish() == 130, server.output[-2000:]
    for name, samples in held.items():
        sixth = len(samples) // 6
        first, last = medians(samples[sixth : 2 * sixth]), medians(samples[-sixth:])
        for number in range(0, len(samples), max(1, len(samples) // 12)):
            print(f"{name} after {number * EVERY_SECONDS / 60:.0f} min: {samples[number]}")
        print(f"{name}: {in_words(first)}; at the end {in_words(last)}; {rounds} rounds")
        record_fault(
            f"{SECONDS / 60:.0f} minutes of training, {name}",
            f"{rounds:,} rounds with two client.py and a device that is killed every minute; 20 "
            "strangers at the port every 10 s",
            f"in the second sixth {in_words(first)}, in the last {in_words(last)}",
        )
        changes[name] = {what: last[what] - first[what] for what in first}
    for name, change in changes.items():
        assert change["kB"] < 0.02 * held[name][0]["kB"], name
        # gRPC starts one more when the machine is busy, a megabyte or two each.
        assert change["threads"] <= 2, name
        assert change["files"] <= 1, name
