"""The walk-through with real processes and real gRPC."""

import hashlib
import json
import re
import signal
import sys
import time
from datetime import datetime, timedelta

import numpy as np
import pytest
import safetensors.torch

import utils
from tests.conftest import ROOT, free_port


def test_walk_through_to_a_saved_model_that_starts_the_next_run(
    start_server, start_client, tmp_path
):
    server, address = start_server(rounds="2", epochs="2", sample_fraction_evaluate="1")
    clients = [start_client(address, cid) for cid in (0, 1)]

    assert server.finish() == 0
    assert [client.finish() for client in clients] == [0, 0]

    for cid, client in enumerate(clients):
        assert f"Client {cid}: connected to {address}" in client.lines
        assert client.lines.count(f"Client {cid}: fit") == 2
        assert client.lines.count(f"Client {cid}: evaluate") == 2
        assert client.lines.count("Training 2 epoch(s) w/ 6 batches each") == 2  # 200 // 32
        assert sum(line.startswith("Epoch took: ") for line in client.lines) == 4
    assert "device 0 joined: " in server.output
    assert ", Net, 200 of 400 synthetic images (part 0 of 2)" in server.output
    assert "round 2/2  devices 2/2  loss " in server.output

    run = tmp_path / "run"
    for_tensorboard = next(run.glob("events.out.tfevents.*"))
    assert {path.name for path in run.iterdir()} == {
        "config.json", "metrics.jsonl", "events.jsonl", "checkpoint.safetensors",
        "checkpoint.previous.safetensors", "model.safetensors", "report.png", "lock",
        for_tensorboard.name,
    }  # fmt: skip
    config = json.loads((run / "config.json").read_text())
    assert config["epochs"] == 2
    assert config["momentum"] == 0.9
    assert config["utils_sha256"] == hashlib.sha256((ROOT / "utils.py").read_bytes()).hexdigest()
    assert {"git_commit", "git_changed"} <= config.keys()
    rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [metrics["server_round"] for metrics in rounds] == [1, 2]
    assert [device["name"] for device in rounds[1]["devices"]] == ["device 0", "device 1"]
    assert [metrics["lr"] for metrics in rounds] == [config["lr"], config["lr"] / 2]
    for metrics in rounds:
        assert datetime.fromisoformat(metrics["time"]).utcoffset() == timedelta(0)
        for name in ("bytes_sent", "bytes_received"):
            assert metrics[name] == sum(device[name] for device in metrics["devices"]) > 2 * 248_024
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (start,) = (event for event in events if event["event"] == "started")
    before = f"before round 1  loss {start['loss']:.3f}  accuracy {100 * start['accuracy']:.1f} %"
    assert f"{before} (synthetic images)" in server.output
    assert start["loss"] > rounds[0]["loss"]
    scores = rounds[1]["device_scores"]
    assert scores["sampled"] == 2
    assert [score["num_examples"] for score in scores["devices"]] == [40, 40]  # of 80
    # Both parts together are the server's test images.
    for name in ("loss", "accuracy"):
        assert scores["metrics"][name] == pytest.approx(rounds[1][name], abs=1e-3)
    assert "round 2/2  tested on devices 2/2  loss " in server.output
    device = rounds[1]["devices"][0]
    reported = device["metrics"]
    assert device["num_examples"] == 192
    assert {"loss", "seconds", "steps", "images_per_second", "peak_ram_mb"} <= set(reported)
    assert reported["total_bytes_received"] > device["bytes_sent"] > 248_024
    assert device["bytes_received"] > 248_024  # 62,006 numbers of 4 bytes
    lines = [line for line in server.lines if line.startswith("  device 0 ")]
    assert len(lines) == 2
    assert re.search(r"192 images +\d+\.\d s +[\d,]+ images/s +[\d,]+ MB RAM", lines[0])
    assert rounds[1]["test_images"] == "80 synthetic images"
    with safetensors.safe_open(run / "checkpoint.safetensors", "np") as checkpoint:
        notes = checkpoint.metadata()
    assert notes["server_round"] == "2"
    fields = {
        *config,
        *rounds[1],
        *scores,
        *scores["devices"][0],
        *device,
        *reported,
        *notes,
        *({path.name for path in run.iterdir()} - {for_tensorboard.name}),
    }
    documented = set(re.findall(r"`([\w.]+)`", (ROOT / "docs/runs.md").read_text()))
    assert fields <= documented
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")

    net = utils.build_model("Net", 10)
    net.load_state_dict(safetensors.torch.load_file(run / "model.safetensors"))
    accuracy = utils.test(net, utils.load_data("synthetic:400", "test")).accuracy
    assert accuracy == pytest.approx(rounds[1]["accuracy"], abs=0.02)
    assert (
        f"test accuracy {100 * rounds[1]['accuracy']:.1f} % on 80 synthetic images" in server.output
    )
    assert f"model in {run / 'model.safetensors'}" in server.output

    server, address = start_server(
        rounds="1", min_num_clients="1", min_sample_size="1", lr="1e-9",
        init_weights=str(run / "model.safetensors"), run_dir=str(tmp_path / "next"),
    )  # fmt: skip
    start_client(address, 0)
    assert server.finish() == 0
    again = json.loads((tmp_path / "next/metrics.jsonl").read_text())["loss"]
    assert again == pytest.approx(rounds[1]["loss"], abs=1e-4)


