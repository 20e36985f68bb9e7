"""The device's side on Pythons that JetPack 4, 5 and 6 have: its real code against a real server.

Skipped where there is no such Python, or no package index. LONG=1 adds PyTorch 1.10, 2.0 and 2.9:
9 GB, which are kept in $OLD_PYTHONS (a folder for each Python) if that is set.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import utils
from tests.conftest import LONG, ROOT
from torch_trainer import TorchTrainer

BASES = ROOT / "base_images"
# NVIDIA's images bring these; PyPI has torch's like for x86-64.
BROUGHT = {
    "3.6": ["torch==1.10.2", "pillow==8.4.0"],
    "3.8": ["torch==2.0.1", "pillow==10.4.0", "numpy==1.24.4"],
    "3.12": ["torch==2.9.1", "pillow==13.0.0", "numpy==2.4.6"],
    "3.13": ["torch==2.9.1", "pillow==13.0.0", "numpy==2.4.6"],
}

# The Trainer of a device without PyTorch: it adds to each weight.
DEVICE = """
import ast, os, sys
from plumbing import cli
os.environ.update(cli.ENVIRONMENT)
import numpy as np
import client
from plumbing.security.identity import open_identity
from plumbing.stream.device import serve

class Adding:
    model, device, lr = "Net", "cpu", 0.1
    def __init__(self, shapes, source):
        self.shapes, self.source = shapes, source
        self.names = list(shapes)
        self.classes = [f"pattern {i}" for i in range(10)]
    def prepare(self, settings):
        return 10, "10 images"
    def get_weights(self):
        return {name: np.zeros(shape, np.float32) for name, shape in self.shapes.items()}
    def fit(self, weights, settings, *rest):
        added = {name: array + np.float32(1) for name, array in weights.items()}
        return added, 10, {"loss": 1.0}

address, token, keys, shapes, source, cid = sys.argv[1:]
identity = open_identity(client.Path(keys), cid, token)
device = client.Client(cid, Adding(ast.literal_eval(shapes), source))
serve(address, device, on_state=print, max_wait_seconds=60, identity=identity)
"""


def interpreter(version: str) -> str | None:
    """Return a Python of this version, if there is one."""
    places = [shutil.which(f"python{version}")]
    places += sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))
    for place in filter(None, places):
        run = subprocess.run([place, "-V"], capture_output=True, text=True)
        if run.stdout.startswith(f"Python {version}."):
            return place
    return None


def install(*command: str | Path) -> None:
    """Install packages, or skip the test."""
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"cannot install packages: {(run.stdout + run.stderr).splitlines()[-1]}")


def command_for(version: str, python: str | Path, site: Path) -> list[str | Path]:
    """Return a command for a Python that finds what the image has beside torch."""
    old = version in ("3.6", "3.8")
    if old and not site.exists():
        install(python, BASES / "gpu" / "keep_torch.py", "install", site)
    # Messages take pure Python on a board with JetPack 4: protobuf has no other wheel for it.
    plain = ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python"] * (version == "3.6")
    names = [f"PYTHONPATH={site}:{ROOT}" if old else f"PYTHONPATH={ROOT}", "LANG=C.UTF-8", *plain]
    return ["env", "PYTHONDONTWRITEBYTECODE=1", *names, python, "-W", "ignore"]


@pytest.mark.waits
@pytest.mark.timeout(300)
def test_devices_with_old_pythons_join_a_secured_server_and_train(start_server, launch, tmp_path):
    # vermin sees to 3.8 in each run of the suite (run_tests.sh).
    versions = ("3.6", "3.8") if LONG else ("3.6",)
    pythons = {version: interpreter(version) for version in versions}
    found = {version: python for version, python in pythons.items() if python}
    if not found:
        pytest.skip(f"there is no Python {' and no '.join(versions)} here")
    commands = {}
    for version, python in found.items():
        commands[version] = command_for(version, python, tmp_path / version)
        if version == "3.8":
            site = f"--target={tmp_path / version}"
            install(python, "-m", "pip", "install", "--no-deps", site, BROUGHT[version][-1])
    count = f"--min_num_clients={len(found)}"
    keys = f"--keys={tmp_path / 'keys'}"
    server, address = start_server("--secure", keys, count, "--rounds=2")
    token = re.search(r"join1_\S+", server.output)[0]
    weights = utils.get_weights(utils.build_model("Net"))
    shapes = repr({name: array.shape for name, array in weights.items()})
    source = TorchTrainer("0", "Net", "synthetic:20", "cpu").source
    devices = [
        launch(*command, "-c", DEVICE, address, token, tmp_path / f"key-{cid}", shapes, source,
               str(cid), cwd=ROOT)
        for cid, command in enumerate(commands.values())
    ]  # fmt: skip
    for device in devices:
        assert device.finish() == 0, device.output
    assert server.finish() == 0, server.output
    for cid, version in enumerate(found):
        version = re.escape(version)
        assert re.search(rf"device {cid} joined: .*, Python {version}\.\d+, Net, 10", server.output)
    assert f"round 2/2  devices {len(found)}/{len(found)}" in server.output


# --- With PyTorch ---------------------------------------------------------------------

# Certificates are due for renewal 13 s after they were made: they begin a day earlier.
SERVER = """
import datetime, sys
from plumbing import cli
cli.start("server.py")
from plumbing.security import keys
keys.DEVICE_LIFE = datetime.timedelta(hours=12, seconds=20)
import server
server.main(sys.argv[1:])
"""

# A user's own model, in today's Python. Its weights travel in several pieces and chunks.
MINE = """
from __future__ import annotations
import torch

