"""The device's side on Python 3.8, which JetPack 5 has: its real code against a real server.

Skipped where there is no such Python, or no package index. LONG=1 adds PyTorch 2.0 (3 GB).
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import utils
from tests.conftest import LONG, ROOT
from torch_trainer import TorchTrainer

PINS = ROOT / "base_images" / "gpu" / "python3.8.txt"

# The Trainer of a device without PyTorch: it adds to each weight.
DEVICE = """
import json, os, sys
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

address, token, keys, shapes, source = sys.argv[1:]
identity = open_identity(client.Path(keys), "0", token)
device = client.Client("0", Adding(json.loads(shapes), source))
serve(address, device, on_state=print, max_wait_seconds=60, identity=identity)
"""


def python38() -> str:
    """Return an interpreter, or skip the test."""
    candidates = [shutil.which("python3.8"), *Path.home().glob(".pyenv/versions/3.8.*/bin/python")]
    for candidate in filter(None, candidates):
        run = subprocess.run([candidate, "-V"], capture_output=True, text=True)
        if run.stdout.startswith("Python 3.8"):
            return str(candidate)
    pytest.skip("there is no Python 3.8 here")


@pytest.fixture
def old_python(request, tmp_path) -> list[str]:
    """Return a command for a Python 3.8 that finds what the image of JetPack 5 has."""
    python = python38()
    packages = ["-r", str(PINS), "numpy==1.24.4", *getattr(request, "param", ["--no-deps"])]
    for_it = ["--python-version=3.8", "--only-binary=:all:", "--no-compile"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", f"--target={tmp_path / 'site'}"]
    installed = subprocess.run([*command, *for_it, *packages], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"cannot install its packages: {installed.stderr.splitlines()[-1]}")
    return ["env", f"PYTHONPATH={tmp_path / 'site'}:{ROOT}", python, "-W", "ignore"]


@pytest.mark.waits
@pytest.mark.timeout(300)
def test_device_with_python_38_joins_a_secured_server_and_trains(
    old_python, start_server, launch, tmp_path
):
    one_device = ("--min_num_clients=1", "--rounds=2")
    server, address = start_server("--secure", f"--keys={tmp_path / 'keys'}", *one_device)
    token = re.search(r"join1_\S+", server.output)[0]
    weights = utils.get_weights(utils.build_model("Net"))
    shapes = json.dumps({name: array.shape for name, array in weights.items()})
    device = launch(
        *old_python, "-c", DEVICE, address, token, tmp_path / "key", shapes,
        TorchTrainer("0", "Net", "synthetic:20", "cpu").source, cwd=ROOT,
    )  # fmt: skip
    assert device.finish() == 0, device.output
    assert server.finish() == 0, server.output
    assert re.search(r"device 0 joined: .*, Python 3\.8\.\d+, Net, 10 images", server.output)
    assert "round 2/2  devices 1/1" in server.output


@pytest.mark.waits
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not LONG, reason="LONG=1 installs PyTorch 2.0 for Python 3.8, 3 GB")
@pytest.mark.parametrize("old_python", [["torch==2.0.1", "pillow==10.4.0"]], indirect=True)
def test_old_and_new_python_train_together_and_an_old_one_that_was_killed_comes_back(
    old_python, start_server, start_client, launch
):
    server, address = start_server("--rounds=4")
    start_client(address, 1)

    def start_old():
        return launch(
            *old_python, ROOT / "client.py", "--server_address", address,
            "--cid=0", "--data_dir=synthetic:400", "--threads=1", "--insecure",
        )  # fmt: skip

    old = start_old()
    server.wait_for("round 2/4")
    old.popen.kill()
    old = start_old()
    assert server.finish(300) == 0
    assert old.finish() == 0
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert re.search(r"device 0 joined: .*, Python 3\.8\.\d+, torch 2\.0\.1", server.output)
    assert re.search(rf"device 1 joined: .*, Python {version}\.\d+, torch 2\.9\.1", server.output)
    assert "round 4/4  devices 2/2" in server.output