@pytest.mark.waits
def test_clients_wait_for_a_server_and_for_the_next_if_it_is_stopped_or_killed(
    start_server, start_client, tmp_path
):
    address = f"127.0.0.1:{free_port()}"
    clients = [start_client(address, cid) for cid in (0, 1)]
    for client in clients:
        client.wait_for(f"no server at {address} yet .* next try in .* .is server.py running there")
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        server, _ = start_server(
            server_address=address, rounds="1000", run_dir=str(tmp_path / str(number))
        )
        server.wait_for("round 1/1000")
        server.signal(number)
        assert server.finish() == code
        assert "Traceback" not in server.output
        reason = "" if number == signal.SIGKILL else "the server (stopped|was interrupted)"
        for client in clients:
            client.wait_for(f"left {address} .{reason}.*, next try in")
            assert client.popen.poll() is None
            assert "goaway" not in client.output.lower()  # gRPC's own words for it

    server, _ = start_server(server_address=address, rounds="1", run_dir=str(tmp_path / "last"))
    assert server.finish() == 0
    assert [client.finish() for client in clients] == [0, 0]


STOCK_CLIENT = """
import sys, flwr, numpy as np
class Stock(flwr.client.NumPyClient):
    def fit(self, parameters, config):
        return [p + np.float32(1) for p in parameters], 10, {"seen_lr": config["lr"]}
flwr.client.start_client(server_address=sys.argv[1], client=Stock().to_client(), insecure=True)
"""


def test_stock_flower_client_trains_in_our_run(start_server, launch, tmp_path):
    server, address = start_server(rounds="2", min_num_clients="1", min_sample_size="1")
    client = launch(sys.executable, "-c", STOCK_CLIENT, address)
    assert server.finish() == 0
    assert client.finish() == 0
    assert "device ? joined: a client that reports nothing of its board" in server.output

    after = safetensors.torch.load_file(tmp_path / "run" / "model.safetensors")
    for name, before in utils.build_model("Net", 10, seed=0).state_dict().items():
        np.testing.assert_allclose(after[name], before + 2, rtol=1e-6)


STOCK_SERVER = """
import sys, flwr
flwr.server.start_server(
    server_address=sys.argv[1],
    config=flwr.server.ServerConfig(num_rounds=2),
    strategy=flwr.server.strategy.FedAvg(
        min_fit_clients=1, min_evaluate_clients=1, min_available_clients=1,
        on_fit_config_fn=lambda server_round: {"epochs": 2},
    ),
)
"""


def test_our_client_trains_in_a_stock_flower_run(start_client, launch):
    address = f"127.0.0.1:{free_port()}"
    client = start_client(address, "kitchen")
    server = launch(sys.executable, "-c", STOCK_SERVER, address)
    assert server.finish() == 0
    assert client.finish() == 0
    assert "[SUMMARY]" in server.output
    assert "round 2: " in server.output  # the history of losses, from our evaluate
    assert client.lines.count("Training 2 epoch(s) w/ 12 batches each") == 2  # all 400 images
    assert client.lines.count("Client kitchen: evaluate") == 2


def test_devices_that_do_not_fit_are_refused_and_the_run_waits_on(
    start_server, start_client, tmp_path
):
    from PIL import Image

    for name in ("milk", "tomato"):
        folder = tmp_path / "fridge" / "train" / name
        folder.mkdir(parents=True)
        for i in range(40):
            Image.new("RGB", (40, 30), (i, 2 * i, 3 * i)).save(folder / f"{i}.png")
    server, address = start_server(rounds="1")
    for cid, options, reason in (
        ("0", {"model": "ResNet18"}, "it was started with --model ResNet18, the server with"),
        ("0", {"data_dir": str(tmp_path / "fridge")}, 'its classes are ["milk", "tomato"]'),
        ("2", {}, "--cid 2 is none of the server's 2 partitions (0 to 1)"),
    ):
        client = start_client(address, cid, **options)
        assert client.finish() == 1
        refusal = f"client.py: the server refuses this device: {reason}"
        assert client.lines[-1].startswith(refusal)
        server.wait_for(re.escape(f"refused device {cid}: {reason}"))

    clients = [start_client(address, cid) for cid in (0, 1)]
    assert [client.finish() for client in clients] == [0, 0]
    assert server.finish() == 0


