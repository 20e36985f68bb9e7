"""The device's side: train on the images that stay here, send back the weights.

    python client.py --server_address 192.168.1.20:8080 --cid 0 --model Net

Waits for the server, comes back when the connection breaks, ends when the run is over.
"""

from __future__ import annotations

from plumbing import cli

if __name__ == "__main__":
    cli.start("client.py")

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Callable, Protocol, SupportsFloat

import numpy as np

from federated.errors import FederationError
from federated.settings import Settings
from federated.updates import fingerprint
from plumbing.addresses import check_cid, check_destination
from plumbing.board import Telemetry, available_memory, describe_board
from plumbing.security.identity import open_identity
from plumbing.security.keys import default_keys_dir
from plumbing.stream.device import Reporter, do_once, enrol, serve

ROOT = Path(__file__).resolve().parent
REPORT_SECONDS = 12.0  # from one report of progress to the next

Report = Callable[[int, int, SupportsFloat, float], None]


class Trainer(Protocol):
    """The model of this device and the images it learns from; torch_trainer.py has PyTorch's."""

    model: str  # the name that the server has to have, too
    names: list[str]  # of the weights, in the order in which they cross the wire
    classes: list[str]
    device: str  # the processor that it trains on
    lr: float  # where a server, such as a stock Flower one, gives none
    source: str  # the SHA-256 of the code that trains; the server compares it with its own

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
        self, weights: Mapping[str, np.ndarray], settings: Settings, report: Report
    ) -> tuple[dict[str, np.ndarray], int, dict[str, Any]]:
        """Train from `weights` on; return the new ones, how many images were used, and metrics.

        Args:
            report: called before each step with the number of steps done and due, the loss of the
                last one, and the images a second so far.
        """

    def evaluate(
        self, weights: Mapping[str, np.ndarray], settings: Settings
    ) -> tuple[float, int, dict[str, Any]]:
        """Return the loss of `weights`, on how many images, and metrics."""


