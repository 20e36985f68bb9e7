"""The laptop's side: FedAvg, or another strategy, over the devices that connect.

    python server.py --server_address 0.0.0.0:8080 --rounds 3 --model Net

Waits for the devices (client.py, run_pi.sh, run_jetson.sh), trains for so many rounds,
evaluates on the test set after each, and leaves the model in runs/.
"""

import signal

if __name__ == "__main__":
    # Until main() begins, while torch is imported, Ctrl-C ends without a traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import plumbing  # isort: skip # noqa: F401 # first: it sets what gRPC and Flower read

import sys

if __name__ == "__main__" and sys.argv[1:2] == ["devices"]:  # needs no torch
    from plumbing.security.owner import main as devices

    sys.exit(devices(sys.argv[2:]))

import argparse
import inspect
import json
import math
import os
import platform
import secrets
import shlex
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import flwr
import flwr.server.strategy
import numpy as np
import torch
from flwr.common import Code, FitRes, Parameters, Status
from flwr.server.strategy import FedAvg

import utils
from federated.errors import BadReply, FederationError
from federated.settings import Settings
from federated.updates import check_update, clean_metrics
from plumbing.addresses import listening_addresses, parse_address
from plumbing.report import device_line, draw_report
from plumbing.runs import (
    RunDirectory,
    load_checkpoint,
    load_config,
    load_weights,
    newest_run,
)
from plumbing.security.admissions import TOKEN_SECONDS, TOKEN_USES
from plumbing.security.gate import Gate, local_names, public_address
from plumbing.security.keys import default_keys_dir
from plumbing.stream import wire
from plumbing.stream.fleet import LOST, MAX_FAILURES, REVOKED, Device, Fleet

ROOT = Path(__file__).resolve().parent
MOMENTUM = 0.9
UPDATE_COPIES = 5  # at most, of a device's update in memory while Flower's strategies aggregate
LAST_CALL_SECONDS = 40  # devices try again every 30 s at least
MAX_DETAILS = 20  # devices a round with a line of their own; metrics.jsonl has all

# Flower's strategies that take plain weights, with the settings in which ours differ
# from Flower's defaults. Set others on the command line: --strategy FedAdam:eta=0.02
STRATEGIES: dict[str, dict[str, Any]] = {
    "FedAvg": {},
    "FedProx": {"proximal_mu": 0.01},  # Flower has no default
    # Flower's default, no momentum, is FedAvg.
    "FedAvgM": {"server_momentum": 0.5},
    # Flower's eta of 0.1 moves each weight by 0.1 a round, more than most of them weigh.
    # 1e-2 and 1e-3 are near the best of Reddi et al. 2021 (arXiv:2003.00295) for CIFAR-10.
    "FedAdam": {"eta": 0.01, "tau": 1e-3},
    "FedYogi": {"eta": 0.01, "tau": 1e-3},
    "FedAdagrad": {"eta": 0.01, "tau": 1e-3},
    "FedOpt": {},
    "FaultTolerantFedAvg": {},
    "FedMedian": {},
    "FedTrimmedAvg": {},
    "Krum": {},
    "Bulyan": {"to_keep": 0},  # what its first step, Krum, needs and Flower leaves out
    "QFedAvg": {},
}

# These look at each update by itself; the others need no more than the weighted mean.
NEED_ALL_UPDATES = {
    "FaultTolerantFedAvg", "FedMedian", "FedTrimmedAvg", "Krum", "Bulyan", "QFedAvg",
}  # fmt: skip


STATES = ("momentum_vector", "m_t", "v_t")  # what they remember from round to round


