"""What a round costs without training, beside stock Flower and with TLS: weights go and come.

    python benchmarks/round_overhead.py
    python benchmarks/round_overhead.py --model ResNet18 --repeats 9

One server and its clients, a process each, over loopback. The clients return the weights
that came, so a round is two transfers per client and an average. The sides take turns:

    ours    federated.rounds.synchronous over a StreamFleet; plumbing.stream.device.serve
    stock   flwr.server.start_server; flwr.client.start_client
    tls     ours with --secure: TLS 1.3, and a key of its own for each client
    page    ours with the page, and a browser's stream open; with --page, instead of the others

All run FedAvg with the same settings. A time is from one round's start to the next one's;
ratios are of neighbours in one turn, so that other load on the machine weighs on all.
"""

import argparse
import contextlib
import logging
import multiprocessing
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from flwr.client import NumPyClient

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere

from federated.settings import Settings
from plumbing.security import keys
from plumbing.security.admissions import Admissions
from plumbing.security.owner import admit

ROUNDS = {"Net": 200, "ResNet18": 12}  # 1 s and more on either side
AIMS = {"Net": 1.0, "ResNet18": 0.5}
TLS_AIM = 1.25  # of our plain side, for ResNet18
PAGE_AIM = 1.05  # of our side without the page
PATIENCE_SECONDS = 300  # for one side's turn

spawn = multiprocessing.get_context("spawn")


class Echo(NumPyClient):
    """Trains in no time: returns the weights that came."""

    def __init__(self, cid: str) -> None:
        self.cid = cid

    def get_properties(self, config: dict[str, Any]) -> dict[str, Any]:
        return {"cid": self.cid}

    def fit(
        self, parameters: list[np.ndarray], config: dict[str, Any]
    ) -> tuple[list[np.ndarray], int, dict[str, Any]]:
        return parameters, 1000, {}


def main() -> None:
    parser = argparse.ArgumentParser(description="time rounds without training, ours and stock")
    parser.add_argument("--model", choices=ROUNDS, help="one of them alone (default: both)")
    parser.add_argument("--rounds", type=int, help=f"timed ones, in a turn (default: {ROUNDS})")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side (default: 5)")
    parser.add_argument("--clients", type=int, default=2, help="default: 2")
    parser.add_argument("--page", action="store_true", help="compare with and without the page")
    parser.add_argument("--short", action="store_true", help="Net, 5 rounds, 1 repeat")
    args = parser.parse_args()
    if args.short:
        args.model, args.rounds, args.repeats = "Net", 5, 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    pairs = [("page", "ours")] if args.page else [("ours", "stock"), ("tls", "ours")]
    names = " and ".join("/".join(pair) for pair in pairs)
    print(f"{args.clients} clients, median ms a round; ratios {names}")
    for model in [args.model] if args.model else list(ROUNDS):
        compare(model, pairs, args.rounds or ROUNDS[model], args.repeats, args.clients)


def compare(
    model: str, pairs: list[tuple[str, str]], rounds: int, repeats: int, clients: int
) -> None:
    """Let the sides take turns, and print what they took."""
    sides = [side for side in SIDES if any(side in pair for pair in pairs)]
    times: dict[str, list[float]] = {side: [] for side in sides}
    ratios: dict[str, list[float]] = {"/".join(pair): [] for pair in pairs}
    for repeat in range(1, repeats + 1):
        order = sides if repeat % 2 else reversed(sides)
        took = {side: 1000 * take_turn(side, model, rounds, clients) for side in order}
        for side in sides:
            times[side].append(took[side])
        for one, other in pairs:
            ratios[f"{one}/{other}"].append(took[one] / took[other])
        print(
            f"{model:8}  turn {repeat}/{repeats}  "
            + "  ".join(f"{side} {took[side]:7.2f}" for side in sides)
            + "".join(f"  {name} {values[-1]:.2f}" for name, values in ratios.items()),
            flush=True,
        )
    medians = "  ".join(f"{side} {statistics.median(times[side]):.2f}" for side in sides)
    print(f"{model:8}  median ms   {medians}")
    tls_aim = TLS_AIM if model == "ResNet18" else None
    aims = {"ours/stock": AIMS[model], "tls/ours": tls_aim, "page/ours": PAGE_AIM}
    for name, values in ratios.items():
        print(
            f"{model:8}  {name:10}  min {min(values):.2f}  median {statistics.median(values):.2f}  "
            f"max {max(values):.2f}" + (f"  (aim: at most {aims[name]})" if aims[name] else "")
        )


def take_turn(side: str, model: str, rounds: int, clients: int) -> float:
    """Return the median seconds of a round, of `rounds` after a few that warm up."""
    warm_up = 2 + rounds // 10
    address = f"127.0.0.1:{free_port()}"
    run_server, run_client = SIDES[side]
    results, sender = spawn.Pipe(duplex=False)
    with contextlib.ExitStack() as stack:
        directory = None
        if side == "tls":
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            authority, admissions = keys.Authority(directory), Admissions(directory)
            list(admit(authority, admissions, list(map(str, range(clients))), directory))
        server = stack.enter_context(
            running(run_server, address, model, warm_up + rounds, clients, sender, directory)
        )
        sender.close()  # the server's copy is the only one, so recv sees its death
        joined = [
            stack.enter_context(running(run_client, address, str(cid), directory))
            for cid in range(clients)
        ]
        try:
            if not results.poll(PATIENCE_SECONDS):
                raise EOFError
            starts = results.recv()
        except EOFError:
            sys.exit(f"round_overhead.py: the {side} server brought no result")
        for process in [server, *joined]:
            process.join(PATIENCE_SECONDS)
    return float(np.median(np.diff(starts)[warm_up:]))


