"""Server and real client.py processes are killed; the run ends where an undisturbed one does.

Two devices and two kills. With LONG=1 four devices, 100 rounds and kills at random for ten
minutes.
"""

import json
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.numpy

from tests.conftest import LONG, ROOT, Process, free_port

DEVICES, ROUNDS, IMAGES = (4, 100, 4000) if LONG else (2, 4, 400)
KILLING_SECONDS = 600
SECONDS = 3000 if LONG else 200


class Run:
    """A server at the address of its devices; whatever is killed is started again at once."""

    data = f"--data_dir=synthetic:{IMAGES}"

    def __init__(self, launch: Callable[..., Process], directory: Path, address: str) -> None:
        self.launch = launch
        self.directory = directory
        self.address = address
        self.devices: list[Process] = []
        self.killed = {"server": 0, "device": 0}
        self.server = self.start_server(
            f"--run_dir={directory}", f"--rounds={ROUNDS}", "--partition=dirichlet:1", "--seed=5",
            f"--min_num_clients={DEVICES}", f"--min_sample_size={DEVICES}",
            f"--min_replies={DEVICES}", "--round_retries=1000", self.data,
        )  # fmt: skip

    def start_server(self, *flags: str) -> Process:
        return self.launch(
            sys.executable, ROOT / "server.py", f"--server_address={self.address}", *flags
        )

    def start_device(self, cid: int) -> Process:
        # They stay: for the second run, and because a server that is killed after the last round
        # may have parted from some.
        return self.launch(
            sys.executable, ROOT / "client.py", f"--server_address={self.address}",
            f"--cid={cid}", "--threads=1", "--stay", self.data,
        )  # fmt: skip

    def finished(self) -> int:
        """Return how many rounds are in the checkpoint."""
        path = self.directory / "checkpoint.safetensors"
        if not path.exists():
            return 0
        with safetensors.safe_open(path, "np") as file:
            return int(file.metadata()["server_round"])

    def wait_for_round(self, server_round: int) -> None:
        deadline = time.monotonic() + 120
        while self.finished() < server_round:
            assert time.monotonic() < deadline, self.server.output
            time.sleep(0.02)

    def kill(self, victim: int) -> None:
        """Kill the device of that number, or the server for any other one."""
        process = self.devices[victim] if victim < DEVICES else self.server
        process.signal(signal.SIGKILL)
        process.popen.wait()
        self.killed["device" if victim < DEVICES else "server"] += 1
        if victim < DEVICES:
            self.devices[victim] = self.start_device(victim)
        else:
            self.server = self.start_server(f"--resume={self.directory}")

    def kill_at_random(self) -> float:
        """Kill for so long, or until the run is over; return the seconds."""
        rng = random.Random(0)
        start = time.monotonic()
        while self.server.popen.poll() is None and time.monotonic() < start + KILLING_SECONDS:
            self.kill(rng.randrange(DEVICES + 1))
            pause = time.monotonic() + rng.uniform(1, 12)
            while time.monotonic() < pause and self.server.popen.poll() is None:
                time.sleep(0.02)
        return time.monotonic() - start

    def finish(self) -> None:
        assert self.server.finish(SECONDS) == 0, self.server.output


def rounds_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(SECONDS)
def test_run_whose_server_and_devices_are_killed_ends_bit_for_bit_as_an_undisturbed_one(
    launch, record_fault, tmp_path
):
    address = f"127.0.0.1:{free_port()}"
    broken = Run(launch, tmp_path / "broken", address)
    broken.devices += [broken.start_device(cid) for cid in range(DEVICES)]
    broken.wait_for_round(1)
    start = time.monotonic()
    if LONG:
        broken.kill_at_random()
    else:
        broken.kill(DEVICES)
        broken.wait_for_round(2)
        broken.kill(1)
    seconds = time.monotonic() - start
    broken.finish()
    unbroken = Run(launch, tmp_path / "unbroken", address)  # the devices come to it
    unbroken.finish()

    found, expected = (rounds_of(run.directory) for run in (broken, unbroken))
    print(f"{broken.killed} in {seconds:.0f} s, {len(found)} rounds")
    assert [line["server_round"] for line in found] == list(range(1, ROUNDS + 1))
    for name in ("server_round", "loss", "accuracy"):
        assert [line[name] for line in found] == [line[name] for line in expected]
    models = [
        safetensors.numpy.load_file(run.directory / "model.safetensors")
        for run in (broken, unbroken)
    ]
    assert {n: a.tobytes() for n, a in models[0].items()} == {
        n: a.tobytes() for n, a in models[1].items()
    }
    record_fault(
        f"SIGKILL of server.py and of {DEVICES} client.py that train Net",
        f"the server {broken.killed['server']} times, devices {broken.killed['device']} times"
        + (f", at random for {seconds / 60:.0f} minutes" if LONG else ""),
        f"{ROUNDS} rounds, each once; the model is bit for bit that of an undisturbed run",
        stock="history and model lost; clients exit 1, nobody re-connects",
    )