class WeightedMean:
    """FedAvg's sum over k of n_k/n * w_k (McMahan et al. 2017, arXiv:1602.05629).

    An update is added when it arrives and need not be kept. The sum is exact: each
    n_k * w_k is rounded to a multiple of 2^-24, and float64 adds such numbers without
    error up to 2^29. So the order of arrival does not change a bit of the result, and the
    rounding moves a mean over 1,000 examples or more by less than 1e-10.
    """

    GRID = 2.0**24
    CHUNK = 1 << 15  # numbers at a time: four passes over what stays in the L2 cache

    def __init__(self, like: Sequence[np.ndarray]) -> None:
        self.like = like
        self.sums = [np.zeros(w.size) for w in like]
        self.num_examples = 0

    def add(self, weights: Sequence[np.ndarray], num_examples: int) -> None:
        """Add one device's weights."""
        self.num_examples += num_examples
        chunk = np.empty(self.CHUNK)
        for sums, array in zip(self.sums, weights, strict=True):
            flat = array.ravel()
            for start in range(0, flat.size, self.CHUNK):
                piece = flat[start : start + self.CHUNK]
                scaled = chunk[: piece.size]
                scaled[:] = piece
                scaled *= num_examples * self.GRID  # in float64; piece * number is float32
                np.rint(scaled, out=scaled)
                sums[start : start + self.CHUNK] += scaled

    def result(self) -> list[np.ndarray]:
        """Return the mean, in the shapes and types of the model."""
        means = []
        for sums, like in zip(self.sums, self.like, strict=True):
            mean = np.empty(like.size, like.dtype)
            if like.dtype.kind in "iu":  # such as BatchNorm's num_batches_tracked
                mean[:] = np.rint(sums / (self.num_examples * self.GRID))
            else:
                np.divide(sums, self.num_examples * self.GRID, out=mean, casting="unsafe")
            means.append(mean.reshape(like.shape))
        return means


def make_strategy(choice: str, **common: Any) -> FedAvg:
    """Return the strategy that `choice` names, such as "FedAvg" or "FedProx:proximal_mu=0.1"."""
    name, _, rest = choice.partition(":")
    if name not in STRATEGIES:
        raise FederationError(f"no strategy '{name}'; there are {', '.join(STRATEGIES)}")
    strategy_class = getattr(flwr.server.strategy, name)
    known = inspect.signature(strategy_class).parameters
    settings = {k: v for k, v in common.items() if k in known} | STRATEGIES[name]
    own = [k for k, p in known.items() if p.annotation in (int, float) and k not in common]
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        try:
            if key not in own:
                raise ValueError
            settings[key] = known[key].annotation(value)
            if not math.isfinite(settings[key]):
                raise ValueError
        except ValueError:
            raise FederationError(
                f"--strategy {choice}: '{item}' is not NAME=NUMBER; {name} has "
                f"{', '.join(own) or 'no settings'}"
            ) from None
    try:
        return strategy_class(**settings)
    except ValueError as error:
        raise FederationError(f"--strategy {choice}: {error}") from None


@dataclass(frozen=True)
class Rules:
    """What must hold for a round to begin, to end and to count."""

    min_num_clients: int = 1  # devices that must be connected
    min_sample_size: int = 1  # of these, devices that train
    min_replies: int = 1  # of these, devices whose updates are good
    timeout: float | None = None  # seconds, then it closes without those that are not done
    retries: int = 0  # how often it is tried again when too few updates are good
    max_update_norm: float = math.inf  # see check_update


def strategy_state(strategy: FedAvg) -> dict[str, np.ndarray]:
    """Return what a strategy remembers from round to round, besides the global weights."""
    kept = {name: getattr(strategy, name, None) or [] for name in STATES}
    return {f"{name}/{i}": a for name, arrays in kept.items() for i, a in enumerate(arrays)}


def restore_strategy(
    strategy: FedAvg, state: Mapping[str, np.ndarray], weights: Sequence[np.ndarray]
) -> None:
    """Give back what `strategy_state` returned.

    Raises:
        FederationError: it is not this strategy's, or not for such weights.
    """
    shapes = {str(i): w.shape for i, w in enumerate(weights)}
    for kept in {key.partition("/")[0] for key in state}:
        arrays = {k.partition("/")[2]: a for k, a in state.items() if k.partition("/")[0] == kept}
        if kept not in STATES or not hasattr(strategy, kept):
            arrays = {}
        if {i: array.shape for i, array in arrays.items()} != shapes:
            raise FederationError(
                "the checkpoint holds the state of another strategy than "
                f"{type(strategy).__name__}; resume it with the --strategy that it had, or start "
                "from its weights with --init_weights"
            )
        setattr(strategy, kept, [arrays[i] for i in shapes])
    if getattr(strategy, "momentum_vector", ()) is None:
        # FedAvgM takes it for granted after round 1, which may have been another strategy's.
        setattr(strategy, "momentum_vector", [np.zeros_like(w) for w in weights])  # noqa: B010


