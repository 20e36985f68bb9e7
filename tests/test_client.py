"""client.py's answers, without a server."""

import copy
import itertools
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import client
import torch_trainer
import utils
from federated.errors import FederationError
from plumbing.security.identity import open_identity
from tests.conftest import ROOT
from torch_trainer import TorchTrainer

DATA = "synthetic:400"


@pytest.fixture
def device() -> client.Client:
    return client.Client("1", TorchTrainer("1", "Net", DATA, "cpu"))


def config(**changes) -> dict:
    return {"partition": "iid", "num_partitions": 2, "seed": 0, "batch_size": 10, **changes}


def test_device_reports_what_it_is_and_how_much_it_has(device):
    properties = device.get_properties(config())
    assert properties["cid"] == "1"
    assert properties["model"] == "Net"
    assert properties["images"] == 200
    assert json.loads(properties["classes"])[0] == "pattern 0"
    assert properties["cores"] >= 1
    assert properties["machine"]


def test_device_keeps_its_part_alone_and_cuts_again_for_another_server(device):
    device.get_properties(config())
    first = device.trainer.data
    assert len(first) == 200
    device.get_properties(config(batch_size=5))
    assert device.trainer.data is first
    device.get_properties(config(num_partitions=4))
    assert len(device.trainer.data) == 100
    assert device.get_properties(config(partition="none"))["images"] == 400
    assert (
        "none of the server's 1 partitions"
        in device.get_properties(config(num_partitions=1))["problem"]
    )
    assert device.get_properties(config())["images"] == 200
    assert device.trainer.data.images.equal(first.images)


@pytest.mark.parametrize("cid", ["2", "00", "+1", "kitchen"])
def test_name_that_is_no_partition_is_refused_where_the_images_are_cut(cid):
    device = client.Client(cid, TorchTrainer(cid, "Net", DATA, "cpu"))
    problem = device.get_properties(config())["problem"]
    assert problem.startswith(f"--cid {cid} is none of the server's 2 partitions (0 to 1)")
    assert device.get_properties(config(partition="none"))["images"] == 400


@pytest.mark.parametrize(
    ("partition", "images", "data"),
    [
        ("auto", 200, "200 of 400 synthetic images (part 1 of 2)"),
        ("iid", 200, "200 of 400 synthetic images (part 1 of 2)"),
        ("none", 400, "400 synthetic images, all of them"),
    ],
)
def test_data_set_that_every_device_has_is_split_by_default(
    device, capsys, partition, images, data
):
    properties = device.get_properties(config(partition=partition))
    assert (properties["images"], properties["data"]) == (images, data)
    device.get_properties(config(partition=partition))
    assert capsys.readouterr().out == f"Client 1: trains on {data}\n"


@pytest.mark.parametrize(
    ("partition", "data"),
    [
        ("auto", "100 images, all of them"),
        ("none", "100 images, all of them"),
        ("iid", "50 of 100 images (part 1 of 2)"),
        ("dirichlet:0.5", "50 of 100 images (part 1 of 2)"),
    ],
)
def test_folder_of_images_is_split_only_on_demand(own_images, partition, data):
    device = client.Client("1", TorchTrainer("1", "Net", own_images, "cpu"))
    assert device.get_properties(config(partition=partition))["data"] == data


def test_two_devices_with_own_images_use_all_of_them_by_default(
    start_server, start_client, own_images, tmp_path
):
    server, address = start_server(rounds="1", data_dir=str(own_images), batch_size="20")
    clients = [start_client(address, name, data_dir=str(own_images)) for name in ("0", "kitchen")]
    assert server.finish() == 0, server.output
    assert [process.finish() for process in clients] == [0, 0]
    devices = json.loads((tmp_path / "run/metrics.jsonl").read_text())["devices"]
    assert {d["name"]: d["num_examples"] for d in devices} == {
        "device 0": 100, "device kitchen": 100,
    }  # fmt: skip
    assert server.output.count(", Net, 100 images, all of them") == 2
    assert "Client kitchen: trains on 100 images, all of them" in clients[1].lines


