"""Devices that hold up others or fill the memory, with updates of ResNet18's size."""

import json
import re
import sys
import time
from pathlib import Path

import pytest

from plumbing.security import keys
from plumbing.security.admissions import Admissions
from plumbing.security.owner import admit
from tests.conftest import LONG, ROOT

DEVICES = 12
long_form = pytest.mark.skipif(not LONG, reason="with LONG=1; the next row shows the same limit")


@pytest.fixture
def hostile(launch):
    """Start devices of tests/faults/hostile.py."""

    def start(address: str, count: int, *arguments: str | Path):
        return launch(
            sys.executable, ROOT / "tests/faults/hostile.py", address, str(count), *arguments
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
    """Return VmHWM; 0 for a process that has ended."""
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 // 1_000_000 if found else 0


def rounds_of(run: Path) -> list[dict]:
    return [*map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]


REASONS = {
    "device stall-0": "offered its update, then sent nothing for",
    "device stall-1": "offered its update, then sent nothing for",
    "device trickle-0": "offered its update, then sent ",
}


@pytest.mark.timeout(180)
def test_devices_that_offer_and_send_nothing_cost_the_others_seconds_and_no_round(
    start_server, honest, hostile, tmp_path, record_fault
):
    server, address = start_server(
        rounds="2" if LONG else "1",
        model="ResNet18",
        data_dir="synthetic:100",
        min_num_clients="4",
        min_sample_size="4",
        num_partitions="4",
        round_timeout="10",
    )
    hostile(address, 2, "stall")
    hostile(address, 1, "trickle")
    for _ in REASONS:
        server.wait_for("device (stall|trickle)-. joined")
    honest(address)
    assert server.finish(150) == 0, server.output
    rounds = rounds_of(tmp_path / "run")
    print(server.output)
    for line in rounds:
        assert [device["name"] for device in line["devices"]] == ["device 0"]
        dropped = {drop["name"]: drop["reason"] for drop in line["dropped"]}
        assert dropped.keys() == REASONS.keys()
        assert all(REASONS[name] in reason for name, reason in dropped.items()), dropped
        assert line["seconds"] < 15, line["seconds"]
    record_fault(
        "3 of 4 devices with ResNet18 offer their update",
        "--round_timeout 10; two send nothing of it, one 64 kB",
        "dropped by name; the honest device counts in each round, which took "
        + ", ".join(f"{line['seconds']:.0f} s" for line in rounds),
        max(line["seconds"] for line in rounds),
    )


TOO_LARGE = "it sent a message that is too large"
NO_OFFER = "where it had to offer its update"


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("behaviour", "secure", "reason", "most_megabytes"),
    [
        ("whole 88", True, TOO_LARGE, 100),
        pytest.param("whole 88", False, TOO_LARGE, 100, marks=long_form),
        pytest.param("whole 46", False, NO_OFFER, 500, marks=long_form),
        ("announced 46", False, NO_OFFER, 300),
        ("chunk 46", False, r"sent [\d,]+ bytes, asked for [\d,]+ of its update", 300),
        pytest.param("silent 46", False, "no reply in 10 s", 100, marks=long_form),
        pytest.param("stock 88", False, TOO_LARGE, 100, marks=long_form),
        ("stock 46", False, "not float32", 600),
    ],
)
def test_replies_that_are_no_offers_do_not_fill_the_memory(
    start_server, hostile, tmp_path, record_fault, behaviour, secure, reason, most_megabytes
):
    behaviour, _, megabytes = behaviour.partition(" ")
    flags, directory = [], []
    if secure:
        out = tmp_path / "devices"
        authority = keys.Authority(tmp_path / "owner")
        cids = [f"{behaviour}-{i}" for i in range(DEVICES)]
        list(admit(authority, Admissions(tmp_path / "owner"), cids, out))
        flags, directory = ["--secure", f"--keys={tmp_path / 'owner'}"], [out]
    server, address = start_server(
        *flags,
        rounds="1",
        round_retries="0",
        model="ResNet18",
        data_dir="synthetic:100",
        min_num_clients=str(DEVICES),
        min_sample_size=str(DEVICES),
        num_partitions=str(DEVICES),
        round_timeout="10" if behaviour == "silent" else "30",
    )
    before = peak = peak_megabytes(server.popen.pid)
    hostile(address, DEVICES, behaviour, megabytes, *directory)
    dropped: list[str] = []  # stock clients have no names
    peak = before
    while len(dropped) < DEVICES:
        found = server.wait_for(r"round 1: dropped (device \S+): (.*)", 60)
        assert re.search(reason, found[2]), found[2]
        peak = peak_megabytes(server.popen.pid) or peak
        if found[1] not in dropped or behaviour == "stock":
            dropped.append(found[1])
    peak = peak_megabytes(server.popen.pid) or peak
    print(f"{DEVICES} x {megabytes} MB, {behaviour}, secure {secure}: {before} MB, peak {peak} MB")
    assert peak - before < most_megabytes
    record_fault(
        f"{DEVICES} devices send {megabytes} MB at the same time, with ResNet18",
        DEEDS[behaviour] + (", at a secured server" if secure else ", at an open server"),
        f"dropped by name; the server's memory grew from {before} to at most {peak} MB",
    )