def run_round(
    server_round: int,
    weights: list[np.ndarray],
    names: Sequence[str],
    strategy: FedAvg,
    fleet: Fleet,
    round_id: str = "",
    rules: Rules = Rules(),
) -> tuple[list[np.ndarray] | None, dict[str, Any]]:
    """Send the weights out, train everywhere, bring the results together.

    Args:
        round_id: see wire.ROUND_ID; it must be in the config that the strategy sends.

    Returns:
        The new global weights, or None if the replies do not make any; and what
        happened: the devices with their numbers, and the dropped ones with the reason.
    """
    parameters = Parameters(cast(list[bytes], wire.Packed(weights)), wire.TENSOR_TYPE)
    keep_all = type(strategy).__name__ in NEED_ALL_UPDATES
    mean = WeightedMean(weights)
    results: list[tuple[Any, FitRes]] = []  # Any: our Device is their ClientProxy
    devices: list[dict[str, Any]] = []
    dropped: list[dict[str, str]] = []
    counted: list[Device] = []

    distinct: dict[Any, wire.FitRequest] = {}  # devices with the same settings get the same
    requests: list[tuple[Any, wire.FitRequest]] = []
    for proxy, fit_ins in strategy.configure_fit(server_round, parameters, fleet):
        key = (id(fit_ins.parameters), *sorted(fit_ins.config.items()))
        if key not in distinct:
            distinct[key] = wire.FitRequest(fit_ins.parameters.tensors, fit_ins.config)
        requests.append((proxy, distinct[key]))

    for reply in fleet.exchange(requests, round_id, rules.timeout):
        device = reply.device
        update: list[np.ndarray] = []  # lets the last one go
        try:
            if reply.data is None:
                raise BadReply(reply.problem)
            update, num_examples, metrics = wire.decode_fit_reply(reply.data)
            while reply.pieces:  # each is let go before the next one is copied
                update += wire.decode_parameters_reply(reply.pieces.pop(0))
            check_update(update, num_examples, weights, names, rules.max_update_norm)
        except BadReply as error:
            say(f"round {server_round}: dropped {device.name}: {error}")
            dropped.append({"name": device.name, "reason": str(error)})
            fleet.avoided.add(device.cid)  # should this round be tried again
            device.failures += reply.data is not None
            if device.left_out:
                say(
                    f"round {server_round}: {device.name} is left out after {MAX_FAILURES} bad "
                    "replies in a row, until it joins anew"
                )
            continue
        device.failures = 0
        counted.append(device)
        if keep_all:
            packed = Parameters([wire.pack_array(w) for w in update], wire.TENSOR_TYPE)
            results.append((device, FitRes(Status(Code.OK, ""), packed, num_examples, {})))
        else:
            mean.add(update, num_examples)
        metrics.pop(wire.ROUND_ID, None)
        devices.append(
            {
                "name": device.name,
                "num_examples": num_examples,
                "seconds": round(reply.seconds, 3),
                "bytes_sent": reply.bytes_sent,
                "bytes_received": reply.bytes_received,
                "metrics": clean_metrics(metrics),
            }
        )
        del update, reply  # before the next one comes
    if fleet.gate and (revoked := fleet.gate.revoked(counted)):
        # Its update is in the sum already: what the others sent is asked for again.
        for device in revoked:
            device.revoked = True  # not to be asked again, should it be connected still
            say(f"round {server_round}: dropped {device.name}: {REVOKED}")
            dropped.append({"name": device.name, "reason": REVOKED})
        return None, {"sampled": len(requests), "devices": [], "dropped": dropped}
    devices.sort(key=lambda entry: entry["name"])
    record = {"sampled": len(requests), "devices": devices, "dropped": dropped}
    if len(devices) < rules.min_replies:
        return None, record

    if not keep_all:
        if type(strategy).aggregate_fit is FedAvg.aggregate_fit:
            return mean.result(), record
        # The other strategies start from the weighted mean: show them one device that has it.
        packed = Parameters([wire.pack_array(w) for w in mean.result()], wire.TENSOR_TYPE)
        whole = FitRes(Status(Code.OK, ""), packed, mean.num_examples, {})
        results = [(Device("mean", {}), whole)]
    results.sort(key=lambda result: result[0].cid)  # the order of arrival must not matter
    failures: list[Any] = [BadReply(item["reason"]) for item in dropped]
    try:
        aggregated, _ = strategy.aggregate_fit(server_round, results, failures)
    except (ValueError, TypeError) as error:  # Bulyan's, say, when too few replies are left
        say(f"round {server_round}: {type(strategy).__name__} cannot aggregate: {error}")
        aggregated = None
    if aggregated is None:
        return None, record
    unpacked = [wire.unpack_array(tensor) for tensor in aggregated.tensors]
    new = [n.astype(w.dtype) for n, w in zip(unpacked, weights, strict=True)]
    if hasattr(strategy, "current_weights"):
        strategy.current_weights = new  # FedAdam's are float64, which a checkpoint does not hold
    return new, record