def test_fit_counts_the_examples_of_whole_batches(device, capsys):
    weights, num_examples, metrics = device.fit(
        device.get_parameters({}), config(batch_size=32, lr=0.02, lr_end=0.0, server_round=1)
    )
    assert num_examples == 192
    assert len(weights) == 10
    assert metrics["loss"] > 0
    assert capsys.readouterr().out.startswith(
        "Client 1: fit\nTraining 1 epoch(s) w/ 6 batches each\n"
    )


def test_each_round_and_device_shuffles_in_its_own_way(device):
    weights = device.get_parameters({})
    first, again, later = (
        device.fit(weights, config(lr=0.02, lr_end=0.0, server_round=server_round))[0]
        for server_round in (1, 1, 2)
    )
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert not all((a == b).all() for a, b in zip(first, later, strict=True))


def test_device_evaluates_its_part_of_the_test_images_that_all_have(device):
    weights = device.get_parameters({})
    whole, count, _ = device.evaluate(weights, config(partition="none"))
    assert count == 80
    losses = []
    for cid in ("0", "1"):
        tester = client.Client(cid, TorchTrainer(cid, "Net", DATA, "cpu"))
        loss, count, metrics = tester.evaluate(weights, config())
        assert (count, metrics["images"]) == (40, "test")
        losses.append(loss)
    assert np.mean(losses) == pytest.approx(whole, rel=1e-5)
    assert losses[0] != losses[1]


def test_device_evaluates_on_all_its_own_test_images(own_images):
    tester = client.Client("kitchen", TorchTrainer("kitchen", "Net", str(own_images), "cpu"))
    _, count, metrics = tester.evaluate(tester.get_parameters({}), {"partition": "auto"})
    assert (count, metrics["images"]) == (20, "test")


def test_device_without_test_images_evaluates_on_its_training_images_and_reports_that(
    own_images, capsys
):
    shutil.rmtree(own_images / "test")
    tester = client.Client("kitchen", TorchTrainer("kitchen", "Net", str(own_images), "cpu"))
    _, count, metrics = tester.evaluate(tester.get_parameters({}), {"partition": "auto"})
    assert (count, metrics["images"]) == (100, "training")
    assert "Client kitchen: evaluates on its training images" in capsys.readouterr().out


def test_flower_is_imported_with_its_telemetry_off():
    code = (
        "import sys\n"
        "from plumbing import cli\n"
        "cli.start('{0}.py')\n"
        "import {0}, flwr.supercore.telemetry as telemetry\n"
        "sys.exit(telemetry.FLWR_TELEMETRY_ENABLED != '0')"
    )
    for program in ("client", "server"):
        command = [sys.executable, "-c", code.format(program)]
        subprocess.run(command, check=True, cwd=ROOT)


CLIENT_WITHOUT_FLOWER = """
import sys, client
client.main(sys.argv[1:])
print("flower:", sorted(name for name in sys.modules if name.partition(".")[0] == "flwr"))
"""


def test_client_serves_a_whole_run_without_flower(start_server, launch):
    server, address = start_server(rounds="2", min_num_clients="1", min_sample_size="1")
    flags = [f"--server_address={address}", "--cid=0", "--data_dir=synthetic:400"]
    process = launch(sys.executable, "-c", CLIENT_WITHOUT_FLOWER, *flags, cwd=ROOT)
    assert process.finish() == 0
    assert process.lines.count("Client 0: fit") == 2
    assert process.lines[-1] == "flower: []"
    assert server.finish() == 0