@contextlib.contextmanager
def running(target: Callable[..., None], *args: Any) -> Iterator[Any]:
    """Run `target` in a process of its own, which does not outlive the block."""
    process = spawn.Process(target=target, args=args, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def wait_until_listening(address: str) -> None:
    """Wait, as a stock client would not: it gives up when no server is there."""
    host, port = address.split(":")
    while True:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port))):
            return
        time.sleep(0.05)


# --- The processes --------------------------------------------------------------------


def our_server(
    address: str,
    model: str,
    rounds: int,
    clients: int,
    results: Connection,
    directory: Path | None,
    page: bool = False,
) -> None:
    import utils
    from federated.rounds import Plan, synchronous
    from federated.strategies import make_strategy
    from plumbing.security.gate import Gate
    from plumbing.stream.fleet import StreamFleet

    weights = utils.get_weights(utils.build_model(model))
    fleet = StreamFleet(
        address,
        greeting=settings(0),
        admit=lambda properties: None,
        model_bytes=sum(array.nbytes for array in weights.values()),
        gate=Gate(directory, lambda: ["127.0.0.1"]) if directory else None,
    )
    plan = Plan(
        rounds,
        settings,
        evaluate=lambda weights: {"loss": 0.0},
        min_num_clients=clients,
        min_sample_size=clients,
        min_replies=clients,
    )
    strategy = make_strategy("FedAvg", 1.0, clients, 0.02)
    starts = [time.perf_counter()]
    with contextlib.ExitStack() as stack:
        observe = stack.enter_context(shown_page()) if page else lambda event: None
        for step in synchronous(fleet, strategy, weights, plan, observe=observe):
            assert len(step.contributions) == clients, step.dropped
            observe(step)
            starts.append(time.perf_counter())
    results.send(starts)
    fleet.close(run_is_over=True)


@contextlib.contextmanager
def shown_page() -> Iterator[Callable[[Any], None]]:
    """Serve a page that a browser has open; return the observer that feeds it."""
    from plumbing.page.app import App
    from plumbing.page.server import Page
    from plumbing.page.state import RunState

    state = RunState({"model": "Net", "rounds": 0})
    with tempfile.TemporaryDirectory() as runs:
        page = Page("127.0.0.1:0", App(Path(runs), state))
        try:
            port = page.socket.getsockname()[1]
            browser = subprocess.Popen([sys.executable, "-c", BROWSER, str(port)])
            yield state
            browser.kill()
            browser.wait()
        finally:
            page.close()


# Reads what is new, in a process of its own, as a browser does.
BROWSER = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as browser:
    host = f"127.0.0.1:{sys.argv[1]}"
    browser.sendall(f"GET /api/live HTTP/1.1\\r\\nHost: {host}\\r\\n\\r\\n".encode())
    while browser.recv(1 << 16):
        pass
"""


def our_client(address: str, cid: str, directory: Path | None) -> None:
    from plumbing.security.identity import Identity
    from plumbing.stream.device import serve

    identity = Identity(directory / f"device-{cid}.pem", cid) if directory else None
    wait_until_listening(address)
    serve(address, Echo(cid), on_state=lambda state: None, identity=identity)


def stock_server(
    address: str, model: str, rounds: int, clients: int, results: Connection, _: Path | None
) -> None:
    from flwr.common import ndarrays_to_parameters
    from flwr.server import ServerConfig, start_server
    from flwr.server.strategy import FedAvg

    import utils

    starts = []

    class Stamped(FedAvg):
        def configure_fit(self, *args: Any, **kwargs: Any) -> Any:
            starts.append(time.perf_counter())
            return super().configure_fit(*args, **kwargs)

        def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
            assert len(results) == clients, failures
            return super().aggregate_fit(server_round, results, failures)

    logging.getLogger("flwr").setLevel(logging.ERROR)
    weights = list(utils.get_weights(utils.build_model(model)).values())
    strategy = Stamped(
        fraction_evaluate=0.0,
        min_fit_clients=clients,
        min_available_clients=clients,
        on_fit_config_fn=settings,
        initial_parameters=ndarrays_to_parameters(weights),
    )
    # One round more, whose start is the end of the last one timed.
    start_server(
        server_address=address, config=ServerConfig(num_rounds=rounds + 1), strategy=strategy
    )
    results.send(starts)


def stock_client(address: str, cid: str, _: Path | None) -> None:
    from flwr.client import start_client

    wait_until_listening(address)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    start_client(server_address=address, client=Echo(cid).to_client())


SIDES: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    "ours": (our_server, our_client),
    "stock": (stock_server, stock_client),
    "tls": (our_server, our_client),
    "page": (partial(our_server, page=True), our_client),
}


def settings(server_round: int) -> dict[str, Any]:
    return Settings(lr=0.02, lr_end=0.01, server_round=server_round).to_config()


if __name__ == "__main__":
    main()
