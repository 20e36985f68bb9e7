"""The laptop's side: FedAvg, or another strategy, over the devices that connect.

    python server.py --server_address 0.0.0.0:8080 --rounds 3 --model Net

Waits for the devices (client.py, run_pi.sh, run_jetson.sh), trains round by round, evaluates
on the test set after each, and leaves the model in runs/. For the owner of a server with
--secure: python server.py devices --help
"""

import sys

from plumbing import cli

if __name__ == "__main__":
    cli.start("server.py")
    if sys.argv[1:2] == ["devices"]:  # needs no torch
        from plumbing.security.owner import main as devices

        sys.exit(devices(sys.argv[2:]))

import argparse
import json
import os
import platform
import secrets
import shlex
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import flwr
import torch

import utils
from federated.errors import FederationError
from federated.partitions import parse_partition
from federated.rounds import Observed, Observer, Plan, Step, synchronous
from federated.settings import RunSettings
from federated.strategies import Strategy, make_strategy, state_of_version_1
from federated.updates import Bounds, Weights
from plumbing import descriptors
from plumbing.addresses import listening_addresses, parse_address
from plumbing.checkpoints import load_checkpoint, load_weights
from plumbing.report import Console, draw_report, print_classes, shortened, step_record
from plumbing.runs import RunDirectory, load_config, newest_run, provenance
from plumbing.security.admissions import TOKEN_SECONDS, TOKEN_USES
from plumbing.security.gate import Gate, local_names, public_address
from plumbing.security.keys import default_keys_dir
from plumbing.stream.fleet import StreamFleet

ROOT = Path(__file__).resolve().parent
LAST_CALL_SECONDS = 40  # devices try again every 30 s at least
UPDATE_COPIES = 5  # at most, of a device's update in memory while Flower's strategies aggregate
DEVICE_FLAGS = dict.fromkeys(
    ("cid", "device", "threads", "join", "join_only", "max_wait_seconds", "stay"), "client.py"
)


# --- Flags ----------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> tuple[RunSettings, argparse.Namespace]:
    """Return the run's settings, and what concerns this machine alone."""
    parser = cli.Parser(description=__doc__, others=DEVICE_FLAGS)
    parser.flag("server_address", "where to listen", "0.0.0.0:8080", metavar="HOST:PORT")
    parser.add_settings(RunSettings)
    # Files
    parser.flag(
        "data_dir",
        "CIFAR-10, or test/<class>/*; or synthetic (default: data/)",
        metavar="DIR",
    )
    parser.flag("init_weights", "start from this .safetensors file", metavar="FILE")
    parser.flag("run_dir", "where to leave results (default: runs/<time>-<model>/)", metavar="DIR")
    parser.flag(
        "resume",
        "continue the run in this directory, or the newest in runs/ that has a finished round, "
        "after its last finished round; its settings hold unless flags override them",
        nargs="?",
        const="",
        metavar="DIR",
    )
    # Who may connect
    parser.switch("secure", "TLS, and only devices that you admit; they join with a token")
    parser.switch("insecure", "let in whoever reaches the port, also from the Internet")
    parser.flag("keys", "where keys are (default: ~/.config/flower-embedded)", metavar="DIR")
    parser.flag("names", "further names of this machine, for --secure: a.example,203.0.113.5", "")
    parser.flag(
        "unauthenticated_address",
        "listen here too, with TLS, for stock Flower clients: whoever reaches it can join",
        "",
        metavar="HOST:PORT",
    )
    parser.set_defaults(run_id="")
    args = parser.parse_args(argv)
    if args.resume is not None:
        run_dir = Path(args.resume).expanduser() if args.resume else newest_run(ROOT / "runs")
        defaults = {name: parser.get_default(name) for name in vars(args)}
        parser.set_defaults(**load_config(run_dir, defaults))
        args = parser.parse_args(argv)
        args.run_dir = args.resume = str(run_dir)
    names = {declared.name for declared in fields(RunSettings)}
    settings = RunSettings(**{name: getattr(args, name) for name in names})
    rest = {name: value for name, value in vars(args).items() if name not in names}
    return settings, argparse.Namespace(**rest)


def check_args(settings: RunSettings, args: argparse.Namespace) -> None:
    """Raise FederationError for values that cannot work, before anything slow is done."""
    settings.check()
    parse_partition(settings.partition)
    descriptors.check(settings.min_num_clients)
    if args.secure and args.insecure:
        raise FederationError("--secure and --insecure exclude each other")
    for name in ("keys", "names", "unauthenticated_address"):
        if getattr(args, name) and not args.secure:
            raise FederationError(f"--{name} needs --secure")
    if not (args.secure or args.insecure) and (public := public_address(args.server_address)):
        raise FederationError(
            f"this server could be reached from the Internet, at {public}, and anyone could join; "
            "use --secure to let in only devices that you admit, or --insecure if that is meant"
        )
    listening_addresses(args.server_address)  # a port in use is reported before the data load


# --- Who takes part -------------------------------------------------------------------


