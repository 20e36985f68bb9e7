"""The launchers' own help."""

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.launchers.conftest import ARGUMENTS


@pytest.mark.parametrize("script", ["run_pi.sh", "run_jetson.sh"])
@pytest.mark.parametrize("arguments", [["--help"], ["-h"], [*ARGUMENTS, "--help"]])
def test_help_needs_no_docker_and_no_board(device, script, arguments):
    (device.bin / "docker").unlink()
    run = device.run(script, *arguments, board="nowhere", MACHINE="armv7l")
    assert run.code == 0
    assert run.err == ""
    assert f"./{script} --server_address" in run.out
    assert "--detach" in run.out


@pytest.mark.parametrize("script", ["run_pi.sh", "run_jetson.sh"])
def test_help_names_the_clients_flags(device, script):
    flags = r"^  (?:-h, )?--([a-z_]+)"
    client = subprocess.run(
        [sys.executable, ROOT / "client.py", "--help"], capture_output=True, text=True, check=True
    ).stdout
    named = re.findall(flags, device.run(script, "--help", board="pi4").out, re.MULTILINE)
    assert sorted(named) == sorted(
        {*re.findall(flags, client, re.MULTILINE)} - {"help", "keys"} | {"detach", "image"}
    )