def refusal(properties: Mapping[str, Any], model: str, classes: Sequence[str]) -> str | None:
    """Return why a device that says this of itself must not take part, or None."""
    if properties.get("model") != model:
        return (
            f"it was started with --model {properties.get('model')}, the server with "
            f"--model {model}; start both with the same"
        )
    if properties.get("classes") != json.dumps(list(classes)):
        return (
            f"its classes are {shortened(properties.get('classes'))}, the server's are "
            f"{shortened(json.dumps(list(classes)))}; give both the same class folders"
        )
    problem = properties.get("problem")
    return None if problem is None else str(problem)


def shortened(value: Any) -> str:
    """Return the first 150 characters of `value`: a hundred classes fill a screen."""
    text = str(value)
    return text if len(text) <= 150 else text[:150] + "…"


def describe(device: Device) -> str:
    """Return one line's worth of what a device said of itself."""
    said = device.properties
    if "board" not in said:
        return "a client that says nothing of its board"
    images = said.get("images")
    kind = "synthetic images" if said.get("source") == "synthetic images" else "images"
    return (
        f"{said['board']}, {said.get('machine')}, {said.get('cores')} cores, {said.get('model')}, "
        + (f"{images:,} {kind}" if isinstance(images, int) else "no word of its images")
    )


def print_event(device: Device, event: str) -> None:
    """Tell who joined or left."""
    tell(f"{device.name} {event}" + (f": {describe(device)}" if event == "joined" else ""))


def say(line: str) -> None:
    """Print a line as a whole, since the fleet's thread prints between the round loop's."""
    print(line + "\n", end="")


def tell(line: str) -> None:
    """Print from the fleet's thread; when nobody reads any more (`| head`), end the server."""
    try:
        say(line)
    except BrokenPipeError:
        os.kill(os.getpid(), signal.SIGTERM)


def print_who_may_join(fleet: Fleet) -> None:
    """Say who is let in, and with what."""
    if not fleet.gate:
        say(f"anyone who reaches {fleet.address} can join; --secure lets in only whom you admit")
        return
    authority, admissions = fleet.gate.authority, fleet.gate.admissions
    admitted = sum(device.revoked is None for device in admissions.all())
    say(f"secured by authority sha256:{authority.hash}")
    say(f"devices admitted so far: {admitted} (python server.py devices lists them)")
    say(
        f"devices join with:  --join={admissions.make_token(authority.hash)}          "
        f"(valid for {TOKEN_SECONDS / 3600:g} hours or {TOKEN_USES} devices)"
    )
    if fleet.stock_address:
        say(
            f"whoever reaches {fleet.stock_address} can join too: stock Flower clients, with "
            f"root_certificates from {admissions.path.with_name('authority.crt')}"
        )


def wait_for_devices(fleet: Fleet, rules: Rules) -> None:
    """Wait until there are devices for a round, and say so whenever their number changes.

    `min_num_clients` must be connected, and `min_sample_size` of them must not be busy with a
    round that is over. Devices that are left out are not waited for.
    """
    said = ""
    with fleet.changed:
        while True:
            connected = [device for device in fleet.devices.values() if not device.revoked]
            able = [device for device in connected if not device.left_out]
            busy = sum(device.busy for device in able)
            needed = max(1, min(rules.min_sample_size, len(able)))
            if len(connected) >= rules.min_num_clients and len(able) - busy >= needed:
                return
            shown = f"{len(connected)} connected"
            shown += f", {busy} busy" if busy else ""
            shown += f", {left_out} left out" if (left_out := len(connected) - len(able)) else ""
            count = rules.min_num_clients
            devices = "1 device" if count == 1 else f"{count} devices"
            line = f"waiting for {devices} at {fleet.address} ({shown})"
            if line != said:
                say(line)
            said = line
            fleet.changed.wait()


