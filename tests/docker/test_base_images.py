"""The lists of what the base images hold, against the rest of the project. Needs no Docker."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BASES = ROOT / "base_images"


def pins(path):
    """Return {package: version} of a requirements file, in which nothing else may stand."""
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    found = dict(line.split("==") for line in lines if line)
    assert all(re.fullmatch(r"[\w.]+", version) for version in found.values())
    return found


CPU = pins(BASES / "cpu" / "requirements.txt")
COMMON = pins(BASES / "requirements.txt")
ENGINE = pins(BASES / "engine" / "requirements.txt")


def test_versions_are_those_of_the_server():
    server = pins(ROOT / "requirements.txt")
    for package, version in {**CPU, **COMMON, **ENGINE}.items():
        assert server.get(package, version) == version, package
    # The others are what pip chose for the server, of which the tests have run.
    assert {"torch", "torchvision", "numpy", "pillow"} <= CPU.keys() & server.keys()
    assert {"grpcio", "protobuf", "cryptography"} <= COMMON.keys() & server.keys()
    assert {"flwr", "psutil", "safetensors"} <= ENGINE.keys() & server.keys()


def test_flower_stays_on_the_server():
    assert not {"flwr", "httpx", "typer"} & {*CPU, *COMMON}


def test_engines_image_installs_what_the_clients_lacks():
    assert not ENGINE.keys() & {*CPU, *COMMON}


def test_gpu_image_leaves_torch_alone():
    assert not {"torch", "torchvision", "numpy", "pillow", "triton"} & COMMON.keys()
    assert not COMMON.keys() & CPU.keys()


def linked(tmp_path, packages):
    """Return a folder from which Python can import these packages and nothing else."""
    for distribution in importlib.metadata.distributions():  # x86-64's torch comes with CUDA
        if distribution.name.startswith(("nvidia-", "nvidia_")):
            packages.append(distribution.name)
    for name in packages:
        for file in importlib.metadata.distribution(name).files or []:
            link = tmp_path / file.parts[0]
            if file.parts[0] != ".." and not link.exists():
                link.symlink_to(importlib.metadata.distribution(name).locate_file(file.parts[0]))
    return tmp_path


@pytest.fixture
def only_pinned(tmp_path):
    """What the CPU image has."""
    return linked(tmp_path, [*CPU, *COMMON])


TRAIN = """
import client
from torch_trainer import TorchTrainer
settings = {"partition": "none", "batch_size": 16}
for model in ("Net", "PiNet", "ResNet18"):
    device = client.Client("0", TorchTrainer("0", model, "synthetic:20", "cpu"))
    weights = device.get_parameters({})
    device.fit(weights, settings)
    device.evaluate(weights, settings)
import PIL.Image
PIL.Image.init()
try:
    client.main(["--server_address=127.0.0.1:9", "--cid=0", "--data_dir=synthetic:20",
                 "--max_wait_seconds=0"])
except SystemExit as error:
    print(error)
"""


def run(site, program):
    environment = {**os.environ, "PYTHONPATH": f"{site}:{ROOT}"}
    # -S: without this Python's own site-packages.
    return subprocess.run(
        [sys.executable, "-S", "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
    )


def test_client_imports_nothing_that_is_not_pinned(only_pinned):
    done = run(only_pinned, TRAIN)
    assert done.returncode == 0, done.stderr
    assert "client.py: no server at 127.0.0.1:9" in done.stdout


def test_check_of_the_base_images_passes_with_what_is_pinned(only_pinned):
    done = run(only_pinned, (BASES / "check.py").read_text())
    assert done.returncode == 0, done.stderr
    assert f"grpcio {COMMON['grpcio']}, protobuf {COMMON['protobuf']}" in done.stdout


def test_package_that_is_not_there_fails_the_check(only_pinned):
    (only_pinned / "grpc").unlink()
    done = run(only_pinned, (BASES / "check.py").read_text())
    assert done.returncode == 1
    assert "No module named 'grpc'" in done.stderr


def test_check_of_the_engines_image_passes_with_what_is_pinned(tmp_path):
    site = linked(tmp_path, [*CPU, *COMMON, *ENGINE])
    done = run(site, (BASES / "engine" / "check.py").read_text() + "import flower_app\n")
    assert done.returncode == 0, done.stderr
    assert f"flwr {ENGINE['flwr']}, psutil {ENGINE['psutil']}" in done.stdout
