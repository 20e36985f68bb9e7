"""The live block on a terminal: real pseudo-terminals; nothing of it in a file."""

import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

SCENE = """
import sys, time
from rich.console import Console
from federated.rounds import Began, Device, Offered, Progress, Step, Waiting
from plumbing import cli
from plumbing.terminal import LiveBlock

class Directory:
    config = {"rounds": 2, "batch_size": 10}

if len(sys.argv) > 2:
    cli.log_to(sys.argv[2])
with LiveBlock() as block:
    (observe, *_) = [*block.open(None, Directory), lambda event: None]
    observe(Waiting(2, 1, 0, 0))
    devices = [Device(str(cid)) for cid in range(int(sys.argv[1]))]
    observe(Began(1, devices))
    for device in devices[2:]:
        observe(Offered(device, None))
    metrics = {"loss": 1.25, "cpu_temperature": 71.4, "throttled": "under-voltage"}
    observe(Progress(devices[0], 30, 60, 0.001, metrics))
    time.sleep(0.6)
    print("a line of " + "x" * 200)
    print("problem", file=sys.stderr)
    time.sleep(0.6)
    observe(Step(1, {}, {"loss": 1.0}, 2, [], [], 1.0, 0.5))
    observe(Step(2, {}, {"loss": 1.0}, 2, [], [], 1.0, 0.5))
    print("the end")
"""


def on_terminal(*arguments: str) -> str:
    """Return what the scene writes to a terminal of 100 columns."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-c", SCENE, *arguments],
        cwd=ROOT,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
    )
    os.close(slave)
    output, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if not select.select([master], [], [], 0.2)[0]:
            continue
        try:
            data = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        output += data
    assert process.wait(5) == 0, output.decode()
    os.close(master)
    return output.decode()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_block_shows_the_round_and_each_device_and_lines_stay_whole():
    output = on_terminal("3")
    shown = plain(output)
    assert "waiting for 2 devices, 1 connected" in shown or "round 1/2" in shown
    assert re.search(r"round 1/2 +━.* 50 %   1 of 3 devices done", shown)
    row = r"device 0 +━.* 50 % +0 images/s  loss 1\.250  71 °C  under-voltage"
    assert re.search(row, shown)
    assert re.search(r"device 2 +━+ +100 %  trained", shown)
    assert "a line of " + "x" * 200 + "\r\n" in shown
    assert "problem\r\n" in shown
    assert shown.rstrip().endswith("the end")


def test_of_many_devices_counts_and_the_slowest_are_shown():
    shown = plain(on_terminal("60"))
    assert "2 training, 58 trained; the slowest 5:" in shown
    assert re.search(r"device 1 ", shown)
    assert not re.search(r"device 59 ", shown)


def test_log_file_has_the_lines_and_nothing_of_the_block(tmp_path):
    on_terminal("3", str(tmp_path / "log"))
    lines = [line.partition(" ")[2] for line in (tmp_path / "log").read_text().splitlines()]
    assert lines == ["a line of " + "x" * 200, "problem", "the end"]


@pytest.mark.parametrize("number", ["3"])
def test_without_a_terminal_there_are_lines_alone(number):
    done = subprocess.run(
        [sys.executable, "-c", SCENE, number], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "a line of " + "x" * 200 + "\nthe end\n"
