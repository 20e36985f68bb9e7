"""The commands on a fridge's computer; none of them needs torch."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from client import Client
from federated.errors import FederationError, NotYet
from fridgecam.home import WANTED, Home
from fridgecam.look import home_of, parser_for
from head_trainer import HeadTrainer
from light_trainer import OnnxBackbone
from plumbing import cli
from plumbing.addresses import check_cid, check_destination
from plumbing.files import write_whole
from plumbing.publish import CARD
from plumbing.security.identity import Identity, open_identity
from plumbing.stream.device import Reporter, do_once, plain_words, serve
from plumbing.stream.fetch import PREVIOUS, REFUSED, fetch_model

SWITCH_SECONDS = 0.5  # from one look at the owner's switch to the next
NEWS_SECONDS = 10.0  # from one report of what there is to train on to the next


def install(argv: list[str]) -> None:
    """Join a server, and fetch its model."""
    parser = parser_for("install", install.__doc__ or "")
    parser.flag("server_address", "where server.py runs", required=True, metavar="HOST:PORT")
    parser.flag("cid", "this fridge's name", socket.gethostname())
    parser.flag("join", "what server.py --secure prints, or a file with it, or -", metavar="TOKEN")
    parser.flag("max_wait_seconds", "give up after S s without server", 60.0, metavar="S")
    args = parser.parse_args(argv)
    with cli.ready("fridgecam install"):
        check_destination(args.server_address)
        check_cid(args.cid)
        home = home_of(args)
        home.make()
        identity = open_identity(home.keys, args.cid, args.join)
        fetch = partial(fetch_model, args.server_address, identity, home.model, WANTED)
        do_once(args.server_address, identity, fetch, args.max_wait_seconds)
        home.change(server_address=args.server_address, cid=args.cid)
        card = home.card()
        print(f"model version {card.version}: {len(card.classes)} classes, in {home.folder}")
        if not home.shares:
            print("nothing is shared; ./run_fridgecam.sh share on trains with the others")


def identity_of(home: Home) -> Identity | None:
    return open_identity(home.keys, home.config["cid"], None)


def update(
    home: Home,
    identity: Identity | None,
    accept: Callable[[dict[str, Any], dict[str, Path]], bool] = lambda card, files: True,
) -> bool:
    """Fetch the newest model if it is not here, and accepted; return whether it is new.

    Raises:
        NotYet: the server cannot be reached now.
        FederationError: what it offers cannot be used.
    """
    address = home.config["server_address"]
    try:
        return fetch_model(address, identity, home.model, WANTED, accept) is not None
    except grpc.RpcError as error:
        raise NotYet(f"no server at {address} ({plain_words(error)})") from None


def share(argv: list[str]) -> None:
    """Train with the others, or stop that at once: on, off; without either, show which."""
    parser = parser_for("share", share.__doc__ or "")
    parser.add_argument("what", nargs="?", choices=["on", "off"])
    args = parser.parse_args(argv)
    with cli.ready("fridgecam share"):
        home = home_of(args)
        if args.what:
            home.change(share=args.what == "on")
        print(f"sharing is {'on' if home.shares else 'off'}")


def train(argv: list[str]) -> None:
    """Train when the server asks, until the run is over."""
    parser = parser_for("train", train.__doc__ or "")
    parser.switch("stay", "when the run is over, wait for the next")
    args = parser.parse_args(argv)
    with cli.ready("fridgecam train"):
        home = home_of(args)
        if not home.shares:
            raise FederationError("sharing is off; ./run_fridgecam.sh share on")
        cid, identity = home.config["cid"], identity_of(home)
        trainer, reporter = trainer_for(home), Reporter()
        client = OwnersClient(cid, trainer, home)
        threading.Thread(target=stay_shared, args=[home], daemon=True).start()
        threading.Thread(target=report_news, args=[cid, trainer, reporter], daemon=True).start()
        address = home.config["server_address"]
        serve(
            address,
            client,
            lambda state: print(f"fridge {cid}: {state}"),
            None,
            args.stay,
            identity,
            reporter,
        )


class OwnersClient(Client):
    """Sends nothing that it has trained once its owner has switched sharing off, and no paths."""

    def __init__(self, cid: str, trainer: HeadTrainer, home: Home) -> None:
        super().__init__(cid, trainer)
        self.home = home

    def get_properties(self, config: dict[str, Any]) -> dict[str, Any]:
        properties = super().get_properties(config)
        if "problem" in properties:  # its words name a folder of this fridge
            properties["problem"] = "this fridge has no photographs to train on now"
        return properties

    def fit(self, parameters: list[np.ndarray], config: dict[str, Any]) -> Any:
        reply = super().fit(parameters, config)
        end_unless_shared(self.home)
        return reply


def stay_shared(home: Home) -> None:
    """End this process soon after the owner switches sharing off, whatever it does meanwhile."""
    while True:
        time.sleep(SWITCH_SECONDS)
        end_unless_shared(home)


def report_news(cid: str, trainer: HeadTrainer, reporter: Reporter) -> None:
    """Report the version of the photographs; the server may wait for new ones.

    Which they are is found out before each round anyway. A report may get lost: the next one
    is the same.
    """
    while True:
        time.sleep(NEWS_SECONDS)
        with contextlib.suppress(OSError):
            version = trainer.data_version()
            idle = {"step": 0, "steps": 0, "images_per_second": 0.0}
            reporter({"cid": cid, **idle, "data_version": version})


def end_unless_shared(home: Home) -> None:
    """End this process at once if sharing is off, or if that cannot be read."""
    try:
        shares = home.shares
    except (FederationError, OSError):
        shares = False
    if not shares:
        print("sharing is off: training stops", flush=True)
        os._exit(0)


def trainer_for(home: Home) -> HeadTrainer:
    """Return what trains the head on this fridge's labelled photographs."""
    backbone = OnnxBackbone(home.model / WANTED[0])
    cid = home.config["cid"]
    card = home.card()
    return HeadTrainer(cid, card, backbone, home.photos, home.cache, home.exclude, validates=True)


def model(argv: list[str]) -> None:
    """Show the model that is here; `model previous` goes back to the one before."""
    parser = parser_for("model", model.__doc__ or "")
    parser.add_argument("what", nargs="?", choices=["previous"])
    args = parser.parse_args(argv)
    with cli.ready("fridgecam model"):
        home = home_of(args)
        if args.what:
            go_back(home)
        card = home.card()
        accuracy = "not tested" if card.accuracy is None else f"{100 * card.accuracy:.1f} %"
        print(f"version {card.version}, {len(card.classes)} classes, accuracy {accuracy}")


def go_back(home: Home) -> None:
    """Swap the model with the one before; the newer one is not fetched again."""
    version = home.card().version
    previous = home.model / PREVIOUS
    if not (previous / CARD).exists():
        raise FederationError("there is no model before this one")
    for name in (*WANTED, CARD):
        if (previous / name).exists():
            spare = previous / f"{name}.swap"
            (home.model / name).rename(spare)
            (previous / name).rename(home.model / name)
            spare.rename(previous / name)
    write_whole(home.model / REFUSED, str(version).encode())
