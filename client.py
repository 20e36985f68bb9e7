"""The device's side: train on the images that stay here, send back the weights.

    python client.py --server_address 192.168.1.20:8080 --cid 0 --model Net

Waits for the server, comes back when the connection breaks, ends when the run is over.
"""

import signal

if __name__ == "__main__":
    # Until main() begins, while gRPC is imported, Ctrl-C ends without a traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import plumbing  # isort: skip # noqa: F401 # first: it sets what gRPC and Flower read

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
from flwr.client import NumPyClient

from federated.errors import FederationError
from federated.settings import Settings
from plumbing.addresses import check_cid, parse_address
from plumbing.board import describe_board
from plumbing.security.identity import open_identity
from plumbing.security.keys import default_keys_dir
from plumbing.stream.device import enrol, serve
from plumbing.telemetry import Telemetry

ROOT = Path(__file__).resolve().parent


class Trainer(Protocol):
    """What learns on this device, and from what: PyTorch's is in torch_trainer.py."""

    model: str  # the name that the server has to have, too
    names: list[str]  # of the weights, in the order in which they cross the wire
    classes: list[str]
    device: str  # the processor that it trains on
    lr: float  # where a server, such as a stock Flower one, gives none

    def describe(self) -> str:
        """Return a line on the model, the processor and the data."""

    def prepare(self, settings: Settings) -> tuple[int, str]:
        """Return how many images it will train on, and which in words.

        Raises:
            FederationError: it cannot train with these settings.
        """

    def get_weights(self) -> dict[str, np.ndarray]:
        """Return the weights as they are here."""

    def fit(
        self, weights: Mapping[str, np.ndarray], settings: Settings
    ) -> tuple[dict[str, np.ndarray], int, dict[str, Any]]:
        """Train from `weights` on; return the new ones, how many images were used, and metrics."""

    def evaluate(self, weights: Mapping[str, np.ndarray]) -> tuple[float, int, dict[str, Any]]:
        """Return the loss of `weights`, on how many images, and metrics."""


