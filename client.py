"""The device's side: train on the images that stay here, send back the weights.

    python client.py --server_address 192.168.1.20:8080 --cid 0 --model Net

Waits for the server, comes back when the connection breaks, ends when the run is over.
"""

import signal

if __name__ == "__main__":
    # Until main() begins, while torch is imported, Ctrl-C ends without a traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import plumbing  # isort: skip # noqa: F401 # first: it sets what gRPC and Flower read

import argparse
import contextlib
import json
import logging
import math
import os
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from flwr.client import NumPyClient

import utils
from federated.errors import FederationError
from federated.settings import Settings
from plumbing.addresses import check_cid, parse_address
from plumbing.board import Telemetry, available_memory, describe_board
from plumbing.security.identity import open_identity
from plumbing.security.keys import default_keys_dir
from plumbing.stream.device import enrol, serve

ROOT = Path(__file__).resolve().parent


class Client(NumPyClient):
    """Answers the server's requests with what this device has."""

    def __init__(
        self, cid: str, model: str, data: utils.ImageSet, data_dir: str | Path, device: str
    ) -> None:
        self.cid = cid
        self.model = model
        self.data = data  # all the images at first, then this device's part of them
        self.testset: utils.ImageSet | None = None  # loaded when a server asks for `evaluate`
        self.cut: tuple[str, int, int] | None = None  # which part: scheme, number of parts, seed
        self.data_dir = data_dir
        self.device = device
        self.net = utils.build_model(model, len(data.classes))
        self.checked_batch_size = 0  # the largest that was found to fit into memory
        self.telemetry = Telemetry()

    def get_properties(self, config: dict[str, Any]) -> dict[str, Any]:
        """Say what this device is, and what it will train on or why it cannot."""
        properties = {
            "cid": self.cid,
            "model": self.model,
            "classes": json.dumps(self.data.classes),
            "source": self.data.source,
            "device": self.device,
            **describe_board(),
        }
        settings = self._settings(config)
        try:
            trainset = self._trainset(settings)
            utils.TrainLoader(trainset, settings.batch_size)
            self._check_memory(trainset, settings.batch_size)
        except utils.TaskError as error:
            return {**properties, "problem": str(error)}
        return {**properties, "images": len(trainset)}

    def get_parameters(self, config: dict[str, Any]) -> list[np.ndarray]:
        """Return the weights as they are here; a stock Flower server starts from them."""
        return utils.get_weights(self.net)

    def fit(
        self, parameters: list[np.ndarray], config: dict[str, Any]
    ) -> tuple[list[np.ndarray], int, dict[str, Any]]:
        """Train on this device's images, from the global weights on."""
        print(f"Client {self.cid}: fit")
        start = time.perf_counter()
        self.telemetry.start()
        settings = self._settings(config)
        with for_the_operator():
            trainset = self._trainset(settings)
            # Another order of images in each round and on each device, the same in a rerun.
            seed = zlib.crc32(f"{settings.seed} {self.cid} {settings.server_round}".encode())
            trainloader = utils.TrainLoader(trainset, settings.batch_size, seed, self.device)
            self._set_weights(parameters)
        torch.manual_seed(seed)  # for models with dropout
        trained = utils.train(
            self.net,
            trainloader,
            epochs=settings.epochs,
            max_seconds=settings.round_seconds or math.inf,
            lr=settings.lr,
            lr_end=settings.lr_end,
            momentum=settings.momentum,
            proximal_mu=settings.proximal_mu,
            device=self.device,
        )
        metrics = {
            "loss": trained.loss,
            "seconds": time.perf_counter() - start,
            "steps": trained.steps,
            "images_per_second": trained.steps * settings.batch_size / trained.seconds,
            **self.telemetry.measure(),
        }
        return utils.get_weights(self.net), trained.num_examples, metrics

    def evaluate(
        self, parameters: list[np.ndarray], config: dict[str, Any]
    ) -> tuple[float, int, dict[str, Any]]:
        """Evaluate the global weights on this device's test images."""
        print(f"Client {self.cid}: evaluate")
        with for_the_operator():
            if self.testset is None:
                self.testset = self._load_testset()
            self._set_weights(parameters)
        testset = self.testset
        result = utils.test(self.net, testset, self.device)
        return result.loss, len(testset), {"accuracy": result.accuracy}

    def _load_testset(self) -> utils.ImageSet:
        try:
            return utils.load_data(self.data_dir, "test", utils.image_size(self.model))
        except utils.TaskError as error:
            print(f"Client {self.cid}: evaluates on its training images ({error})")
            return self.data

    def _settings(self, config: dict[str, Any]) -> Settings:
        return Settings.from_config(config, default_lr=utils.LR)

    def _set_weights(self, weights: list[np.ndarray]) -> None:
        try:
            utils.set_weights(self.net, weights)
        except utils.TaskError as error:
            raise utils.TaskError(
                f"the server's weights do not fit {self.model} ({error}); "
                "start both sides with the same --model"
            ) from None

    def _trainset(self, settings: Settings) -> utils.ImageSet:
        """Return this device's part of the images, and let go of the others."""
        cut = (settings.partition, settings.num_partitions, settings.seed)
        if self.cut != cut:
            if self.cut:  # another server, or the same with other flags
                size = utils.image_size(self.model)
                self.data, self.cut = utils.load_data(self.data_dir, "train", size), None
            self.data, self.cut = self._part(*cut), cut
        return self.data

    def _check_memory(self, trainset: utils.ImageSet, batch_size: int) -> None:
        """Warn of training that will swap.

        Raises:
            utils.TaskError: it takes more than RAM and swap have.
        """
        if batch_size <= self.checked_batch_size:  # a device that reconnects has its memory already
            return
        needed = utils.training_bytes(self.net, trainset, batch_size, self.device)
        ram, swap = available_memory()
        problem = (
            f"training {self.model} in batches of {batch_size} takes about {needed / 1e6:,.0f} MB "
            f"more, and this device has {ram / 1e6:,.0f} MB of RAM and {swap / 1e6:,.0f} MB of "
            "swap free"
        )
        advice = "start the server with a smaller --batch_size or another --model"
        if needed > ram + swap:
            raise utils.TaskError(f"{problem}; {advice}, or add swap here")
        if needed > ram:
            print(
                f"Client {self.cid}: warning: {problem}, so it will swap and be slow; {advice}",
                file=sys.stderr,
            )
        self.checked_batch_size = batch_size

    def _part(self, scheme: str, num_partitions: int, seed: int) -> utils.ImageSet:
        if scheme == "none":
            return self.data
        if self.cid not in map(str, range(num_partitions)):
            raise utils.TaskError(
                f"--cid {self.cid} is none of the server's {num_partitions} partitions "
                f"(0 to {num_partitions - 1}); give each device its own, "
                "or start the server with --partition none"
            )
        labels = self.data.labels.numpy()
        return self.data.subset(
            utils.partition(labels, num_partitions, scheme, seed)[int(self.cid)]
        )