def open_gate(args: argparse.Namespace) -> Gate | None:
    """Return what decides who may connect; None where everybody may."""
    if not args.secure:
        return None
    directory = Path(args.keys).expanduser() if args.keys else default_keys_dir()
    more_names = list(filter(None, args.names.split(",")))
    if args.unauthenticated_address:
        more_names.append(parse_address(args.unauthenticated_address)[0])
    return Gate(directory, partial(local_names, args.server_address, more_names))


def objection_to(properties: Mapping[str, Any], model: str, classes: Sequence[str]) -> str | None:
    """Return why a device that reports this of itself must not take part, or None."""
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


def print_who_may_join(fleet: StreamFleet) -> None:
    """Print who is let in, and with what."""
    if not fleet.gate:
        print(f"anyone who reaches {fleet.address} can join; --secure lets in only whom you admit")
        return
    authority, admissions = fleet.gate.authority, fleet.gate.admissions
    admitted = sum(device.revoked is None for device in admissions.all())
    print(f"secured by authority sha256:{authority.hash}")
    print(f"devices admitted so far: {admitted} (python server.py devices lists them)")
    print(
        f"devices join with:  --join={admissions.make_token(authority.hash)}          "
        f"(valid for {TOKEN_SECONDS / 3600:g} hours or {TOKEN_USES} devices)"
    )
    if fleet.stock_address:
        print(
            f"whoever reaches {fleet.stock_address} can join too: stock Flower clients, with "
            f"root_certificates from {admissions.path.with_name('authority.crt')}"
        )


# --- The model and its test -----------------------------------------------------------


class Task:
    """The model that is trained, and the images that test it."""

    def __init__(self, settings: RunSettings, data_dir: str | None) -> None:
        self.data_dir = data_dir or ROOT / "data"
        size = utils.image_size(settings.model)
        self.testset = utils.load_data(self.data_dir, "test", size, download=data_dir is None)
        self.net = utils.build_model(settings.model, len(self.testset.classes), settings.seed)
        self.torch_device = "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def images(self) -> str:
        return f"{len(self.testset):,} {self.testset.source}"

    def evaluate(self, weights: Weights) -> dict[str, Any]:
        """Return loss and accuracy on the test images, overall and by class."""
        utils.set_weights(self.net, weights)
        result = utils.test(self.net, self.testset, self.torch_device)
        classes = self.testset.classes
        return {
            "loss": result.loss,
            "accuracy": result.accuracy,
            "class_loss": dict(zip(classes, result.class_loss, strict=True)),
            "class_accuracy": dict(zip(classes, result.class_accuracy, strict=True)),
            "test_images": f"{len(self.testset)} {self.testset.source}",
        }


@dataclass
class Start:
    """Where a run begins: the weights, and what a resumed run remembers."""

    weights: Weights
    finished_round: int | None = None  # None for a new run


def open_start(
    settings: RunSettings, args: argparse.Namespace, task: Task, strategy: Strategy, bounds: Bounds
) -> Start:
    """Return the first weights: random, from a file, or of the run that is resumed."""
    weights = utils.get_weights(task.net)
    if args.resume is not None:
        finished_round, weights, state, memory = load_checkpoint(
            Path(args.run_dir), weights, settings.model
        )
        if memory is None:  # of an older release
            memory = {"strategy": state_of_version_1(state, list(weights))}
        strategy.load_state(state, memory.get("strategy", {}))
        bounds.restore(memory.get("bounds", {}))
        return Start(weights, finished_round)
    if args.init_weights:
        path = Path(args.init_weights).expanduser()
        return Start(load_weights(path, weights, settings.model))
    return Start(weights)


# --- The story ------------------------------------------------------------------------


def make_plan(settings: RunSettings, run_id: str, start: Start, task: Task) -> Plan:
    """Return what a round needs to know of the settings."""

    def job_id(server_round: int) -> str:
        """Return a name that no round of another run, or with other settings, has."""
        how = repr((settings.strategy, settings.for_round(server_round)))
        return f"{run_id}-{zlib.crc32(how.encode()):08x}-{server_round}"

    return Plan(
        rounds=settings.rounds,
        config=lambda server_round: settings.for_round(server_round).to_config(),
        evaluate=task.evaluate,
        job_id=job_id,
        first_round=(start.finished_round or 0) + 1,
        min_num_clients=settings.min_num_clients,
        min_sample_size=settings.sample_size,
        min_replies=settings.min_replies,
        timeout=settings.round_timeout or None,
        retries=settings.round_retries,
        seed=settings.seed,
    )


def open_run(
    settings: RunSettings, args: argparse.Namespace, task: Task, start: Start, run_id: str
) -> RunDirectory:
    """Return the directory of this run, with its settings written."""
    default = ROOT / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{settings.model}"
    config = {
        **asdict(settings),
        **vars(args),
        "data_dir": str(task.data_dir),
        "run_id": run_id,
        "test_images": f"{len(task.testset)} {task.testset.source}",
        "classes": task.testset.classes,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flwr": flwr.__version__,
        **provenance(ROOT),
    }
    path = Path(args.run_dir).expanduser() if args.run_dir else default
    return RunDirectory(path, config, start.finished_round, take_free_name=not args.run_dir)