class Client:
    """Answers the server's requests with what this device has.

    Args:
        send_progress: sends a report to the server, and returns at once.
    """

    def __init__(
        self,
        cid: str,
        trainer: Trainer,
        send_progress: Callable[[Mapping[str, Any]], None] = lambda report: None,
    ) -> None:
        self.cid = cid
        self.trainer = trainer
        self.send_progress = send_progress
        self.report_due = 0.0  # when the next one may be sent
        self.data = ""  # what it trains on, in words
        self.telemetry = Telemetry()

    def get_properties(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return what this device is, and what it will train on or why it cannot."""
        properties = {
            "cid": self.cid,
            "model": self.trainer.model,
            "classes": json.dumps(self.trainer.classes),
            "weights": fingerprint(self.trainer.get_weights()),
            "source": self.trainer.source,
            "device": self.trainer.device,
            **describe_board(),
        }
        if version := getattr(self.trainer, "data_version", None):
            properties["data_version"] = version()
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
            self._named(parameters), self._settings(config), self._report
        )
        metrics = {**metrics, **self.telemetry.measure(), "seconds": time.perf_counter() - start}
        return list(weights.values()), num_examples, metrics

    def _report(self, step: int, steps: int, loss: SupportsFloat, images_per_second: float) -> None:
        """Send how far the training is, if it is time for that."""
        if time.monotonic() >= self.report_due:
            self.report_due = time.monotonic() + REPORT_SECONDS
            measured = {**self.telemetry.measure(), "free_ram_mb": available_memory()[0] / 1e6}
            if step:
                measured["loss"] = float(loss)
            progress = {"cid": self.cid, "step": step, "steps": steps}
            rate = {"images_per_second": float(images_per_second)}
            self.send_progress({**measured, **progress, **rate})

    def evaluate(
        self, parameters: list[np.ndarray], config: dict[str, Any]
    ) -> tuple[float, int, dict[str, Any]]:
        """Evaluate the global weights on this device's test images."""
        print(f"Client {self.cid}: evaluate")
        return self.trainer.evaluate(self._named(parameters), self._settings(config))

    def _settings(self, config: dict[str, Any]) -> Settings:
        return Settings.from_config(config, default_lr=self.trainer.lr)

    def _named(self, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        names = self.trainer.names
        if len(arrays) != len(names):
            raise FederationError(
                f"the server sent {len(arrays)} arrays, {self.trainer.model} has {len(names)}; "
                "start both sides with the same --model"
            )
        return dict(zip(names, arrays))


def write_state(cid: str, state: str) -> None:
    """Show where the client is: on the screen, and in a file for the container's health check."""
    if state.startswith("connected"):
        print(f"Client {cid}: {state}")
    if path := os.environ.get("CLIENT_STATUS_FILE"):
        part = Path(f"{path}.part")
        with contextlib.suppress(OSError):  # a full disk is no reason to stop
            part.write_text(f"{os.getpid()} {state}\n")
            part.replace(path)


SERVER_FLAGS = dict.fromkeys(
    ("rounds", "strategy", "epochs", "batch_size", "lr", "seed", "partition", "num_partitions",
     "min_num_clients", "min_sample_size", "sample_fraction", "secure", "resume", "run_dir"),
    "server.py",
)  # fmt: skip


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, others=SERVER_FLAGS)
    parser.flag("server_address", "where server.py runs", metavar="HOST:PORT")
    parser.flag("cid", "this device's name; 0, 1, … where a data set is partitioned")
    parser.flag(
        "model",
        "a name in utils.MODELS, or your own mine:Mine; the server's",
        "Net",
        metavar="NAME",
    )
    parser.flag(
        "data_dir", "CIFAR-10, or train/<class>/*; or synthetic (default: data/)", metavar="DIR"
    )
    parser.flag("device", "where to train", "auto", choices=["auto", "cpu", "cuda"])
    parser.flag("threads", "processor threads; auto is the fastest number", "auto", metavar="N")
    parser.flag(
        "join",
        "what server.py --secure prints, once; or a file with it, or - for standard input",
        metavar="TOKEN",
    )
    parser.flag(
        "keys",
        "where this device's key is (default: $KEYS_DIR or ~/.config/flower-embedded)",
        metavar="DIR",
    )
    parser.switch("insecure", "join a server without --secure, although there is a key")
    parser.switch("join_only", "get a key with --join, and exit")
    parser.flag(
        "max_wait_seconds", "give up after S s without server (default: never)", type=float,
        metavar="S",
    )  # fmt: skip
    parser.switch("stay", "when the run is over, wait for the next")
    parser.switch("self_test", "train a little, without a server, show what works here, and exit")
    args = parser.parse_args(argv)
    missing = [f"--{name}" for name in ("server_address", "cid") if getattr(args, name) is None]
    if missing and not args.self_test:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    return args


def check_args(args: argparse.Namespace) -> None:
    """Raise FederationError for values that cannot work."""
    check_destination(args.server_address)
    check_cid(args.cid)
    cli.check_threads(args.threads)
    if args.max_wait_seconds is not None and not args.max_wait_seconds >= 0:
        raise FederationError(f"--max_wait_seconds {args.max_wait_seconds} is below 0")
    if args.insecure and args.join:
        raise FederationError("--join is for a server with --secure; leave out --insecure")


def run(args: argparse.Namespace) -> None:
    """Open this device's key and data, and serve until the run is over."""
    if args.self_test:
        from torch_trainer import self_test

        self_test(args.model, args.device)
        return
    check_args(args)
    identity = None
    keys_dir = Path(args.keys or os.environ.get("KEYS_DIR") or default_keys_dir()).expanduser()
    if not args.insecure:
        identity = open_identity(keys_dir, args.cid, args.join)
    write_state(args.cid, "starting")
    if args.join_only:
        if not identity:
            raise FederationError("--join_only without --join, and there is no key yet")
        enrol(args.server_address, identity, args.max_wait_seconds)
        return
    # Here, because another Trainer needs no PyTorch, and wrong flags end at once.
    from plumbing.threads import Threads
    from torch_trainer import TorchTrainer, choose_device, has_head

    data_dir = args.data_dir or os.environ.get("DATA_DIR") or ROOT / "data"
    device = choose_device(args.device)
    trainer: Trainer
    if has_head(args.model):
        from torch_heads import fetch_frozen, open_trainer

        fetch = partial(fetch_frozen, args.cid, args.server_address, identity)
        do_once(args.server_address, identity, fetch, args.max_wait_seconds)
        trainer = open_trainer(args.cid, args.model, Path(data_dir), device)
    else:
        trainer = TorchTrainer(
            args.cid,
            args.model,
            data_dir,
            device,
            download=args.data_dir is None,
            threads=Threads(args.threads),
            notes=keys_dir / f"threads-{args.cid}.json",
        )
    print(f"Client {args.cid}: {trainer.describe()}")
    reporter = Reporter()
    serve(
        args.server_address,
        Client(args.cid, trainer, reporter),
        on_state=partial(write_state, args.cid),
        max_wait_seconds=args.max_wait_seconds,
        stay=args.stay,
        identity=identity,
        reporter=reporter,
    )
    print(f"Client {args.cid}: the server is done, shutting down")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with cli.ready("client.py"):
        try:
            run(args)
        except KeyboardInterrupt:
            print(f"Client {args.cid}: interrupted", file=sys.stderr)
            raise


if __name__ == "__main__":
    main()