@contextmanager
def for_the_operator() -> Iterator[None]:
    """Turn utils' errors into those that need no traceback."""
    try:
        yield
    except utils.TaskError as error:
        raise FederationError(str(error)) from error


def choose_device(wanted: str) -> str:
    """Return "cpu" or "cuda" for --device.

    A GPU counts once it has multiplied two matrices: a torch that was built for other GPUs
    says that it is available all the same, and fails at the first kernel.
    """
    if wanted == "cpu":
        return "cpu"
    problem = "torch finds no CUDA GPU here"
    if torch.cuda.is_available():
        try:
            ones = torch.ones(64, 64, device="cuda")
            if (ones @ ones == 64).all().item():
                return "cuda"
            problem = "the GPU multiplies wrongly"
        except RuntimeError as error:
            problem = f"the GPU fails at a matrix product ({str(error).splitlines()[0]})"
    if wanted == "cuda":
        raise utils.TaskError(f"--device cuda: {problem}; say auto or cpu")
    # Where nobody expects a GPU nothing need be said; NVIDIA's images set this variable.
    if torch.cuda.is_available() or os.environ.get("NVIDIA_VISIBLE_DEVICES"):
        print(f"{problem}; training on the CPU")
    return "cpu"


def write_state(cid: str, state: str) -> None:
    """Say where the client is: on the screen, and in a file for the container's health check."""
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
        if args.threads is not None:
            if args.threads < 1:
                raise utils.TaskError(f"--threads {args.threads} is below 1")
            torch.set_num_threads(args.threads)
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
        device = choose_device(args.device)
        data_dir = args.data_dir or os.environ.get("DATA_DIR") or ROOT / "data"
        data = utils.load_data(
            data_dir, "train", utils.image_size(args.model), download=args.data_dir is None
        )
        client = Client(args.cid, args.model, data, data_dir, device)
        print(f"Client {args.cid}: {args.model} on {device}, {len(data):,} {data.source}")
        serve(
            args.server_address,
            client,
            on_state=partial(write_state, args.cid),
            max_wait_seconds=args.max_wait_seconds,
            stay=args.stay,
            identity=identity,
        )
        print(f"Client {args.cid}: the server is done, shutting down")
    except (FederationError, utils.TaskError) as error:
        sys.exit(f"client.py: {error}")
    except KeyboardInterrupt:
        print(f"Client {args.cid}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
