"""--model mine:Mine: a user's own model, from a file in the working directory."""

import json
import re
import sys

import pytest

import torch_trainer
import utils
from federated.errors import FederationError
from tests.conftest import ROOT

MINE = """
from torch import nn


class Mine(nn.Module):
    image_size = {size}

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * image_size_of(self) ** 2, num_classes)

    def forward(self, x):
        return self.fc(x.flatten(1))


def image_size_of(net):
    return net.image_size


class NoModel:
    pass


class Wide(nn.Module):
    def __init__(self, num_classes, width):
        super().__init__()
"""


def write_model(folder, name="mine", size=16):
    (folder / f"{name}.py").write_text(MINE.format(size=size))
    return f"{name}:Mine"


def programs(launch, folder, *flags, cids=(0, 1)):
    """Start a server and clients in a working directory; return them."""
    run = launch(
        sys.executable, ROOT / "server.py", "--server_address=127.0.0.1:0", "--rounds=1",
        "--data_dir=synthetic:400", "--run_dir=run", *flags, cwd=folder,
    )  # fmt: skip
    address = run.wait_for(r"waiting for \d+ devices? at (\S+) ")[1]
    clients = [
        launch(
            sys.executable, ROOT / "client.py", f"--server_address={address}", f"--cid={cid}",
            "--data_dir=synthetic:400", "--max_wait_seconds=60", *flags, cwd=folder,
        )
        for cid in cids
    ]  # fmt: skip
    return run, *clients


def test_own_model_trains_without_an_edit_of_ours(launch, tmp_path):
    server, *clients = programs(launch, tmp_path, f"--model={write_model(tmp_path)}")
    assert server.finish() == 0, server.output
    assert [client.finish() for client in clients] == [0, 0]
    assert ", mine:Mine, 200 of 400 synthetic images (part 0 of 2)" in server.output
    assert "round 1/1  devices 2/2  loss " in server.output
    assert "warning" not in server.output
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["model"] == "mine:Mine"
    assert config["source_sha256"] != config["utils_sha256"]


def test_device_whose_file_differs_is_named(launch, tmp_path):
    write_model(tmp_path)
    server, *_ = programs(launch, tmp_path, "--model=mine:Mine", cids=())
    address = re.search(r"at (\S+) \(0 conn", server.output)[1]
    other = tmp_path / "other"
    other.mkdir()
    write_model(other)
    (other / "mine.py").write_text((other / "mine.py").read_text() + "\nlr = 1\n")
    for cid, folder in ((0, tmp_path), (1, other)):
        launch(
            sys.executable, ROOT / "client.py", f"--server_address={address}", f"--cid={cid}",
            "--data_dir=synthetic:400", "--model=mine:Mine", cwd=folder,
        )  # fmt: skip
    server.wait_for(
        r"warning: device 1 trains with another utils.py or mine.py \(sha256:\w{12}\) than this "
        r"server's \(sha256:\w{12}\)"
    )
    assert server.finish() == 0
    assert "warning: device 0" not in server.output


def test_run_local_takes_an_own_model(launch, tmp_path):
    write_model(tmp_path)
    run = launch(
        ROOT / "run_local.sh", "--data_dir=synthetic:400", "--rounds=1", "--model", "mine:Mine",
        "--run_dir=run", cwd=tmp_path,
    )  # fmt: skip
    assert run.finish() == 0, run.output
    assert "device 0 joined" in run.output and ", mine:Mine, " in run.output


@pytest.mark.parametrize(
    ("file", "choice", "problem"),
    [
        ("", "nowhere:Mine", "there is no nowhere.py in '{cwd}'"),
        ("import nothing_like_it", "{mine}:Mine", "{mine}.py needs nothing_like_it, not found"),
        ("def f(:", "{mine}:Mine", "{mine}.py cannot be imported (SyntaxError: invalid syntax"),
        ("1 / 0", "{mine}:Mine", "cannot be imported (ZeroDivisionError: division by zero)"),
        (MINE, "{mine}:Other", "{mine}.py has no Other"),
        (MINE, "{mine}:NoModel", "NoModel is no subclass of torch.nn.Module"),
        (MINE, "{mine}:nn", "nn is no subclass of torch.nn.Module"),
        (MINE, "{mine}:Wide", "Wide(num_classes) cannot be made (missing a required argument: 'w"),
    ],
)
def test_own_model_that_cannot_be_used_is_one_line(
    tmp_path, monkeypatch, request, file, choice, problem
):
    monkeypatch.chdir(tmp_path)
    mine = f"mine_{request.node.callspec.indices['file']}"
    (tmp_path / f"{mine}.py").write_text(file.replace("{size}", "16"))
    with pytest.raises(FederationError) as caught:
        torch_trainer.find_model(choice.format(mine=mine))
    text = str(caught.value)
    assert text.startswith(f"--model {choice.format(mine=mine)}: ")
    assert problem.format(mine=mine, cwd=tmp_path) in text
    assert "\n" not in text


def test_own_model_sizes_its_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch_trainer.find_model(write_model(tmp_path, "sized", size=20))
    assert utils.image_size("sized:Mine") == 20
    assert utils.build_model("sized:Mine", 7).fc.out_features == 7
