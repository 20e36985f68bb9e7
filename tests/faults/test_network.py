"""Links that die in silence, come and go, or lead nowhere."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from federated.errors import FederationError, NotYet
from plumbing.stream import device as transport
from tests.conftest import LONG, ROOT, Process

SILENCE = "carries nothing any more, sockets stay open"


class Moment:
    """When a process next prints a line with `pattern`, waited for in the background."""

    def __init__(self, process: Process, pattern: str) -> None:
        self.at = float("nan")
        self._thread = threading.Thread(target=self._wait, args=(process, pattern), daemon=True)
        self._thread.start()

    def _wait(self, process: Process, pattern: str) -> None:
        process.wait_for(pattern, 60)
        self.at = time.monotonic()

    def since(self, start: float) -> float:
        self._thread.join()
        return self.at - start


@pytest.mark.waits
def test_link_that_dies_in_silence_is_noticed_on_both_sides_within_30_s(
    start_server, start_client, start_device, make_link, record_fault, tmp_path
):
    server, address = start_server(
        rounds="1", min_num_clients="4", min_sample_size="4", epochs="3", partition="none"
    )
    links = [make_link(address), make_link(address)]
    start_device(address, "steady", "--gate", tmp_path / "steady")
    stopped = start_device(address, "stopped", "--gate", tmp_path / "never")
    done = start_client(links[0].address, "done")
    training = start_device(links[1].address, "training", "--gate", tmp_path / "training")
    for name in ("steady", "training"):
        (tmp_path / name).mkdir()
    done.wait_for("Epoch took: .*")
    done.wait_for("Epoch took: .*")
    done.wait_for("Epoch took: .*")
    for device in (stopped, training):
        device.wait_for("fit of round 1")
    time.sleep(1)  # until the server has asked for the weights of the one that is done

    silent = time.monotonic()
    for link in links:
        link.silence()
    stopped.signal(signal.SIGSTOP)
    moment = Moment(done, "left .* next try in")
    left = {}
    while len(left) < 3:
        name = server.wait_for("device (done|training|stopped) left", 40)[1]
        left[name] = time.monotonic() - silent
    on_device = moment.since(silent)
    assert max(left.values()) < 30
    assert on_device < 30
    record_fault(
        "link silently dead in mid-fit",
        f"TCP proxy that {SILENCE}",
        "server notices by its keepalive; what the device trains meanwhile counts (below)",
        left["training"],
        "server notices after 229 s",
    )
    record_fault(
        "link silently dead, device idle",
        f"TCP proxy that {SILENCE}",
        "the device notices too and tries again until it is through",
        on_device,
        "never (no keepalive on the client's channel)",
    )
    record_fault(
        "device hangs, no --round_timeout",
        "SIGSTOP in mid-fit",
        "noticed by keepalive; the round goes on",
        left["stopped"],
        "the round stalls 269 s",
    )

    for link in links:
        link.heal()
    (tmp_path / "training" / "round-1").touch()
    again = {server.wait_for("device (done|training) joined", 60)[1] for _ in "12"}
    assert again == {"done", "training"}
    (tmp_path / "steady" / "round-1").touch()
    server.wait_for("round 1: dropped device stopped: the connection broke")
    server.wait_for("round 1/1  devices 3/4")
    assert server.finish() == 0
    assert (done.finish(), training.finish()) == (0, 0)
    assert done.lines.count("Client done: fit") == 1
    assert training.output.count("fit of round 1") == 1


@pytest.mark.waits
def test_epoch_trained_while_the_link_was_down_counts_in_its_round(
    start_server, start_client, start_device, make_link, record_fault, tmp_path
):
    server, address = start_server(rounds="1", epochs="20", partition="none")
    link = make_link(address)
    start_device(address, "steady", "--gate", tmp_path)
    mobile = start_client(link.address, "mobile")
    mobile.wait_for("Epoch took")
    link.cut()
    cut = time.monotonic()
    server.wait_for("device mobile left")
    noticed = time.monotonic() - cut
    assert noticed < 2
    for _ in range(19):
        mobile.wait_for("Epoch took")
    mobile.wait_for("left .* next try in")
    mobile.wait_for(r"no server at \S+ yet .*, next try in")
    link.heal()
    server.wait_for("device mobile joined")
    time.sleep(0.5)  # its reply needs no more than a round trip
    (tmp_path / "round-1").touch()
    server.wait_for("round 1/1  devices 2/2")
    assert server.finish() == 0
    assert mobile.finish() == 0
    assert mobile.lines.count("Client mobile: fit") == 1
    (metrics,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert metrics["dropped"] == []
    record_fault(
        "link that comes and goes",
        "TCP proxy that resets all connections while the device trains, healed after that",
        "the epoch trained meanwhile is delivered, and counts in its round: devices 2/2",
        noticed,
        "the device exits 1 and its epoch is lost; nobody re-connects",
    )


@pytest.fixture
def swallowing_address() -> Iterator[str]:
    """An address on loopback whose backlog is full: packets that would connect vanish."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = []
        for _ in range(8):
            fillers.append(socket.socket())
            fillers[-1].setblocking(False)
            fillers[-1].connect_ex(listener.getsockname())
        with socket.socket() as probe:
            probe.settimeout(0.5)
            try:
                probe.connect(listener.getsockname())
                pytest.skip("this system takes connections beyond the backlog")
            except TimeoutError:
                pass
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        for filler in fillers:
            filler.close()


