"""The story of a fridge through real processes, with a tiny model."""

import json
import signal
import sys
from pathlib import Path

import pytest

import utils
from plumbing.checkpoints import encode_weights
from tests.conftest import ROOT
from tests.photos import CLASSES, MODEL, paint


@pytest.fixture
def service(tmp_path) -> Path:
    """Photographs of a colour a class, and a start model."""
    for part, count in (("train", 4), ("test", 5)):
        for label, name in enumerate(CLASSES):
            for i in range(count):
                paint(tmp_path / "service" / part / name / f"{i}.jpg", label, i)
    net = utils.build_model(MODEL, 3)
    state = {name: value.numpy() for name, value in net.state_dict().items()}
    (tmp_path / "start.safetensors").write_bytes(encode_weights(state, {}))
    return tmp_path / "service"


@pytest.fixture
def fridge(launch, tmp_path):
    """Run a command on a fridge's computer."""

    def run(name: str, command: str, *arguments: str | Path):
        home = f"--home={tmp_path / name}"
        return launch(sys.executable, "-m", "fridgecam", command, home, *arguments, cwd=ROOT)

    return run


def test_device_with_torch_takes_part_beside_one_without(
    start_server, start_client, fridge, service, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server, address = start_server(
        model=MODEL, data_dir=str(service), init_weights=str(tmp_path / "start.safetensors"),
        rounds="2",
    )  # fmt: skip
    assert fridge("a", "install", f"--server_address={address}", "--cid=a").finish() == 0
    for i in range(3):
        paint(tmp_path / "a" / "photos" / "Milk" / f"{i}.jpg", 1, 70 + i)
        paint(tmp_path / "torch" / "train" / "Tomato" / f"{i}.jpg", 2, 80 + i)
    assert fridge("a", "share", "on").finish() == 0
    light = fridge("a", "train")
    torchs = start_client(address, "b", model=MODEL, data_dir=str(tmp_path / "torch"))
    assert server.finish() == 0, server.output
    assert torchs.finish() == light.finish() == 0, torchs.output
    assert "device a joined" in server.output
    assert "device b joined" in server.output
    assert "dropped" not in server.output
    assert "model.onnx, torch's class on 15 of 15 test images; model.int8.onnx, " in server.output


def test_watch_looks_trains_and_stops_at_once_when_sharing_is_switched_off(
    start_server, fridge, service, tmp_path
):
    server, address = start_server(
        "--open_ended", model=MODEL, data_dir=str(service), every="1",
        init_weights=str(tmp_path / "start.safetensors"), min_num_clients="1",
    )  # fmt: skip
    assert fridge("a", "install", f"--server_address={address}", "--cid=a").finish() == 0
    first = json.loads((tmp_path / "a" / "model" / "card.json").read_text())["version"]
    for i in range(9):  # of all classes: a model that knows one alone would be worse at the gate
        paint(tmp_path / "a" / "photos" / CLASSES[i % 3] / f"{i}.jpg", i % 3, 70 + i)
    assert fridge("a", "share", "on").finish() == 0
    watching = fridge("a", "watch", "--every=2")
    server.wait_for("device a joined")
    server.wait_for(r"round 2  devices 1/1")
    watching.wait_for(r"model \d+: 3 held out, \d+ newly right, \d+ newly wrong")
    paint(tmp_path / "a" / "inbox" / "new.jpg", 1, 5)
    watching.wait_for(r"new\.jpg: (Cabbage|Milk|Tomato) ")
    assert fridge("a", "share", "off").finish() == 0
    watching.wait_for("sharing is off: training stops")
    server.wait_for("device a left|lost")
    card = json.loads((tmp_path / "a" / "model" / "card.json").read_text())
    assert card["version"] > first
    assert (tmp_path / "a" / "model" / "personal.safetensors").exists()
    watching.signal(signal.SIGTERM)
    assert watching.finish() == 143


def test_service_waits_for_news_and_goes_on_after_it_was_killed(
    start_server, fridge, service, tmp_path
):
    flags = {"model": MODEL, "data_dir": str(service), "min_num_clients": "1"}
    start = str(tmp_path / "start.safetensors")
    server, address = start_server("--open_ended", init_weights=start, **flags)
    assert fridge("a", "install", f"--server_address={address}", "--cid=a").finish() == 0
    for i in range(4):
        paint(tmp_path / "a" / "photos" / "Milk" / f"{i}.jpg", 1, 70 + i)
    assert fridge("a", "share", "on").finish() == 0
    training = fridge("a", "train", "--stay")
    server.wait_for(r"round 20  devices 1/1")
    server.wait_for(r"round 21 begins when 1 device\(s\) have new data; 0 of 1 have")
    frozen = (tmp_path / "run" / "published" / "frozen.safetensors").read_bytes()
    server.signal(signal.SIGKILL)
    server.finish()
    resumed, _ = start_server(
        f"--resume={tmp_path / 'run'}", server_address=address, data_dir=str(service)
    )
    resumed.wait_for(r"round 40  devices 1/1")
    assert (tmp_path / "run" / "published" / "frozen.safetensors").read_bytes() == frozen
    resumed.wait_for(r"round 41 begins when 1 device\(s\) have new data; 0 of 1 have")
    paint(tmp_path / "a" / "photos" / "Milk" / "late.jpg", 1, 99)
    resumed.wait_for(r"round 41  devices 1/1")  # the device reports it, and stays connected
    assert "left" not in resumed.output
    for process in (training, resumed):
        process.signal(signal.SIGTERM)
        process.finish()
