"""The same run on Flower's engine: a ServerApp and a ClientApp.

    ./run_engine.sh --rounds 3                        a simulation on this machine
    flwr run . --run-config "rounds=3 model='Net'"    on a SuperLink that you have

The settings are those of server.py, with the same names and defaults (pyproject.toml lists
them). docs/engine.md compares the two roads.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from client import Client
from federated.errors import FederationError
from federated.settings import underscored
from plumbing.grid import PROBLEM, GridFleet
from plumbing.run_config import flower_home, read_config
from torch_server import Task, run
from torch_trainer import TorchTrainer, choose_device, load_decoded

server_app = ServerApp()
client_app = ClientApp()


# --- The server -----------------------------------------------------------------------


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds over the nodes of a Grid."""
    try:
        settings, args = read_config(context.run_config)

        def open_fleet(task: Task, model_bytes: int) -> GridFleet:
            return GridFleet(grid, settings.for_round(1).to_config(), task.objection_to)

        command = "./run_engine.sh --resume {}"
        run(settings, args, open_fleet, program="flower_app.py", resume_command=command)
    except FederationError as error:
        print(f"flower_app.py: {error}", file=sys.stderr)
        raise


# --- A node ---------------------------------------------------------------------------


def answer(message: Message, context: Context, ask: Callable[[Client], RecordDict]) -> Message:
    """Return a node's reply: what `ask` gets from its Client, or why there is nothing."""
    # What the node is started with (--node-config) overrides the run's settings.
    config = underscored(context.run_config) | underscored(context.node_config)
    try:
        if config["threads"]:
            torch.set_num_threads(config["threads"])
        cid = str(config.get("cid", config.get("partition_id", context.node_id)))
        trainer = TorchTrainer(
            cid,
            config["model"],
            config["data_dir"],
            choose_device(config["device"]),
            download=bool(config.get("download")),
            load_data=partial(load_decoded, flower_home() / "decoded"),
        )
        content = ask(Client(cid, trainer))
    except FederationError as error:
        print(f"flower_app.py: {error}", file=sys.stderr)
        content = RecordDict({"metrics": ConfigRecord({PROBLEM: str(error)})})
    return Message(content, reply_to=message)


@client_app.query()
def query(message: Message, context: Context) -> Message:
    """Report what this node is, and what it will train on."""

    def ask(client: Client) -> RecordDict:
        properties = client.get_properties(dict(message.content.config_records["config"]))
        known = {name: value for name, value in properties.items() if value is not None}
        return RecordDict({"properties": ConfigRecord(known)})

    return answer(message, context, ask)


def _asked(message: Message) -> tuple[list[Any], dict[str, Any]]:
    arrays = message.content.array_records["arrays"].values()
    return [array.numpy() for array in arrays], dict(message.content.config_records["config"])


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train on this node's images."""

    def ask(client: Client) -> RecordDict:
        weights, num_examples, metrics = client.fit(*_asked(message))
        named = zip(client.trainer.names, weights, strict=True)
        metrics = {k: v for k, v in metrics.items() if v is not None}
        metrics["num-examples"] = num_examples
        arrays = ArrayRecord({name: Array(array) for name, array in named})
        return RecordDict({"arrays": arrays, "metrics": ConfigRecord(metrics)})

    return answer(message, context, ask)


@client_app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global weights on this node's test images."""

    def ask(client: Client) -> RecordDict:
        loss, num_examples, metrics = client.evaluate(*_asked(message))
        metrics = {**metrics, "loss": loss, "num-examples": num_examples}
        return RecordDict({"metrics": ConfigRecord(metrics)})

    return answer(message, context, ask)
