"""A server and a device of different releases refuse each other, with a line on both screens."""

import sys

import pytest

from federated.rounds import Job
from plumbing.stream import wire
from tests.conftest import ROOT
from tests.devices import Recorder, small_model

# A program of this release, but for the number of its protocol.
OTHER_RELEASE = """
import sys
sys.path.insert(0, "{root}")
from plumbing import cli
cli.start("{program}.py")
from plumbing.stream import wire
wire.PROTOCOL = {version}
import {program}
{program}.main()
"""
DEVICE = ["--cid=0", "--data_dir=synthetic:400", "--max_wait_seconds=20"]
ADVICE = (
    "use the same release on server and devices: update the project there and start it again, "
    "which builds the image again"
)


@pytest.fixture
def launch_release(launch, tmp_path):
    """Start client.py or server.py as the release with that protocol."""

    def start(program, version, *arguments):
        path = tmp_path / f"release-{version}" / f"{program}.py"
        path.parent.mkdir()
        path.write_text(OTHER_RELEASE.format(root=ROOT, program=program, version=version))
        return launch(sys.executable, path, *arguments)

    return start


OLDER, NEWER = wire.PROTOCOL - 1, wire.PROTOCOL + 1


def fault(who, theirs, ours):
    """Return the line that one end has for another one."""
    release = "an older" if theirs < ours else "another"
    return f"{who} is of {release} release (protocol {theirs}, here {ours}); {ADVICE}"


@pytest.mark.parametrize("version", [OLDER, NEWER])
def test_device_of_another_release_is_refused_and_the_server_goes_on(
    start_server, start_client, launch_release, version
):
    server, address = start_server(min_num_clients="1", min_sample_size="1", rounds="1")
    other = launch_release("client", version, f"--server_address={address}", *DEVICE)
    reason = fault("this device", version, wire.PROTOCOL)
    assert other.finish() == 1
    assert other.lines[-1] == f"client.py: the server refuses this device: {reason}"
    ours = start_client(address, 0)
    assert server.finish() == ours.finish() == 0
    assert [line for line in server.lines if "refused" in line] == [f"refused device 0: {reason}"]


@pytest.mark.parametrize("version", [OLDER, NEWER])
def test_server_of_another_release_refuses_this_device(
    launch_release, start_client, tmp_path, version
):
    arguments = ["--server_address=127.0.0.1:0", "--data_dir=synthetic:400"]
    server = launch_release("server", version, *arguments, f"--run_dir={tmp_path / 'run'}")
    address = server.wait_for(r"waiting for \d+ devices? at (\S+) ")[1]
    ours = start_client(address, 0)
    reason = fault("this device", wire.PROTOCOL, version)
    assert ours.finish() == 1
    assert ours.lines[-1] == f"client.py: the server refuses this device: {reason}"
    server.wait_for(f"^refused device 0: this device is of .*here {version}")


def test_server_that_does_not_compare_versions_shows_what_the_device_found(
    open_fleet, launch_release, monkeypatch
):
    """As servers did before there was a version; they show any problem that a device reports."""
    monkeypatch.setattr(wire, "version_problem", lambda version: None)
    fleet = open_fleet(admit=lambda properties: properties.get("problem"))
    recorder = Recorder(fleet)
    newer = launch_release("client", NEWER, f"--server_address={fleet.address}", *DEVICE)
    assert newer.finish() == 1
    reason = fault("the server", wire.PROTOCOL, NEWER)
    assert newer.lines[-1] == f"client.py: the server refuses this device: {reason}"
    recorder.drain()
    assert recorder.lines() == [f"refused device 0: {reason}"]


def test_device_trains_for_no_server_of_another_release(open_fleet, launch_release, monkeypatch):
    monkeypatch.setattr(wire, "version_problem", lambda version: None)
    fleet = open_fleet()
    recorder = Recorder(fleet)
    newer = launch_release("client", NEWER, f"--server_address={fleet.address}", *DEVICE)
    (device,) = recorder.wait_for(1, seconds=60)
    fleet.start(device, Job("1", 0, small_model(), {}))
    recorder.until(lambda: not fleet.devices)
    assert newer.finish() == 1
    assert newer.lines[-1] == f"client.py: {fault('the server', wire.PROTOCOL, NEWER)}"
    assert "Client 0: fit" not in newer.output