def test_signal_ends_a_client_in_the_middle_of_an_epoch(start_server, start_client):
    server, address = start_server(epochs="100000")
    clients = [start_client(address, cid) for cid in (0, 1)]
    for client in clients:
        client.wait_for("Training 100000 epoch")
    time.sleep(0.5)
    for cid, (number, code) in enumerate(((signal.SIGINT, 130), (signal.SIGTERM, 143))):
        start = time.monotonic()
        clients[cid].signal(number)
        assert clients[cid].finish() == code
        assert time.monotonic() - start < 5
        assert "Traceback" not in clients[cid].output
    dropped = r"round 1: dropped device (\d): the connection broke"
    assert {server.wait_for(dropped)[1] for _ in clients} == {"0", "1"}


def test_run_whose_replies_make_no_model_ends_with_the_reason(start_server, launch):
    server, address = start_server(strategy="Bulyan", min_num_clients="3", min_sample_size="3")
    for number in ("1", "nan", "nan"):  # one good reply, where Bulyan needs three
        launch(sys.executable, "-c", STOCK_CLIENT.replace("(1)", f"('{number}')"), address)
    assert server.finish() == 1
    assert "Bulyan makes no model of these updates" in server.output
    assert server.lines[-1].startswith("server.py: round 1 brought no new model in 3 attempts")


def test_bad_device_is_avoided_when_its_round_is_tried_again(start_server, start_client, launch):
    server, address = start_server(rounds="6", sample_fraction="0.5", min_sample_size="1")
    start_client(address, 0)
    launch(
        sys.executable, "-c", STOCK_CLIENT.replace("np.float32(1)", "np.float32('nan')"), address
    )
    assert server.finish() == 0
    assert "round 6/6  devices 1/1" in server.output


def test_commands_work_from_another_directory(launch, tmp_path):
    help_text = launch(sys.executable, ROOT / "server.py", "--help", cwd=tmp_path)
    assert help_text.finish() == 0
    assert "--server-address" in help_text.output
    assert list(tmp_path.iterdir()) == []


def test_client_gives_up_after_max_wait_seconds(start_client):
    client = start_client(f"127.0.0.1:{free_port()}", 0, max_wait_seconds="1")
    assert client.finish() == 1
    assert (
        "for 1 s, giving up (connection refused); is server.py running there?" in client.lines[-1]
    )


OTHER_NET = """
import sys
sys.path.insert(0, "{root}")
from plumbing import cli
cli.start("client.py")
import client, torch_trainer, utils
class Net(utils.Net):
    def __init__(self, num_classes=10):
        super().__init__(num_classes)
        {change}
utils.MODELS["Net"] = Net
torch_trainer.source_hash = lambda model: "c0ffee" * 10 + "beef"
client.main()
"""


def test_other_code_under_the_same_name_is_refused_or_named(
    start_server, launch, start_client, tmp_path
):
    server, address = start_server(rounds="1")
    flags = [f"--server_address={address}", "--data_dir=synthetic:400", "--cid=1"]

    def client_with(change):
        (tmp_path / "client.py").write_text(OTHER_NET.format(root=ROOT, change=change))
        return launch(sys.executable, tmp_path / "client.py", *flags)

    wider = client_with("self.fc1 = utils.nn.Linear(400, 121); self.fc2 = utils.nn.Linear(121, 84)")
    assert wider.finish() == 1
    problem = (
        r"its Net has 10 arrays of 62,491 numbers, sha256:\w{12}, the server's "
        r"10 arrays of 62,006 numbers, sha256:\w{12}; give both the same utils.py"
    )
    assert re.search(problem, wider.output)
    server.wait_for("refused device 1: " + problem)

    same_form = client_with("pass")
    server.wait_for(
        r"warning: device 1 trains with another utils.py \(sha256:c0ffeec0ffee\) "
        r"than this server's \(sha256:\w{12}\)"
    )
    start_client(address, 0)
    assert (server.finish(), same_form.finish()) == (0, 0)
    assert "warning: device 0" not in server.output


@pytest.mark.parametrize("lr", ["1e6", "1e38"])
def test_learning_rate_that_makes_training_diverge_is_named(start_server, start_client, lr):
    server, address = start_server(lr=lr, min_num_clients="1", min_sample_size="1")
    start_client(address, 0)
    assert server.finish() == 1
    assert server.lines[-1] == (
        "server.py: round 1 brought no new model in 3 attempts; training diverges; start again "
        f"with a --lr below this round's {float(lr):g}"
    )