def refusing_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


def test_max_wait_seconds_is_kept_to_a_second_wherever_the_address_leads(
    start_device, swallowing_address, record_fault
):
    starts = {
        address: start_device(address, 0, "--max_wait_seconds=5")
        for address in (refusing_address(), swallowing_address)
    }
    for address, device in starts.items():
        assert device.finish() == 1
        assert f"device.py: no server at {address} for 5 s, giving up" in device.lines[-1]
        waited = float(re.search(r"after (\S+) s", device.output)[1])
        assert 5 <= waited < 6.5
    record_fault(
        "no server at the address, ever",
        "port refused; packets swallowed (full backlog); --max_wait_seconds 5",
        "gives up within a second and a half of the time set, exit 1, with the reason",
        waited,
        "exits 1 at once; max_wait_time is ignored",
    )


class Unready:
    """An identity that cannot be used yet: each attempt to connect ends there, after 0 to 10 s."""

    def __init__(self, clock: "Clock") -> None:
        self.clock = clock
        self.attempts: list[float] = []

    def prepare(self, server_address: str, seconds: float) -> None:
        self.attempts.append(self.clock.now)
        self.clock.sleep(min(seconds, len(self.attempts) % 11))
        raise NotYet("no answer")


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_attempts_to_connect_are_never_more_than_30_s_apart(monkeypatch):
    clock = Clock()
    identity = Unready(clock)
    monkeypatch.setattr(time, "sleep", clock.sleep)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    with pytest.raises(FederationError, match="for 18000 s, giving up"):
        transport.serve("127.0.0.1:1", None, lambda state: None, 18_000, identity=identity)
    gaps = [b - a for a, b in pairwise(identity.attempts)]
    assert len(gaps) > 500
    assert max(gaps) <= 30
    assert min(gaps) >= 0.5
    assert 18_000 <= clock.now <= 18_001


@pytest.mark.timeout(600 if LONG else 120)
@pytest.mark.waits
def test_device_keeps_trying_while_its_server_is_out_of_reach(
    start_server, start_device, make_link, swallowing_address, record_fault
):
    """Attempts measured at a proxy that resets them, for 12 s here and 150 s in the long form."""
    seconds = 150 if LONG else 12
    server, address = start_server(rounds="1", min_num_clients="1", min_sample_size="1")
    link = make_link(address)
    link.cut()
    device = start_device(link.address, 0, f"--max_wait_seconds={seconds + 60}")
    lost = start_device(swallowing_address, 0, f"--max_wait_seconds={seconds + 60}")
    tried = []  # when an attempt at the address that swallows everything was over
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        lost.wait_for(r"no server at \S+ yet \(no answer\), next try in", 40)
        tried.append(time.monotonic())
        if not LONG:
            break
    link.heal()
    healed = time.monotonic()
    server.wait_for("round 1/1  devices 1/1", 40)
    back = time.monotonic() - healed
    assert device.finish() == 0
    gaps = [b - a for times in (link.attempts, tried) for a, b in pairwise(times)]
    assert len(gaps) >= 2
    assert max(gaps) < 31
    assert back < 31
    record_fault(
        f"server unreachable for {healed - deadline + seconds:.0f} s",
        "TCP proxy that resets connections; an address that swallows packets",
        f"{len(link.attempts)} attempts, at most {max(gaps):.0f} s apart; "
        f"joins {back:.0f} s after the link is back",
        stock="the client exits 1 at once",
    )