class Mine(torch.nn.Module):
    def __init__(self, num_classes: int = 10, sizes: list[int] | None = None) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(*pair) for pair in ((3072, 700), (700, 700), (700, num_classes))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (y := x.flatten(1)).shape[1] != 3072:
            raise ValueError("no images of 32x32 pixels")
        for layer in self.layers[:-1]:
            y = torch.relu(layer(y))
        return self.layers[-1](y)
"""


def with_torch(version: str, home: Path) -> list[str | Path]:
    """Return a command for a Python with its torch."""
    python = interpreter(version)
    assert python
    place = Path(os.environ.get("OLD_PYTHONS") or home) / version
    if not (place / "bin/python").exists():
        install(python, "-m", "venv", place)
        pip = [place / "bin/python", "-m", "pip", "install", "--quiet"]
        if version == "3.6":
            install(*pip, "pip==21.3.1")
        old = BASES / "gpu" / f"python{version}.txt"
        pins = old if old.exists() else BASES / "requirements.txt"
        install(*pip, "-r", pins, *BROUGHT[version])
    return command_for(version, place / "bin/python", home / f"site-{version}")


@pytest.mark.waits
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    not LONG, reason="LONG=1 installs PyTorch for Python 3.6, 3.8, 3.12, 3.13: 9 GB"
)
def test_five_pythons_train_together_through_a_kill_a_renewal_and_a_resumed_server(
    launch, tmp_path
):
    versions = [version for version in BROUGHT if interpreter(version)]
    if not {"3.6", "3.8"} <= set(versions):
        pytest.skip("Python 3.6 and 3.8 are not both here")
    commands = {version: with_torch(version, tmp_path) for version in versions}
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    here = ["env", f"PYTHONPATH={ROOT}", sys.executable]
    commands[f"{own}."] = here
    (tmp_path / "mine.py").write_text(MINE)
    model, data = "--model=mine:Mine", "--data_dir=synthetic:1000"

    def start_server(*arguments):
        server = launch(
            *here, "-c", SERVER, "--secure", f"--keys={tmp_path / 'keys'}", model, data,
            f"--min_num_clients={len(commands)}", "--rounds=6", "--threads=1", *arguments,
            cwd=tmp_path,
        )  # fmt: skip
        return server, server.wait_for(r"waiting for \d+ devices at (\S+) ")[1]

    def start_device(cid, *arguments):
        return launch(
            *list(commands.values())[cid], "-m", "client", f"--server_address={address}", model,
            data, f"--cid={cid}", f"--keys={tmp_path / f'key-{cid}'}", "--threads=1", *arguments,
            cwd=tmp_path,
        )  # fmt: skip

    run_dir = tmp_path / "run"
    server, address = start_server("--server_address=127.0.0.1:0", f"--run_dir={run_dir}")
    token = re.search(r"join1_\S+", server.output)[0]
    devices = [start_device(cid, f"--join={token}") for cid in range(len(commands))]
    server.wait_for("round 2/6 ", 120)
    devices[0].popen.kill()
    devices[0] = start_device(0)
    server.wait_for("round 4/6 ", 120)
    first = server.output
    server.popen.send_signal(signal.SIGKILL)
    again, _ = start_server(f"--server_address={address}", f"--resume={run_dir}")
    assert again.finish(300) == 0, again.output
    for device in devices:
        assert device.finish() == 0, device.output
        assert "certificate renewed" in device.output
    assert f"round 6/6  devices {len(commands)}/{len(commands)}" in again.output
    for output in (first, again.output):
        for cid, version in enumerate(commands):
            version = re.escape(version.rstrip("."))
            line = (
                rf"device {cid} joined: .*, Python {version}\.\d+, torch \d+\.\d+\.\d.*, mine:Mine,"
            )
            assert re.search(line, output), output
