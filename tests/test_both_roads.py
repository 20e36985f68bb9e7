"""The same training over the stream and over Flower's Grid, with real ends in this process."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict

import flower_app
import utils
from client import Client
from federated.rounds import Fleet, Plan, Step, synchronous
from federated.settings import RunSettings
from federated.strategies import make_strategy
from plumbing import grid as grid_module
from plumbing.grid import GridFleet
from plumbing.stream import device as transport
from tests.nodes import MemoryGrid
from torch_trainer import TorchTrainer

DATA = "synthetic:200"
SETTINGS = RunSettings(batch_size=10, lr=0.05, min_num_clients=1, min_sample_size=1)
OpenFleet = Callable[[], Fleet]


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return what each Client.fit is given, on either road."""
    seen: list[dict[str, Any]] = []
    fit = Client.fit

    def noted(self: Client, parameters: list[np.ndarray], config: dict[str, Any]) -> Any:
        seen.append(config)
        return fit(self, parameters, config)

    monkeypatch.setattr(Client, "fit", noted)
    return seen


@pytest.fixture(params=["stream", "grid"])
def open_road(
    request: pytest.FixtureRequest,
    open_fleet: Callable[..., Fleet],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Iterator[OpenFleet]:
    """Open a fleet of one device, which trains Net."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def stream() -> Fleet:
        fleet = open_fleet()
        device = Client("0", TorchTrainer("0", "Net", DATA, "cpu"))
        arguments = (fleet.address, device, lambda state: None)
        threading.Thread(target=transport.serve, args=arguments, daemon=True).start()
        return fleet

    def grid() -> Fleet:
        monkeypatch.setenv("FLWR_HOME", str(tmp_path))
        monkeypatch.setattr(grid_module, "NODES_SECONDS", 0.02)
        monkeypatch.setattr(grid_module, "REPLIES_SECONDS", 0.01)
        run_config = {"model": "Net", "data_dir": DATA, "device": "cpu", "threads": 1}
        context = Context(1, 1, {"cid": "0"}, RecordDict(), run_config)

        def answer(message: Message) -> RecordDict:
            return flower_app.client_app(message, context).content

        make_strategy("FedAvg")  # Flower's messages can be made from here on
        nodes = MemoryGrid()
        nodes.add(1, answer, query=answer)
        return GridFleet(nodes, SETTINGS.for_round(1).to_config(), lambda properties: None)

    yield {"stream": stream, "grid": grid}[request.param]
    torch.set_num_threads(threads)


def run(open_road: OpenFleet, strategy: str) -> Step:
    weights = utils.get_weights(utils.build_model("Net", 10))
    plan = Plan(
        1,
        lambda server_round: SETTINGS.for_round(server_round).to_config(),
        lambda weights: {"loss": 1.0},
        min_num_clients=1,
    )
    flower = make_strategy(strategy, 1.0, 1, SETTINGS.lr, sample_fraction_evaluate=1.0)
    [step] = synchronous(open_road(), flower, weights, plan)
    return step


def test_larger_mu_of_fedprox_makes_a_smaller_update(open_road, configs):
    free = run(open_road, "FedProx:proximal_mu=0")
    held = run(open_road, "FedProx:proximal_mu=1")
    assert [config["proximal_mu"] for config in configs] == [0.0, 1.0]
    assert [config["server_round"] for config in configs] == [1, 1]
    assert 0 < held.contributions[0].norm < 0.95 * free.contributions[0].norm


EXTRA = """
from flwr.serverapp.strategy import FedAvg


class Extra(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        config["my-key"] = 3
        config["words"] = "a b"
        return super().configure_train(server_round, arrays, config, grid)
"""


def test_settings_that_we_do_not_know_reach_the_clients_fit(
    open_road, configs, tmp_path, monkeypatch
):
    (tmp_path / "extra.py").write_text(EXTRA)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    run(open_road, "extra:Extra")
    [config] = configs
    assert (config["my_key"], config["words"]) == (3, "a b")
    assert config["lr"] == SETTINGS.lr


def test_device_evaluates_the_model_that_it_trained(open_road):
    step = run(open_road, "FedAvg")
    net = utils.build_model("Net", 10)
    utils.set_weights(net, step.weights)
    expected = utils.test(net, utils.load_data(DATA, "test"))
    assert step.device_scores
    assert step.device_scores.metrics["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert step.device_scores.metrics["accuracy"] == pytest.approx(expected.accuracy)