DEEDS = {
    "whole": "they announce nothing, and each had to offer its update first",
    "announced": "they announce a reply, and each had to offer its update first",
    "silent": "they announce nothing, though they promised to",
    "chunk": "each was asked for 64 kB of its update",
    "stock": "as stock clients",
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("behaviour", ["greeting", pytest.param("greeted", marks=long_form)])
def test_greetings_of_a_models_size_do_not_fill_the_memory_nor_keep_a_device_out(
    start_server, hostile, honest, record_fault, behaviour
):
    server, address = start_server(
        rounds="1",
        model="ResNet18",
        data_dir="synthetic:100",
        min_num_clients="1",
        min_sample_size="1",
    )
    before = peak_megabytes(server.popen.pid)
    hostile(address, DEVICES, behaviour, "46")
    server.wait_for("refused 127.0.0.1: it did not report what it is", 60)
    start = time.monotonic()
    honest(address)
    server.wait_for("device 0 joined", 60)
    seconds = time.monotonic() - start
    grown = peak_megabytes(server.popen.pid) - before
    print(f"{DEVICES} {behaviour}: {grown} MB more, a device joined in {seconds:.1f} s")
    assert grown < 300
    assert server.finish(100) == 0, server.output
    record_fault(
        f"{DEVICES} devices greet an open server with 46 MB, again and again, with ResNet18",
        "each announces it" if behaviour == "greeted" else "unannounced",
        f"refused; the server grew by {grown} MB; a device joined in {seconds:.1f} s",
        seconds,
    )


@long_form
@pytest.mark.timeout(120)
def test_devices_that_take_nothing_of_the_model_neither_fill_the_memory_nor_cost_a_round(
    start_server, hostile, honest, tmp_path, record_fault
):
    count = str(DEVICES + 1)
    server, address = start_server(
        rounds="1",
        model="ResNet18",
        data_dir="synthetic:100",
        min_num_clients=count,
        min_sample_size=count,
        num_partitions=count,
        round_timeout="30",
    )
    before = peak_megabytes(server.popen.pid)
    hostile(address, DEVICES, "deaf")
    server.wait_for(r"device deaf-\d+ joined", 60)
    honest(address)
    server.wait_for("^round 1/1", 90)
    grown = peak_megabytes(server.popen.pid) - before
    assert server.finish(60) == 0, server.output
    (line,) = rounds_of(tmp_path / "run")
    print(f"{DEVICES} deaf: {grown} MB more, device 0 took {line['devices'][0]['seconds']:.1f} s")
    assert [device["name"] for device in line["devices"]] == ["device 0"]
    record_fault(
        f"{DEVICES} devices with ResNet18 join, and read nothing of the model",
        "--round_timeout 30",
        f"the honest device counts; the server grew by {grown} MB",
    )
