"""More connections than file descriptors: the run's own files are written all the same.

LONG=1 trains for 300 rounds under the flood instead of 60.
"""

import json
import sys
import time

import pytest

from tests.conftest import LONG, ROOT

LIMIT = 1024
ROUNDS = 300 if LONG else 60
SECONDS = 300 if LONG else 90  # that the flood lasts, and the run may take


@pytest.fixture
def start_limited_server(launch, tmp_path):
    """Start server.py with so many file descriptors, and not one more."""

    def start(*arguments: str, limit: int = LIMIT):
        return launch(
            "sh", "-c", f'ulimit -n {limit} && exec "$@"', "sh", sys.executable,
            ROOT / "server.py", "--server_address=127.0.0.1:0", "--data_dir=synthetic:400",
            f"--run_dir={tmp_path / 'run'}", *arguments,
        )  # fmt: skip

    return start


@pytest.mark.timeout(SECONDS + 60)
def test_run_ends_well_while_silent_connections_take_every_descriptor(
    start_limited_server, start_client, launch, tmp_path, record_fault
):
    server = start_limited_server(
        "--secure", f"--keys={tmp_path / 'owner'}", f"--rounds={ROUNDS}", "--min_num_clients=1",
        "--min_sample_size=1", "--batch_size=64", "--epochs=1",
    )  # fmt: skip
    address = server.wait_for(r"waiting for 1 device at (\S+) ")[1]
    (token,) = [line.split("--join=")[1].split()[0] for line in server.lines if "--join" in line]
    client = start_client(address, 0, f"--join={token}", f"--keys={tmp_path / 'device'}")
    server.wait_for(r"^round 1/")
    for _ in range(2):
        launch(sys.executable, ROOT / "tests/faults/flood.py", address, "700", str(SECONDS))
    start = time.monotonic()
    server.wait_for(r"refused further connections: all 960 file descriptors .* in use; .* 2,048")
    full = time.monotonic() - start
    begun = sum(line.startswith("round ") for line in server.lines)
    assert server.finish(SECONDS) == 0, server.output
    seconds = time.monotonic() - start - full
    assert client.finish(60) == 0
    rounds = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    print(f"full after {full:.1f} s, then {len(rounds)} rounds in {seconds:.1f} s\n{server.output}")
    assert [r["server_round"] for r in rounds] == list(range(1, ROUNDS + 1))
    assert (tmp_path / "run/model.safetensors").exists()
    assert begun < ROUNDS - 10  # else it was over before the flood was there
    assert "cannot write" not in server.output
    assert not [line for line in server.lines if "File descriptor limit" in line]
    record_fault(
        "silent TCP connections, opened again and again, take all 1,024 file descriptors",
        "1,400 connections from two programs on the same machine",
        f"reported to the owner; {ROUNDS - begun} rounds and the model are written meanwhile",
        full,
    )


def test_more_devices_than_descriptors_is_refused_with_the_number_needed(start_limited_server):
    server = start_limited_server("--min_num_clients=1100")
    assert server.finish(60) == 1
    assert server.lines == [
        "server.py: 1,100 devices need 1,228 file descriptors, and this process may have 1,024; "
        "raise the limit first: ulimit -n 1228 as root, or LimitNOFILE=1228 in a systemd unit"
    ]