class Client(NumPyClient):
    """Answers the server's requests with what this device has."""

    def __init__(self, cid: str, trainer: Trainer) -> None:
        self.cid = cid
        self.trainer = trainer
        self.data = ""  # what it trains on, in words
        self.telemetry = Telemetry()

    def get_properties(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return what this device is, and what it will train on or why it cannot."""
        properties = {
            "cid": self.cid,
            "model": self.trainer.model,
            "classes": json.dumps(self.trainer.classes),
            "device": self.trainer.device,
            **describe_board(),
        }
        try:
            images, data = self.trainer.prepare(self._settings(config))
        except FederationError as error:
            return {**properties, "problem": str(error)}
        if data != self.data:
            print(f"Client {self.cid}: trains on {data}")
            self.data = data
        return {**properties, "images": images, "data": data}

    def get_parameters(self, config: dict[str, Any]) -> list[np.ndarray]:
        """Return the weights as they are here; a stock Flower server starts from them."""
        return list(self.trainer.get_weights().values())

    def fit(
        self, parameters: list[np.ndarray], config: dict[str, Any]
    ) -> tuple[list[np.ndarray], int, dict[str, Any]]:
        """Train on this device's images, from the global weights on."""
        print(f"Client {self.cid}: fit")
        start = time.perf_counter()
        self.telemetry.start()
        weights, num_examples, metrics = self.trainer.fit(
            self._named(parameters), self._settings(config)
        )
        metrics = {**metrics, **self.telemetry.measure(), "seconds": time.perf_counter() - start}
        return list(weights.values()), num_examples, metrics

    def evaluate(
        self, parameters: list[np.ndarray], config: dict[str, Any]
    ) -> tuple[float, int, dict[str, Any]]:
        """Evaluate the global weights on this device's test images."""
        print(f"Client {self.cid}: evaluate")
        return self.trainer.evaluate(self._named(parameters))

    def _settings(self, config: dict[str, Any]) -> Settings:
        return Settings.from_config(config, default_lr=self.trainer.lr)

    def _named(self, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        names = self.trainer.names
        if len(arrays) != len(names):
            raise FederationError(
                f"the server sent {len(arrays)} arrays, {self.trainer.model} has {len(names)}; "
                "start both sides with the same --model"
            )
        return dict(zip(names, arrays, strict=True))


def write_state(cid: str, state: str) -> None:
    """Show where the client is: on the screen, and in a file for the container's health check."""
    if state.startswith("connected"):
        print(f"Client {cid}: {state}")
    if path := os.environ.get("CLIENT_STATUS_FILE"):
        part = Path(f"{path}.part")
        with contextlib.suppress(OSError):  # a full disk is no reason to stop
            part.write_text(f"{os.getpid()} {state}\n")
            part.replace(path)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def add(name: str, **kwargs: Any) -> None:
        flags = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
        parser.add_argument(*flags, dest=name, **kwargs)

    add("server_address", required=True, metavar="HOST:PORT", help="where server.py runs")
    add("cid", required=True, help="this device's name; 0, 1, … where the data set is partitioned")
    add("model", default="Net", help="a name from utils.MODELS, the server's (default: Net)")
    add(
        "data_dir",
        metavar="DIR",
        help="CIFAR-10, or train/<class>/*; or synthetic (default: data/)",
    )
    add(
        "device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="where to train (default: auto)",
    )
    add("threads", type=int, metavar="N", help="processor threads (default: one a core)")
    add(
        "join",
        metavar="TOKEN",
        help="what server.py --secure prints, once; or a file with it, or - for standard input",
    )
    add(
        "keys",
        metavar="DIR",
        help="where this device's key is (default: $KEYS_DIR or ~/.config/flower-embedded)",
    )
    parser.add_argument(
        "--insecure", action="store_true", help="an open server, although there is a key"
    )
    parser.add_argument(
        "--join_only", "--join-only", action="store_true", help="get a key with --join, and end"
    )
    add(
        "max_wait_seconds",
        type=float,
        metavar="S",
        help="give up after S s without server (default: never)",
    )
    parser.add_argument(
        "--stay", action="store_true", help="when the run is over, wait for the next"
    )
    return parser.parse_args(argv)


def terminate(*_: object) -> NoReturn:
    """End as if by Ctrl-C, but with the exit code that a shell gives to SIGTERM."""
    sys.exit(128 + signal.SIGTERM)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a log shows each line at once
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    signal.signal(signal.SIGTERM, terminate)
    try:
        if parse_address(args.server_address)[1] == 0:
            raise FederationError(f"server address '{args.server_address}' has no port to go to")
        check_cid(args.cid)
        if args.threads is not None and args.threads < 1:
            raise FederationError(f"--threads {args.threads} is below 1")
        if args.max_wait_seconds is not None and not args.max_wait_seconds >= 0:
            raise FederationError(f"--max_wait_seconds {args.max_wait_seconds} is below 0")
        identity = None
        if not args.insecure:
            keys_dir = Path(args.keys or os.environ.get("KEYS_DIR") or default_keys_dir())
            identity = open_identity(keys_dir, args.cid, args.join)
        elif args.join:
            raise FederationError("--join is for a server with --secure; leave out --insecure")
        write_state(args.cid, "starting")
        if args.join_only:
            if not identity:
                raise FederationError("--join_only without --join, and there is no key yet")
            enrol(args.server_address, identity, args.max_wait_seconds)
            return
        # Here, because another Trainer does without PyTorch, and wrong flags end at once.
        import torch

        from torch_trainer import TorchTrainer, choose_device

        if args.threads:
            torch.set_num_threads(args.threads)
        trainer = TorchTrainer(
            args.cid,
            args.model,
            args.data_dir or os.environ.get("DATA_DIR") or ROOT / "data",
            choose_device(args.device),
            download=args.data_dir is None,
        )
        print(f"Client {args.cid}: {trainer.describe()}")
        serve(
            args.server_address,
            Client(args.cid, trainer),
            on_state=partial(write_state, args.cid),
            max_wait_seconds=args.max_wait_seconds,
            stay=args.stay,
            identity=identity,
        )
        print(f"Client {args.cid}: the server is done, shutting down")
    except FederationError as error:
        sys.exit(f"client.py: {error}")
    except KeyboardInterrupt:
        print(f"Client {args.cid}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
