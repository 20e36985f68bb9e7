"""plumbing/venv.sh: which PyTorch it installs. Local indexes with stand-in wheels, and no GPU."""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
import zipfile

import pytest

from tests.conftest import ROOT

PINS = "torch==2.9.1  # a reason\ntorchvision==0.24.1\nthe-rest==1.0\n"

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="elsewhere PyPI's has no CUDA"
)


def make_wheel(folder, name, version):
    path = folder / name / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    path.parent.mkdir(parents=True, exist_ok=True)
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def indexes(tmp_path_factory):
    """The addresses of an index with PyTorch for the CPU, and of one with all packages."""
    folder = tmp_path_factory.mktemp("indexes")
    for name, version in (("torch", "2.9.1"), ("torchvision", "0.24.1")):
        make_wheel(folder / "cpu", name, f"{version}+cpu")
        make_wheel(folder / "all", name, version)
    make_wheel(folder / "all", "the-rest", "1.0")
    make_wheel(folder / "cpu", "the-rest", "1.0+never")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    yield f"{address}/cpu", f"{address}/all"
    server.shutdown()


@pytest.fixture(scope="module")
def empty_tree(tmp_path_factory):
    """A tree with a virtual environment in which nothing is installed yet."""
    tree = tmp_path_factory.mktemp("tree")
    (tree / "plumbing").mkdir()
    shutil.copy(ROOT / "plumbing/venv.sh", tree / "plumbing")
    (tree / "requirements.txt").write_text(PINS)
    subprocess.run([sys.executable, "-m", "venv", tree / ".venv"], check=True)
    return tree


@pytest.fixture
def set_up(empty_tree, tmp_path, indexes):
    """Run venv.sh; return what it printed and which packages there are then."""

    def run(cpu_index, pins=PINS, **programs):
        tree, bin_dir = tmp_path / "tree", tmp_path / "bin"
        shutil.copytree(empty_tree, tree, symlinks=True)
        (tree / "requirements.txt").write_text(pins)
        bin_dir.mkdir()
        for name, script in programs.items():
            program = bin_dir / name.replace("_", "-")
            program.write_text(f"#!/bin/sh\n{script}\n")
            program.chmod(0o755)
        done = subprocess.run(
            [tree / "plumbing/venv.sh", "requirements.txt"],
            capture_output=True, text=True, timeout=100,
            env={
                "PATH": f"{bin_dir}:{os.environ['PATH']}", "PIP_CONFIG_FILE": os.devnull,
                "PIP_INDEX_URL": indexes[1], "TORCH_INDEX": cpu_index, "HOME": str(tmp_path),
            },
        )  # fmt: skip
        site = next((tree / ".venv/lib").glob("python*/site-packages"))
        there = {path.name.removesuffix(".dist-info") for path in site.glob("*.dist-info")}
        return done, {name for name in there if not name.startswith(("pip-", "setuptools-"))}

    return run


def test_without_gpu_torch_alone_comes_from_the_cpu_index(set_up, indexes):
    done, packages = set_up(indexes[0], nvidia_smi="exit 9")
    assert done.returncode == 0, done.stderr
    assert packages == {"torch-2.9.1+cpu", "torchvision-0.24.1+cpu", "the_rest-1.0"}
    assert f"no NVIDIA GPU: PyTorch for the CPU, from {indexes[0]}\n" in done.stderr
    assert done.stdout.endswith("/tree/.venv/bin/python\n")


def test_cpu_index_out_of_reach_is_reported_and_pypis_torch_installed(set_up):
    done, packages = set_up("http://127.0.0.1:1")
    assert packages == {"torch-2.9.1", "torchvision-0.24.1", "the_rest-1.0"}
    assert "http://127.0.0.1:1 cannot be reached: PyTorch from PyPI instead" in done.stderr


def test_with_gpu_pypis_torch_is_installed(set_up, indexes):
    done, packages = set_up(indexes[0], nvidia_smi="echo 'GPU 0: NVIDIA'")
    assert packages == {"torch-2.9.1", "torchvision-0.24.1", "the_rest-1.0"}
    assert "there is an NVIDIA GPU" in done.stderr


def test_full_disk_is_found_before_anything_is_installed(set_up, indexes):
    lines = "Filesystem 1M-blocks Used Available Capacity Mounted\n/dev/x 9000 7500 1500 84% /"
    done, packages = set_up(indexes[0], df=f"echo '{lines}'")
    assert done.returncode == 1
    assert packages == set()
    assert done.stderr.endswith("the packages need 2000 MB; make room\n")
    assert "venv.sh: 1500 MB are free in " in done.stderr


def test_packages_without_pytorch_fit_on_a_small_disk(set_up, indexes):
    lines = "Filesystem 1M-blocks Used Available Capacity Mounted\n/dev/x 9000 8400 600 93% /"
    done, packages = set_up(indexes[0], pins="the-rest==1.0\n", df=f"echo '{lines}'")
    assert done.returncode == 0, done.stderr
    assert packages == {"the_rest-1.0"}
