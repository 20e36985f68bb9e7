"""Devices that hold up others or fill the memory, with updates of ResNet18's size."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture
def hostile(launch):
    """Start devices of tests/faults/hostile.py."""

    def start(address: str, count: int, behaviour: str):
        return launch(
            sys.executable, ROOT / "tests/faults/hostile.py", address, str(count), behaviour
        )

    return start


@pytest.fixture
def honest(launch):
    """Start one simulated device, which has no fault."""

    def start(address: str):
        return launch(
            sys.executable,
            ROOT / "benchmarks/light_clients.py",
            f"--server_address={address}",
            "--clients=1",
            "--model=ResNet18",
        )

    return start


def peak_megabytes(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 // 1_000_000


def rounds_of(run: Path) -> list[dict]:
    return [*map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("stall", "offered its update, then sent nothing for"),
        ("trickle", "offered its update, then"),
    ],
)
def test_devices_that_offer_and_send_nothing_cost_the_others_seconds_and_no_round(
    start_server, honest, hostile, tmp_path, record_fault, behaviour, reason
):
    server, address = start_server(
        rounds="2",
        model="ResNet18",
        data_dir="synthetic:100",
        min_num_clients="4",
        min_sample_size="4",
        num_partitions="4",
        round_timeout="10",
    )
    hostile(address, 3, behaviour)
    server.wait_for("device h2 joined|device h1 joined", 60)
    honest(address)
    assert server.finish(150) == 0, server.output
    rounds = rounds_of(tmp_path / "run")
    print(server.output)
    for line in rounds:
        assert [device["name"] for device in line["devices"]] == ["device 0"]
        assert sorted(drop["name"] for drop in line["dropped"]) == [
            f"device h{i}" for i in range(3)
        ]
        assert all(reason in drop["reason"] for drop in line["dropped"]), line["dropped"]
        assert line["seconds"] < 25, line["seconds"]
    record_fault(
        f"3 of 4 devices with ResNet18 offer their update ({behaviour})",
        "--round_timeout 10; they send " + ("nothing" if behaviour == "stall" else "64 kB"),
        "dropped by name; the honest device counts in each round, which took "
        + ", ".join(f"{line['seconds']:.0f} s" for line in rounds),
        max(line["seconds"] for line in rounds),
    )