def finish_round(
    server_round: int,
    weights: list[np.ndarray],
    names: Sequence[str],
    strategy: FedAvg,
    fleet: Fleet,
    round_id: str,
    rules: Rules,
    seed: int,
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Run a round, again if need be, until it has new weights.

    Raises:
        FederationError: it has none after as many retries as the rules allow.
    """
    dropped: list[dict[str, str]] = []
    attempt = 0
    fleet.avoided.clear()
    while attempt <= rules.retries:
        wait_for_devices(fleet, rules)
        fleet.random.seed(f"{seed} {server_round} {attempt}")
        start = time.perf_counter()  # waiting for devices does not count
        new, record = run_round(server_round, weights, names, strategy, fleet, round_id, rules)
        dropped += record["dropped"]
        if new is not None:
            seconds = round(time.perf_counter() - start, 3)
            return new, {**record, "dropped": dropped, "seconds": seconds}
        reasons = {d["reason"] for d in record["dropped"]}
        if not record["devices"] and reasons <= {LOST, REVOKED}:
            continue  # nobody did wrong: wait until they are back
        attempt += 1
        say(
            f"round {server_round}: no new model from {len(record['devices'])} good replies, "
            f"attempt {attempt} of {rules.retries + 1}"
        )
    raise FederationError(
        f"round {server_round} brought no new model in {attempt} attempts; the reasons are above"
    )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def add(name: str, default: Any, help: str, **kwargs: Any) -> None:
        flags = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
        shown = "" if default is None else f" (default: {default})"
        kind = {} if default is None else {"type": type(default)}
        parser.add_argument(
            *flags, dest=name, default=default, help=help + shown, **{**kind, **kwargs}
        )

    add("server_address", "0.0.0.0:8080", "where to listen", metavar="HOST:PORT")
    add("rounds", 3, "how many rounds", metavar="N")
    add("model", "Net", "a name from utils.MODELS, the same on every device", metavar="NAME")
    # Devices
    add("min_num_clients", 2, "wait until so many devices are connected", metavar="N")
    add("min_sample_size", 2, "train on at least so many devices in a round", metavar="N")
    add("sample_fraction", 1.0, "fraction of the connected devices that train", metavar="F")
    add("round_timeout", 0.0, "close a round after S seconds; 0 is never", metavar="S")
    # Local training
    add("epochs", 1, "passes over a device's images in a round", metavar="N")
    add("round_seconds", 0.0, "a device trains for S seconds at most; 0 is no limit", metavar="S")
    add("batch_size", 32, "images in a training step", metavar="N")
    add("lr", utils.LR, "learning rate at the start; falls to 0 over the run", metavar="LR")
    add("seed", 0, "for the first weights, partitions, sampling and shuffling", metavar="N")
    add(
        "strategy",
        "FedAvg",
        f"how updates are brought together: {', '.join(STRATEGIES)}; "
        "settings follow a colon: FedProx:proximal_mu=0.1",
        metavar="NAME",
    )
    # What must hold for a round to count
    add("min_replies", 1, "a round needs so many good replies", metavar="N")
    add("round_retries", 2, "try a round with fewer so many times again", metavar="N")
    add("max_update_norm", 0.0, "drop updates farther from the model; 0 is no limit", metavar="D")
    # Data
    add(
        "partition",
        "iid",
        "how a data set that every device has in full is split: iid, dirichlet:0.5, "
        "or none, when devices have images of their own",
        metavar="HOW",
    )
    add("num_partitions", None, "parts (default: min_num_clients)", type=int, metavar="N")
    add(
        "data_dir",
        None,
        "CIFAR-10, or test/<class>/*; or synthetic (default: data/)",
        metavar="DIR",
    )
    # Who may connect
    for flag, text in (
        ("secure", "TLS, and only devices that you admit; they join with a token"),
        ("insecure", "let in whoever reaches the port, also from the Internet"),
    ):
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    add("keys", None, "where keys are (default: ~/.config/flower-embedded)", metavar="DIR")
    add("names", "", "further names of this machine, for --secure: a.example,203.0.113.5")
    add(
        "unauthenticated_address",
        "",
        "listen here too, with TLS, for stock Flower clients: whoever reaches it can join",
        metavar="HOST:PORT",
    )
    # Files
    add("init_weights", None, "start from this .safetensors file (default: random)", metavar="FILE")
    add("run_dir", None, "where to leave results (default: runs/<time>-<model>/)", metavar="DIR")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="DIR",
        help="go on with the run in this directory, or with the newest in runs/, from its last "
        "finished round; its settings hold unless given anew",
    )
    parser.set_defaults(run_id="")
    args = parser.parse_args(argv)
    if args.resume is not None:
        run_dir = Path(args.resume).expanduser() if args.resume else newest_run(ROOT / "runs")
        defaults = {name: parser.get_default(name) for name in vars(args)}
        # It is not None once a run has begun.
        parser.set_defaults(**load_config(run_dir, {**defaults, "num_partitions": 0}))
        args = parser.parse_args(argv)
        args.run_dir = args.resume = str(run_dir)
    if args.num_partitions is None:
        args.num_partitions = args.min_num_clients
    return args


def check_args(args: argparse.Namespace) -> None:
    """Raise FederationError for values that cannot work, before anything slow is done."""
    for name in (
        "rounds",
        "epochs",
        "batch_size",
        "min_num_clients",
        "min_sample_size",
        "min_replies",
        "num_partitions",
    ):
        if getattr(args, name) < 1:
            raise FederationError(f"--{name} {getattr(args, name)} is below 1")
    for name in ("round_timeout", "round_seconds", "round_retries", "max_update_norm"):
        if not 0 <= getattr(args, name) < math.inf:
            raise FederationError(f"--{name} {getattr(args, name)} is below 0 or no number")
    if 0 < args.round_timeout <= args.round_seconds:
        raise FederationError(
            f"--round_timeout {args.round_timeout:g} leaves no time to reply after "
            f"--round_seconds {args.round_seconds:g}; make it larger"
        )
    if args.min_replies > args.min_sample_size:
        raise FederationError(
            f"--min_replies {args.min_replies} is above --min_sample_size {args.min_sample_size}"
        )
    if args.min_sample_size > args.min_num_clients:
        raise FederationError(
            f"--min_sample_size {args.min_sample_size} is above --min_num_clients "
            f"{args.min_num_clients}; a round cannot sample more devices than it waits for"
        )
    if not 0 <= args.seed < 2**31:
        raise FederationError(f"--seed {args.seed} is below 0 or above 2,147,483,647")
    if not 0 < args.sample_fraction <= 1:
        raise FederationError(f"--sample_fraction {args.sample_fraction} is outside (0, 1]")
    if not (args.lr > 0 and math.isfinite(args.lr)):
        raise FederationError(f"--lr {args.lr} is not above 0")
    utils.parse_partition(args.partition)
    if args.secure and args.insecure:
        raise FederationError("--secure and --insecure exclude each other")
    for name in ("keys", "names", "unauthenticated_address"):
        if getattr(args, name) and not args.secure:
            raise FederationError(f"--{name} is of use with --secure alone")
    if not (args.secure or args.insecure) and (public := public_address(args.server_address)):
        raise FederationError(
            f"this server could be reached from the Internet, at {public}, and anyone could join; "
            "say --secure to let in only devices that you admit, or --insecure if that is meant"
        )


def describe_evaluation(result: utils.Evaluation, testset: utils.ImageSet) -> dict[str, Any]:
    """Return what metrics.jsonl says of an evaluation."""
    return {
        "loss": result.loss,
        "accuracy": result.accuracy,
        "class_loss": dict(zip(testset.classes, result.class_loss, strict=True)),
        "class_accuracy": dict(zip(testset.classes, result.class_accuracy, strict=True)),
        "test_images": f"{len(testset)} {testset.source}",
    }


def print_round(metrics: Mapping[str, Any], rounds: int, where: str) -> None:
    """Print a line on a round, and one on each device."""
    devices = metrics["devices"]
    say(
        f"round {metrics['server_round']}/{rounds}  devices {len(devices)}/{metrics['sampled']}  "
        f"loss {metrics['loss']:.3f}  accuracy {100 * metrics['accuracy']:.1f} %{where}  "
        f"{metrics['seconds']:.1f} s"
    )
    for device in devices[:MAX_DETAILS]:
        say(device_line(device))
    if len(devices) > MAX_DETAILS:
        say(f"  … and {len(devices) - MAX_DETAILS} more in metrics.jsonl")


def print_classes(metrics: Mapping[str, Any]) -> None:
    """Print loss and accuracy for each class."""
    width = max(12, *map(len, metrics["class_loss"]))
    print(f"\n{'class':<{width}}  loss  accuracy")
    for name, loss in metrics["class_loss"].items():
        print(f"{name:<{width}} {loss:5.2f}  {100 * metrics['class_accuracy'][name]:6.1f} %")


def end_at_once(number: int, _: object) -> NoReturn:
    """What a second Ctrl-C does."""
    os._exit(128 + number)


def terminate(*_: object) -> NoReturn:
    """End as if by Ctrl-C, but with the exit code that a shell gives to SIGTERM."""
    raise SystemExit(128 + signal.SIGTERM)


def run(args: argparse.Namespace) -> None:
    """Tell the whole story: wait, train round by round, save."""
    check_args(args)
    listening_addresses(args.server_address)  # a port in use is told before the data load
    gate = None
    if args.secure:
        directory = Path(args.keys).expanduser() if args.keys else default_keys_dir()
        more_names = list(filter(None, args.names.split(",")))
        if args.unauthenticated_address:
            more_names.append(parse_address(args.unauthenticated_address)[0])
        gate = Gate(directory, partial(local_names, args.server_address, more_names), tell)
    data_dir = args.data_dir or ROOT / "data"
    testset = utils.load_data(
        data_dir, "test", utils.image_size(args.model), download=args.data_dir is None
    )
    where = f" ({testset.source})" if testset.source == "synthetic images" else ""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = utils.build_model(args.model, len(testset.classes), args.seed)
    names = list(net.state_dict())
    weights = utils.get_weights(net)
    model = dict(zip(names, weights, strict=True))
    finished_round: int | None = None
    state: dict[str, np.ndarray] = {}
    if args.resume:
        finished_round, weights, state = load_checkpoint(Path(args.run_dir), model, args.model)
    elif args.init_weights:
        weights = load_weights(Path(args.init_weights).expanduser(), model, args.model)
    del model  # it would hold the first weights to the end
    model_bytes = sum(w.nbytes for w in weights)

    def settings(server_round: int) -> Settings:
        """Return a round's settings; over the rounds the learning rate falls to 0."""
        return Settings(
            lr=args.lr * (args.rounds - server_round + 1) / args.rounds,
            lr_end=args.lr * (args.rounds - server_round) / args.rounds,
            server_round=server_round,
            epochs=args.epochs,
            round_seconds=args.round_seconds,
            batch_size=args.batch_size,
            momentum=MOMENTUM,
            partition=args.partition,
            num_partitions=args.num_partitions,
            seed=args.seed,
        )

    run_id = args.run_id or secrets.token_hex(8)

    def round_id(server_round: int) -> str:
        """Return a name that no round of another run, or with other settings, has."""
        how = zlib.crc32(repr((args.strategy, settings(server_round))).encode())
        return f"{run_id}-{how:08x}-{server_round}"

    def evaluate(weights: Sequence[np.ndarray]) -> utils.Evaluation:
        utils.set_weights(net, weights)
        return utils.test(net, testset, device)

    strategy = make_strategy(
        args.strategy,
        fraction_fit=args.sample_fraction,
        fraction_evaluate=0.0,  # the server evaluates, on the whole test set
        min_fit_clients=args.min_sample_size,
        min_evaluate_clients=args.min_sample_size,
        min_available_clients=args.min_num_clients,
        on_fit_config_fn=lambda server_round: {
            **settings(server_round).to_config(),
            wire.ROUND_ID: round_id(server_round),
        },
        evaluate_fn=lambda server_round, weights, config: (evaluate(weights).loss, {}),
        fit_metrics_aggregation_fn=lambda metrics: {},  # without one Flower warns
        initial_parameters=Parameters(cast(list[bytes], wire.Packed(weights)), wire.TENSOR_TYPE),
    )
    if type(strategy) is FedAvg:
        strategy.initial_parameters = None  # it has no use for them
    restore_strategy(strategy, state, weights)
    if type(strategy).__name__ in NEED_ALL_UPDATES:
        size = UPDATE_COPIES * model_bytes / 1e6
        print(f"{args.strategy} needs all updates at once: about {size:,.1f} MB a device")
    rules = Rules(
        min_num_clients=args.min_num_clients,
        min_sample_size=args.min_sample_size,
        min_replies=args.min_replies,
        timeout=args.round_timeout or None,
        retries=args.round_retries,
        max_update_norm=args.max_update_norm or math.inf,
    )

    fleet = Fleet(
        args.server_address,
        greeting=settings(1).to_config(),
        admit=partial(refusal, model=args.model, classes=testset.classes),
        announce=print_event,
        refuse=lambda who, reason: tell(f"refused {who}: {reason}"),
        model_bytes=model_bytes,
        gate=gate,
        stock_address=args.unauthenticated_address,
    )
    print_who_may_join(fleet)
    run_is_over = False
    run_directory = None
    try:
        default_dir = ROOT / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{args.model}"
        config = {
            **vars(args),
            "data_dir": str(data_dir),
            "run_id": run_id,
            "test_images": f"{len(testset)} {testset.source}",
            "classes": testset.classes,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "flwr": flwr.__version__,
        }
        run_directory = RunDirectory(
            Path(args.run_dir).expanduser() if args.run_dir else default_dir, config, finished_round
        )
        named = dict(zip(names, weights, strict=True))
        if finished_round is None:
            finished_round = 0
            run_directory.save(0, named)
        else:
            print(f"going on with {run_directory} after round {finished_round}")
        if finished_round >= args.rounds:  # a server killed after that may not have left a model
            print(f"all rounds are done; for more of them: --rounds {finished_round + 3}")
            result = evaluate(weights)
            if not (run_directory.path / "model.safetensors").exists():
                print("waiting for devices, to tell them so")  # nobody has, for want of time
                fleet.wait_for(args.min_num_clients, LAST_CALL_SECONDS)
        for server_round in range(finished_round + 1, args.rounds + 1):
            weights, record = finish_round(
                server_round,
                weights,
                names,
                strategy,
                fleet,
                round_id(server_round),
                rules,
                args.seed,
            )
            trained = time.perf_counter()
            result = evaluate(weights)
            seconds_evaluate = round(time.perf_counter() - trained, 3)
            metrics = {
                "server_round": server_round,
                **describe_evaluation(result, testset),
                **record,
                "seconds": round(record["seconds"] + seconds_evaluate, 3),
                "seconds_evaluate": seconds_evaluate,
            }
            print_round(metrics, args.rounds, where)
            named = dict(zip(names, weights, strict=True))
            run_directory.save(server_round, named, strategy_state(strategy), metrics)
        run_is_over = True
    except BaseException as error:
        if run_directory:
            what = "stopped" if isinstance(error, Exception) else "interrupted"
            command = os.environ.get("RESUME_COMMAND", "python server.py --resume")
            print(
                f"server.py: {what}; devices wait. To go on after round "
                f"{run_directory.saved_round}: {command} {shlex.quote(str(run_directory))}\n",
                end="",  # one write, which the fleet's thread cannot print into
                file=sys.stderr,
            )
        raise
    finally:
        signal.signal(signal.SIGINT, end_at_once)
        signal.signal(signal.SIGTERM, end_at_once)
        fleet.close(run_is_over)

    print_classes(describe_evaluation(result, testset))
    print(f"\ntest accuracy {100 * result.accuracy:.1f} % on {len(testset):,} {testset.source}")
    run_directory.finish(named)
    title = f"{args.model}, {args.strategy}, tested on {len(testset):,} {testset.source}"
    draw_report(run_directory.path / "report.png", title, run_directory.rounds())
    print(f"model in {run_directory}/model.safetensors, curves in {run_directory}/report.png")


def main(argv: Sequence[str] | None = None) -> None:
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a log shows each line at once
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, terminate)
    try:
        run(parse_args(argv))
    except (FederationError, utils.TaskError) as error:
        sys.exit(f"server.py: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