def test_garbage_is_looked_for_once_among_the_imports_and_not_at_the_end():
    code = (
        "import atexit, gc, os, weakref\n"
        "atexit.register(lambda: gc.get_freeze_count() > 400_000 or os._exit(1))\n"
        "usual = gc.get_threshold()\n"
        "from plumbing import cli\n"
        "cli.start('client.py')\n"
        "class Cycle: pass\n"
        "cycle = Cycle()\n"
        "cycle.itself, garbage = cycle, weakref.ref(cycle)\n"
        "del cycle\n"
        "kept = [[] for _ in range(250_000)]\n"
        "assert gc.get_count()[0] > 250_000, 'looked among what is imported'\n"
        "kept += [[] for _ in range(50_000)]\n"
        "assert not garbage(), 'what is garbage was kept'\n"
        "assert 250_000 < gc.get_freeze_count() < 400_000\n"
        "kept += [[] for _ in range(100_000)]\n"
        "assert gc.get_threshold() == usual\n"
        "assert gc.get_count()[0] < 1_000, 'does not look as usual'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_weights_of_another_model_name_the_way_out(device):
    weights = device.get_parameters({})
    with pytest.raises(
        FederationError,
        match="the server sent 9 arrays, Net has 10; start both sides with the same --model",
    ):
        device.fit(weights[:-1], config())
    weights[-1] = np.zeros(7, np.float32)
    with pytest.raises(
        FederationError, match=r"fc3.bias has shape \(10,\), not \(7,\); start serv"
    ):
        device.fit(weights, config())


def test_training_stops_after_the_round_seconds(device, capsys):
    weights = device.get_parameters({})
    _, _, metrics = device.fit(weights, config(epochs=100_000, round_seconds=0.5))
    assert 0.5 <= metrics["seconds"] < 30
    assert capsys.readouterr().out.endswith(
        f"Stopped after {metrics['steps']} of 2000000 batches\n"
    )


def test_progress_is_shown_on_a_terminal_only_and_wiped(device, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    clock = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    device.fit(device.get_parameters({}), config(batch_size=100))
    out = capsys.readouterr().out
    assert re.search(r"\r1/2 batches  loss \d\.\d{3}\x1b\[K\r\x1b\[KEpoch took: ", out)


class Mean:
    """A trainer of one number: the mean of the numbers that it has."""

    model, names, classes, device, lr = "mean", ["mean"], ["a", "b"], "cpu", 1.0
    source = "5eed"

    def describe(self):
        return "the mean of 3 numbers"

    def prepare(self, settings):
        return 3, "3 numbers, all of them"

    def get_weights(self):
        return {"mean": np.zeros(1)}

    def fit(self, weights, settings, report):
        report(1, 2, 0.5, 10.0)
        return {"mean": weights["mean"] + settings.lr * 4}, 3, {"loss": 0.5}

    def evaluate(self, weights, settings):
        return float(weights["mean"][0]), 3, {}


def test_another_trainer_is_served_without_importing_torch():
    device = client.Client("0", Mean())
    properties = device.get_properties({})
    assert (properties["images"], properties["data"]) == (3, "3 numbers, all of them")
    assert properties["source"] == "5eed"
    assert properties["weights"].startswith("1 arrays of 1 numbers, sha256:")
    weights, num_examples, metrics = device.fit([np.ones(1)], {"lr": 0.5})
    assert (weights, num_examples, metrics["loss"]) == ([3.0], 3, 0.5)
    assert device.evaluate([np.full(1, 2.0)], {}) == (2.0, 3, {})
    code = "import client, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# --- Memory ---------------------------------------------------------------------------


def with_memory(monkeypatch, ram: float, swap: float) -> None:
    monkeypatch.setattr(torch_trainer, "available_memory", lambda: (ram, swap))


def test_training_with_room_for_it_gives_no_warning(device, monkeypatch, capsys):
    with_memory(monkeypatch, 60e6, 0)
    assert "problem" not in device.get_properties(config())
    assert capsys.readouterr().err == ""


def test_training_that_will_swap_is_a_warning_with_the_figures(device, monkeypatch, capsys):
    with_memory(monkeypatch, 10e6, 1e9)
    for _ in range(2):  # once, however often it connects
        assert "problem" not in device.get_properties(config(batch_size=100))
    assert re.fullmatch(
        r"Client 1: warning: training Net in batches of 100 takes about 2\d MB more, and this "
        r"device has 10 MB of RAM and 1,000 MB of swap free, so it will swap and be slow; start "
        r"the server with a smaller --batch_size or another --model\n",
        capsys.readouterr().err,
    )


def test_training_without_room_for_it_is_a_problem_that_names_the_way_out(device, monkeypatch):
    with_memory(monkeypatch, 10e6, 5e6)
    problem = device.get_properties(config(batch_size=100))["problem"]
    assert "takes about 2" in problem
    assert "10 MB of RAM and 5 MB of swap" in problem
    assert problem.endswith("smaller --batch_size or another --model, or add swap here")
    with_memory(monkeypatch, 60e6, 0)
    assert "problem" not in device.get_properties(config(batch_size=100))


PEAK = r"""
import os, re, sys, torch_trainer, utils
from pathlib import Path
from federated.settings import Settings

def megabytes(name):
    return int(re.search(name + r":\s*([0-9]+)", Path("/proc/self/status").read_text())[1]) / 1e3

for case in sys.argv[1:]:  # each in a process of its own, which need not import torch
    if pid := os.fork():
        os.waitpid(pid, 0)
    else:
        break
else:
    sys.exit()
model, batch_size = case.split()[0], int(case.split()[1])
trainer = torch_trainer.TorchTrainer("0", model, f"synthetic:{2 * batch_size}", "cpu")
config = dict(partition="none", num_partitions=1, batch_size=batch_size, server_round=1)
settings = Settings.from_config(config, default_lr=utils.LR)
trainer.prepare(settings)
before = megabytes("VmRSS")
needed = torch_trainer.training_bytes(trainer.net, trainer.data, batch_size) / 1e6
weights = trainer.get_weights()  # as they come from the server, in two copies
message = b"".join(w.tobytes() for w in weights.values())
weights, num_examples, metrics = trainer.fit(weights, settings)
message = b"".join(w.tobytes() for w in weights.values())
print("measured:", model, batch_size, before, needed, megabytes("VmHWM"))
"""


@pytest.mark.timeout(300)
def test_estimate_of_memory_is_near_the_real_increase():
    run = subprocess.run(
        [sys.executable, "-c", PEAK, "Net 32", "Net 512", "PiNet 32", "ResNet18 32"],
        capture_output=True, text=True, check=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    cases = re.findall("^measured: (.*)", run.stdout, re.MULTILINE)
    assert len(cases) == 4, run.stderr
    for model, batch_size, *numbers in map(str.split, cases):
        before, needed, peak = map(float, numbers)
        print(f"{model}, batch {batch_size}: {before:.0f} + {needed:.0f} MB, peak {peak:.0f} MB")
        increase = peak - before
        assert 0.9 * increase - 10 < needed < 1.25 * increase + 25, (model, batch_size)


def test_estimate_leaves_the_model_as_it_was():
    class Normed(torch.nn.Sequential):
        def __init__(self):
            super().__init__(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))

    net = Normed()
    before = copy.deepcopy(net.state_dict())
    small, large = (
        torch_trainer.training_bytes(net, utils.load_data(DATA, "train"), size) for size in (10, 20)
    )
    assert all(net.state_dict()[name].equal(value) for name, value in before.items())
    # At least the images, and the convolution's output that BatchNorm saves.
    assert large - small > 10 * 4 * (3 * 32 * 32 + 4 * 30 * 30)


# --- Which processor ------------------------------------------------------------------


@pytest.fixture
def unusable_gpu(monkeypatch):
    """A GPU that torch sees, and for which it has no kernels: a stand-in."""
    ones = torch.ones

    def no_kernel(*shape, device="cpu"):
        if device == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available\nCompile with …")
        return ones(*shape)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", no_kernel)


def test_gpu_that_cannot_multiply_is_reported_and_the_cpu_trains(unusable_gpu, capsys):
    assert torch_trainer.choose_device("auto") == "cpu"
    assert capsys.readouterr().out == (
        "the GPU fails at a matrix product (CUDA error: no kernel image is available); "
        "training on the CPU\n"
    )


def test_gpu_that_cannot_multiply_is_an_error_where_it_is_demanded(unusable_gpu):
    with pytest.raises(
        FederationError, match=r"--device cuda: the GPU fails .* choose auto or cpu"
    ):
        torch_trainer.choose_device("cuda")


def test_missing_gpu_is_reported_where_one_is_expected(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("NVIDIA_VISIBLE_DEVICES", raising=False)
    assert torch_trainer.choose_device("auto") == "cpu"
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", "all")
    assert torch_trainer.choose_device("auto") == "cpu"
    assert capsys.readouterr().out == "torch finds no CUDA GPU here; training on the CPU\n"


def test_gpu_that_multiplies_is_taken(monkeypatch):
    ones = torch.ones
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))  # stands in for one
    assert torch_trainer.choose_device("auto") == "cuda"


# --- Joining a server with --secure ---------------------------------------------------


def join_only(*arguments: str | Path) -> list[str]:
    flags = ["--server_address=127.0.0.1:9", "--cid=0", "--join_only"]
    return [sys.executable, str(ROOT / "client.py"), *flags, *map(str, arguments)]


def test_key_file_is_taken_from_standard_input_for_its_owner_alone(tmp_path):
    admit = ["devices", "admit", "0", f"--keys={tmp_path / 'owner'}", f"--out={tmp_path / 'out'}"]
    make = ["devices", "token", f"--keys={tmp_path / 'owner'}"]
    for words in (make, admit):
        subprocess.run([sys.executable, ROOT / "server.py", *words], check=True)
    key_file = (tmp_path / "out/device-0.pem").read_text()
    subprocess.run(
        join_only("--join=-", f"--keys={tmp_path / 'device'}"),
        input=key_file, text=True, check=True,
    )  # fmt: skip
    kept = tmp_path / "device/device-0.pem"
    assert kept.read_text().strip() == key_file.strip()
    assert kept.stat().st_mode & 0o777 == 0o600
    assert kept.parent.stat().st_mode & 0o777 == 0o700


def test_terminal_is_asked_for_the_token_without_echo(tmp_path):
    outer, inner = pty.openpty()
    mistyped = "join1_" + 70 * "A"
    try:
        process = subprocess.Popen(
            join_only("--join=-", f"--keys={tmp_path / 'keys'}"),
            stdin=inner, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        assert process.stderr
        assert process.stderr.read(18) == "token (not shown):"  # the echo is off by now
        os.write(outer, f"{mistyped}\n".encode())
        out, err = process.communicate(timeout=60)
        assert select.select([outer], [], [], 0)[0] == []
    finally:
        os.close(outer)
        os.close(inner)
    assert process.returncode == 1
    assert "a character of it is wrong or missing" in err
    assert mistyped not in out + err


def test_keys_directory_of_another_user_is_refused_with_the_way_out(tmp_path):
    keys = tmp_path / "keys"
    keys.mkdir()
    user = os.geteuid()
    keys.chmod(0o700 if user == 0 else 0)
    try:
        os.seteuid(user or 65534)
        with pytest.raises(FederationError, match=r"may not look for its key .* use --insecure"):
            open_identity(keys, "0", None)
    finally:
        os.seteuid(user)
        keys.chmod(0o700)


# --- In a container -------------------------------------------------------------------


def test_state_for_the_health_check_names_the_process_and_what_it_does(monkeypatch, tmp_path):
    monkeypatch.setenv("CLIENT_STATUS_FILE", str(tmp_path / "state"))
    client.write_state("0", "waiting for 10.0.0.1:8080 (no answer)")
    state = (tmp_path / "state").read_text()
    assert state == f"{os.getpid()} waiting for 10.0.0.1:8080 (no answer)\n"


def test_state_that_cannot_be_written_is_no_reason_to_stop(monkeypatch, tmp_path):
    monkeypatch.setenv("CLIENT_STATUS_FILE", str(tmp_path / "no" / "state"))
    client.write_state("0", "starting")


def test_self_test_trains_without_a_server_and_shows_what_the_device_is(launch):
    device = launch(sys.executable, ROOT / "client.py", "--self_test", "--model=PiNet")
    assert device.finish() == 0
    assert re.search(r"cores, Python 3\.\d+\.\d+, torch 2\.9\.1", device.output)
    assert re.search(r"PiNet on cpu: loss [12]\.\d{3}, [\d,]+ images/s", device.output)
    assert "training works here, on cpu" in device.output
