"""Each mistake gets one line: what is wrong, the value, what to do."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import client
import server
import utils
from tests.conftest import ROOT, complaint


def server_complaint(tmp_path: Path, *arguments: str) -> str:
    defaults = (
        "--data_dir=synthetic:400",
        "--server_address=127.0.0.1:0",
        f"--run_dir={tmp_path}/run",
    )
    line = complaint(server.main, *defaults, *arguments)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds=0"], "--rounds 0 is below 1"),
        (["--epochs=-1"], "--epochs -1 is below 1"),
        (["--batch_size=0"], "--batch_size 0 is below 1"),
        (["--min_num_clients=0"], "--min_num_clients 0 is below 1"),
        (["--sample_fraction=0"], "--sample_fraction 0 is outside (0, 1]"),
        (["--sample_fraction=1.5"], "--sample_fraction 1.5 is outside (0, 1]"),
        (["--sample_fraction=nan"], "--sample_fraction nan is outside (0, 1]"),
        (["--lr=0"], "--lr 0 is not above 0"),
        (["--lr=inf"], "--lr inf is not finite"),
        (["--seed=-1"], "--seed -1 is outside [0, 2147483647]"),
        (
            ["--min_sample_size=3"],
            "--min_sample_size 3 is above --min_num_clients 2; a round cannot sample",
        ),
        (["--model=Resnet18"], "no model 'Resnet18'; utils.MODELS has Net, PiNet"),
        (["--partition=random"], "no partition 'random'; choose auto, iid, none or dirichlet:0.5"),
        (["--partition=dirichlet:-1"], "no partition 'dirichlet:-1'"),
        (["--strategy=FedSGD"], "no strategy 'FedSGD'; there are FedAvg, "),
        (["--strategy=FedAdam:eta=x"], "--strategy FedAdam:eta=x: 'eta=x' is not NAME=NUMBER"),
        (["--strategy=FedAvg:lr=1"], "'lr=1' is not NAME=NUMBER; FedAvg has no settings"),
        (["--strategy=FedAvg:evaluate_fn=1"], "'evaluate_fn=1' is not NAME=NUMBER"),
        (["--strategy=FedTrimmedAvg:beta=0.6"], "--strategy FedTrimmedAvg:beta=0.6: "),
        (["--strategy=FedAdam:eta=nan"], "'eta=nan' is not NAME=NUMBER; FedAdam has eta"),
        (["--server_address=8080"], "server address '8080' is not HOST:PORT"),
        (["--server_address=::1:8080"], "server address '::1:8080' is not HOST:PORT"),
        (["--server_address=127.0.0.1:70000"], "server address '127.0.0.1:70000' is not HOST:PORT"),
        (
            ["--server_address=no.such.host.invalid:80"],
            "cannot find the host 'no.such.host.invalid'",
        ),
        (["--server_address=192.0.2.1:8080"], "'192.0.2.1' is not an address of this machine"),
        (["--init_weights=none.safetensors"], "no weights file 'none.safetensors'"),
    ],
)
def test_server_reports_what_is_wrong(tmp_path, arguments, message):
    line = server_complaint(tmp_path, *arguments)
    assert line.startswith("server.py: ")
    assert message in line


def test_unknown_flags_and_words_for_numbers_end_with_one_line(tmp_path, capsys):
    for argument in ("--round=3", "--rounds=three"):
        with pytest.raises(SystemExit) as ending:
            server.main([argument])
        assert ending.value.code == 2
    assert [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "there is no flag --round; --rounds?",
        "argument --rounds: invalid int value: 'three'",
    ]


def test_port_in_use_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = server_complaint(tmp_path, f"--server_address=127.0.0.1:{port}")
    assert f"port {port} of '127.0.0.1:{port}' is in use; stop the other server" in line


def test_port_in_use_is_named_also_for_all_addresses_of_both_families(tmp_path):
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with socket.create_server(("0.0.0.0", 0)) as other:
        port = other.getsockname()[1]
        assert "is in use" in server_complaint(tmp_path, f"--server_address=[::]:{port}")


def test_second_server_on_a_port_is_refused(start_server, tmp_path):
    _, address = start_server()
    assert "is in use" in server_complaint(tmp_path / "two", f"--server_address={address}")


def test_privileged_port_is_named(tmp_path, monkeypatch):
    def create_server(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "create_server", create_server)  # root may take any port
    line = server_complaint(tmp_path, "--server_address=127.0.0.1:80")
    assert "port 80 of '127.0.0.1:80' is for root alone; choose one from 1024 to 65535" in line


def test_weights_that_are_not_finite_are_refused(tmp_path):
    named = {k: v.numpy() for k, v in utils.build_model("Net", 10).state_dict().items()}
    named["fc1.bias"][3] = np.nan
    safetensors.numpy.save_file(named, tmp_path / "w")
    line = server_complaint(tmp_path, f"--init_weights={tmp_path}/w")
    assert "has non-finite values in fc1.bias" in line


def test_damaged_weights_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    assert "is damaged or no safetensors file" in server_complaint(
        tmp_path, f"--init_weights={path}"
    )


def test_weights_of_another_model_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"w": np.zeros(3, np.float32)}, path)
    line = server_complaint(tmp_path, f"--init_weights={path}")
    assert "is of another model than Net: it has 1 arrays, Net has 10" in line

    net = utils.build_model("Net", 7)
    named = {k: v.numpy() for k, v in net.state_dict().items()}
    safetensors.numpy.save_file(named, path)
    line = server_complaint(tmp_path, f"--init_weights={path}")
    assert "fc3.weight is float32 (7, 84), not float32 (10, 84)" in line


def test_run_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    line = server_complaint(tmp_path)
    assert f"cannot write run directory '{tmp_path}/run' (File exists); choose another" in line


def test_run_directory_of_another_run_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    with pytest.raises(SystemExit, match="holds a run already; choose another --run_dir"):
        server.main(
            [
                "--data_dir=synthetic:400",
                "--server_address=127.0.0.1:0",
                f"--run_dir={tmp_path}/run",
            ]
        )


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system of 64 KiB takes root")
def test_full_disk_is_reported_each_round_and_ends_with_an_error(
    start_server, start_client, tmp_path
):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        process, address = start_server(
            run_dir=str(disk / "run"), rounds="2", min_num_clients="1", min_sample_size="1"
        )
        start_client(address, 0)
        process.wait_for(r"round 1: cannot write .*No space left on device.*; training continues")
        process.wait_for("round 2/2")
        assert process.finish() == 1
        line = re.fullmatch(
            r"server.py: cannot write to .*; the model is in '(.*)'", process.lines[-1]
        )
        assert line, process.output
        assert len(safetensors.numpy.load_file(line[1])) == 10
        shutil.rmtree(Path(line[1]).parent)
        assert not [path for path in (disk / "run").iterdir() if path.suffix == ".part"]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def make_images(folder: Path, classes: dict[str, int]) -> None:
    from PIL import Image

    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (32, 32), (i, i, i)).save(folder / name / f"{i}.png")


@pytest.mark.parametrize("main", [client.main, server.main])
def test_data_directories_without_use_are_refused_on_both_sides(tmp_path, main):
    split = "train" if main is client.main else "test"

    def line_for(data_dir: Path) -> str:
        rest = ["--cid=0", "--server_address=127.0.0.1:1"]
        if main is server.main:
            rest = ["--server_address=127.0.0.1:0"]
        return complaint(main, f"--data_dir={data_dir}", *rest)

    assert "does not exist; put your images there, or fetch CIFAR-10" in line_for(tmp_path / "no")

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "is empty; put your images there" in line_for(empty)

    make_images(tmp_path / "one" / split, {"milk": 3})
    assert "has 1 class folder(s) (milk/); at least 2" in line_for(tmp_path / "one")

    make_images(tmp_path / "odd" / "train", {"milk": 3, "tomato": 3})
    make_images(tmp_path / "odd" / "test", {"milk": 3, "potato": 3})
    assert "differ between train/ and test/: potato, tomato" in line_for(tmp_path / "odd")

    make_images(tmp_path / "bad" / split, {"milk": 0, "tomato": 0})
    for name in ("milk", "tomato"):
        (tmp_path / "bad" / split / name / "a.png").write_bytes(b"no image")
    assert "all 2 images in" in line_for(tmp_path / "bad")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=Nett"], "no model 'Nett'; utils.MODELS has Net, PiNet"),
        (["--server_address=localhost"], "server address 'localhost' is not HOST:PORT"),
        (
            ["--server_address=no.such.host.invalid:80"],
            "cannot find the host 'no.such.host.invalid'",
        ),
        (["--server_address=127.0.0.1:0"], "server address '127.0.0.1:0' has no port to go to"),
        (["--threads=0"], "--threads 0 is below 1"),
        (["--threads=all"], "--threads all is neither a number nor auto"),
        (["--cid=a b"], "--cid 'a b' is not made of 1 to 64 letters, digits"),
        (["--cid=../../x"], "--cid '../../x' is not made of"),
        (["--data_dir=synthetic:many"], "no data set 'synthetic:many'"),
    ],
)
def test_client_reports_what_is_wrong(arguments, message):
    defaults = ("--server_address=127.0.0.1:1", "--cid=0", "--data_dir=synthetic:400")
    line = complaint(client.main, *defaults, *arguments)
    assert line.startswith("client.py: ")
    assert message in line


def test_cuda_is_refused_where_there_is_none():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA GPU")
    line = complaint(client.main, "--server_address=127.0.0.1:1", "--cid=0", "--device=cuda")
    assert "--device cuda: torch finds no CUDA GPU here; choose auto or cpu" in line


def test_the_line_goes_to_stderr_and_the_exit_code_is_not_zero():
    command = [sys.executable, ROOT / "server.py", "--model", "Nett"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("server.py: no model 'Nett'")
