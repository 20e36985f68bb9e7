"""A device whose disk is full: it ends with one line, or goes on."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import token_of


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB, for keys and all else that a device writes."""
    disk = tmp_path / "disk"
    disk.mkdir(mode=0o700)
    if os.geteuid() != 0:
        pytest.skip("mounting a file system of 64 kB takes root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError:
            pass


def test_device_with_a_full_disk_cannot_join_says_so_in_one_line_and_trains_once_it_has_a_key(
    start_server, start_client, disk, tmp_path, monkeypatch, record_fault
):
    server, address = start_server(
        "--secure", keys=str(tmp_path / "owner"), rounds="3", min_num_clients="1",
        min_sample_size="1",
    )  # fmt: skip
    token = token_of(server)
    monkeypatch.setenv("CLIENT_STATUS_FILE", str(disk / "status"))
    ballast = disk / "ballast"
    fill(ballast)
    flags = [f"--join={token}", f"--keys={disk}"]
    refused = start_client(address, 0, *flags)
    assert refused.finish() == 1
    assert refused.lines[-1].startswith(f"client.py: cannot write '{disk}/device-0.pending'")
    assert refused.lines[-1].endswith("No space left on device")
    assert "Traceback" not in refused.output
    assert list(disk.glob("*device*")) == []  # no part of a key
    ballast.unlink()

    client = start_client(address, 0, *flags)  # the token has not been used up
    client.wait_for("Client 0: fit")
    fill(ballast)
    assert client.finish() == 0, client.output
    assert server.finish() == 0
    rounds = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [len(line["devices"]) for line in rounds] == [1, 1, 1]
    record_fault(
        "a device's disk is full",
        "a file system of 64 kB, filled before it joins, and again while it trains",
        "it ends with one line and leaves no part of a key; with a key it trains to the end",
    )
