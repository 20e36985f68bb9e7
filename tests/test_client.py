"""client.py's answers, without a server."""

import json
import subprocess
import sys

import pytest

import client
import utils
from plumbing.errors import FederationError
from tests.conftest import ROOT

DATA = "synthetic:400"


@pytest.fixture
def device() -> client.Client:
    return client.Client("1", "Net", utils.load_data(DATA, "train"), DATA, "cpu")


def config(**changes) -> dict:
    return {"partition": "iid", "num_partitions": 2, "seed": 0, "batch_size": 10, **changes}


def test_device_says_what_it_is_and_how_much_it_has(device):
    properties = device.get_properties(config())
    assert properties["cid"] == "1"
    assert properties["model"] == "Net"
    assert properties["images"] == 200
    assert json.loads(properties["classes"])[0] == "pattern 0"
    assert properties["cores"] >= 1
    assert properties["machine"]


def test_device_keeps_its_part_alone_and_cuts_anew_for_another_server(device):
    device.get_properties(config())
    first = device.data
    assert len(first) == 200
    device.get_properties(config(batch_size=5))
    assert device.data is first
    device.get_properties(config(num_partitions=4))
    assert len(device.data) == 100
    assert device.get_properties(config(partition="none"))["images"] == 400
    assert (
        "none of the server's 1 partitions"
        in device.get_properties(config(num_partitions=1))["problem"]
    )
    assert device.get_properties(config())["images"] == 200
    assert device.data.images.equal(first.images)


def test_fit_counts_the_examples_of_whole_batches(device, capsys):
    weights, num_examples, metrics = device.fit(
        utils.get_weights(device.net), config(batch_size=32, lr=0.02, lr_end=0.0, server_round=1)
    )
    assert num_examples == 192
    assert len(weights) == 10
    assert metrics["loss"] > 0
    assert capsys.readouterr().out.startswith(
        "Client 1: fit\nTraining 1 epoch(s) w/ 6 batches each\n"
    )


def test_each_round_and_device_shuffles_in_its_own_way(device):
    weights = utils.get_weights(device.net)
    first, again, later = (
        device.fit(weights, config(lr=0.02, lr_end=0.0, server_round=server_round))[0]
        for server_round in (1, 1, 2)
    )
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert not all((a == b).all() for a, b in zip(first, later, strict=True))


def test_flower_is_imported_with_its_telemetry_off():
    code = (
        "import sys, {0}, flwr.supercore.telemetry as telemetry\n"
        "sys.exit(telemetry.FLWR_TELEMETRY_ENABLED != '0')"
    )
    for program in ("client", "server"):
        command = [sys.executable, "-c", code.format(program)]
        subprocess.run(command, check=True, cwd=ROOT)


def test_weights_of_another_model_name_the_way_out(device):
    with pytest.raises(FederationError, match="start both sides with the same --model"):
        device.fit(utils.get_weights(device.net)[:-1], config())