def run(settings: RunSettings, args: argparse.Namespace) -> None:
    """The whole run: wait, train round by round, save."""
    check_args(settings, args)
    gate = open_gate(args)
    task = Task(settings, args.data_dir)
    strategy = make_strategy(
        settings.strategy, settings.sample_fraction, settings.sample_size, settings.lr
    )
    bounds = Bounds(settings.max_update_norm, settings.max_weight_ratio)
    start = open_start(settings, args, task, strategy, bounds)
    model_bytes = sum(array.nbytes for array in start.weights.values())
    if not strategy.needs_only_mean:
        size = UPDATE_COPIES * model_bytes / 1e6
        print(f"{settings.strategy} needs all updates at once: about {size:,.1f} MB a device")
    run_id = args.run_id or secrets.token_hex(8)
    directory = open_run(settings, args, task, start, run_id)
    fleet, run_is_over = None, False
    try:
        fleet = StreamFleet(
            args.server_address,
            greeting=settings.for_round(1).to_config(),
            admit=partial(objection_to, model=settings.model, classes=task.testset.classes),
            model_bytes=model_bytes,
            gate=gate,
            stock_address=args.unauthenticated_address,
        )
        print_who_may_join(fleet)
        console = Console(fleet.address, settings.rounds, task.testset.source)
        observers = (console, directory.observe)

        def observe(event: Observed | Step) -> None:
            for observer in observers:
                observer(event)

        evaluation, weights = None, start.weights
        if start.finished_round is None:
            directory.save(0, weights)
        else:
            print(f"resuming {directory} after round {start.finished_round}")
        for step in synchronous(
            fleet, strategy, weights, make_plan(settings, run_id, start, task), bounds, observe
        ):
            weights, evaluation = step.weights, step.evaluation
            observe(step)
            save_round(directory, settings, strategy, bounds, step)
        if evaluation is None:
            evaluation = task.evaluate(weights)
            call_devices_once_more(fleet, directory, settings, observe)
        run_is_over = True
    except BaseException as error:
        print_how_to_resume(directory, "stopped" if isinstance(error, Exception) else "interrupted")
        raise
    finally:
        cli.end_at_next_signal()
        if fleet:
            fleet.close(run_is_over)
    print_results(settings, task, directory, weights, evaluation)


def save_round(
    directory: RunDirectory, settings: RunSettings, strategy: Strategy, bounds: Bounds, step: Step
) -> None:
    """Write what a finished round leaves on the disk."""
    arrays, rest = strategy.state()
    row = {
        "server_round": step.server_round,
        **step.evaluation,
        "lr": settings.for_round(step.server_round).lr,
        **step_record(step),
    }
    memory = {"strategy": rest, "bounds": bounds.state()}
    directory.save(step.server_round, step.weights, arrays, row, memory)


def call_devices_once_more(
    fleet: StreamFleet, directory: RunDirectory, settings: RunSettings, observe: Observer
) -> None:
    """Wait for the devices of a run that is over, which end when they hear of it."""
    print(f"all rounds are done; for more of them: --rounds {settings.rounds + 3}")
    if (directory.path / "model.safetensors").exists():
        return  # the server that wrote it has parted from its devices
    print("waiting for devices, to let them end")
    deadline = time.monotonic() + LAST_CALL_SECONDS
    while len(fleet.devices) < settings.min_num_clients and time.monotonic() < deadline:
        if event := fleet.wait(deadline - time.monotonic()):
            observe(event)


def print_how_to_resume(directory: RunDirectory, what: str) -> None:
    """Print the command that continues a run, unless there is nothing to continue."""
    command = os.environ.get("RESUME_COMMAND", "python server.py --resume")
    hint = (
        "No round was finished: its directory is removed"
        if directory.abandon()
        else f"To continue after round {directory.saved_round}: "
        f"{command} {shlex.quote(str(directory))}"
    )
    # One write, which the fleet's thread cannot print into.
    print(f"server.py: {what}; devices wait. {hint}\n", end="", file=sys.stderr)


def print_results(
    settings: RunSettings,
    task: Task,
    directory: RunDirectory,
    weights: Weights,
    evaluation: Mapping[str, Any],
) -> None:
    """Print and save how good the model is."""
    print_classes(evaluation)
    print(f"\ntest accuracy {100 * evaluation['accuracy']:.1f} % on {task.images}")
    directory.finish(weights)
    title = f"{settings.model}, {settings.strategy}, tested on {task.images}"
    draw_report(directory.path / "report.png", title, directory.rounds())
    print(f"model in {directory}/model.safetensors, curves in {directory}/report.png")


def main(argv: Sequence[str] | None = None) -> None:
    with cli.ready("server.py"):
        descriptors.reserve.hold()
        run(*parse_args(argv))


if __name__ == "__main__":
    main()