# --- Packets that really vanish -------------------------------------------------------


@pytest.fixture
def two_namespaces() -> Iterator[tuple[list[str], list[str]]]:
    """Commands that run others in two networks of their own, with a cable between them.

    Addresses 198.18.0.1 and .2 (RFC 2544, for tests) exist inside of them only.
    """
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a network of its own takes Linux and root")
    for tool in ("unshare", "nsenter", "ip", "iptables"):
        if not shutil.which(tool):
            pytest.skip(f"a network of its own takes the command {tool}")
    holders = [
        subprocess.Popen(["unshare", "--net", "sleep", "600"], stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        time.sleep(0.3)
        ours = Path("/proc/self/ns/net").stat().st_ino
        for holder in holders:
            if (
                holder.poll() is not None
                or Path(f"/proc/{holder.pid}/ns/net").stat().st_ino == ours
            ):
                pytest.skip("this machine does not let root make a network")
        inside = [["nsenter", f"--net=/proc/{holder.pid}/ns/net"] for holder in holders]
        first, second = (str(holder.pid) for holder in holders)
        cable = f"ip link add end0 netns {first} type veth peer name end1 netns {second}"
        if subprocess.run(cable.split(), capture_output=True).returncode:
            pytest.skip("this machine does not let root make a cable (veth)")
        for i, command in enumerate(inside):
            for setting in (
                "ip link set lo up",
                f"ip addr add 198.18.0.{i + 1}/24 dev end{i}",
                f"ip link set end{i} up",
            ):
                subprocess.run([*command, *setting.split()], check=True)
        yield inside[0], inside[1]
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


@pytest.mark.waits
def test_packets_dropped_by_a_firewall_are_missed_by_both_sides_within_30_s(
    launch, two_namespaces, record_fault, tmp_path
):
    laptop, board = two_namespaces
    device_py = ROOT / "tests/faults/device.py"
    address = "198.18.0.1:8080"
    server = launch(
        *(*laptop, sys.executable, ROOT / "server.py", f"--server_address={address}"),
        *("--data_dir=synthetic:400", f"--run_dir={tmp_path}/run", "--rounds=1"),
        *("--min_num_clients=3", "--min_sample_size=3"),
    )
    server.wait_for(f"waiting for 3 devices at {address}")
    near = [*laptop, sys.executable, device_py, address]
    far = [*board, sys.executable, device_py, address]
    launch(*near, "near", "--gate", tmp_path)
    idle = launch(*far, "idle")
    training = launch(*far, "training", "--gate", tmp_path)
    training.wait_for("fit of round 1")
    idle.wait_for("fit of round 1")
    time.sleep(1)

    for rule in ("INPUT", "OUTPUT"):
        subprocess.run([*board, "iptables", "-A", rule, "-j", "DROP"], check=True)
    silent = time.monotonic()
    moment = Moment(idle, "left .* next try in")
    noticed = {}
    while len(noticed) < 2:
        name = server.wait_for("device (idle|training) left", 40)[1]
        noticed[name] = time.monotonic() - silent
    on_device = moment.since(silent)
    assert max(*noticed.values(), on_device) < 30

    subprocess.run([*board, "iptables", "-F"], check=True)
    server.wait_for("device idle joined", 60)
    (tmp_path / "round-1").touch()
    server.wait_for("round 1/1  devices [23]/3")
    assert server.finish() == 0
    record_fault(
        "packets dropped, no FIN",
        "two network namespaces, a veth cable, iptables -j DROP",
        f"the device notices after {on_device:.0f} s, the server as at the right; it is back "
        "when the packets are",
        max(noticed.values()),
        "server 229 s; client with an unsent reply 939 s; idle client never",
    )
