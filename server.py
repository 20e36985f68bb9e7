"""The laptop's side: FedAvg, or another strategy, over the devices that connect.

    python server.py --server_address 0.0.0.0:8080 --rounds 3 --model Net

Waits for the devices (client.py, run_pi.sh, run_jetson.sh), trains round by round, evaluates
on the test set after each, and leaves the model in runs/. For the owner of a server with
--secure:

    python server.py devices            # who is admitted; --help: admit, token, revoke, prune

To see past runs in the browser, and to write the model as an ONNX file:

    python server.py page
    python server.py export runs/…
"""

import sys

from plumbing import cli

if __name__ == "__main__":
    cli.start("server.py")
    if sys.argv[1:2] == ["devices"]:  # needs no torch
        from plumbing.security.owner import main as devices

        sys.exit(devices(sys.argv[2:]))
    if sys.argv[1:2] == ["page"]:
        from plumbing.page.server import main as page

        page(sys.argv[2:])
        sys.exit()
    if sys.argv[1:2] == ["export"]:
        from torch_export import main as export

        export(sys.argv[2:])
        sys.exit()

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from federated.errors import FederationError
from federated.rounds import Fleet, Observer
from federated.settings import OPEN_ENDED, RunSettings
from plumbing import descriptors
from plumbing.addresses import listening_addresses, parse_address
from plumbing.flags import server_parser
from plumbing.page.server import RunPage
from plumbing.runs import RunDirectory, load_config, newest_run
from plumbing.security.admissions import TOKEN_SECONDS, TOKEN_USES
from plumbing.security.gate import Gate, local_names, public_address
from plumbing.security.keys import default_keys_dir
from plumbing.stream.fleet import StreamFleet
from plumbing.terminal import LiveBlock
from torch_server import Task, run

ROOT = Path(__file__).resolve().parent
OPEN_ENDED_TIMEOUT = 600.0  # of a round, if none is given: one silent device must not stall it
LAST_CALL_SECONDS = 40  # devices try again every 30 s at least


# --- Flags ----------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> tuple[RunSettings, argparse.Namespace]:
    """Return the run's settings, and what concerns this machine alone."""
    parser = server_parser(__doc__)
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
    if args.open_ended:
        settings = replace(
            settings,
            rounds=OPEN_ENDED,
            lr_schedule="constant",
            round_timeout=settings.round_timeout or OPEN_ENDED_TIMEOUT,
        )
    rest = {name: value for name, value in vars(args).items() if name not in names}
    return settings, argparse.Namespace(**rest)


def check_args(settings: RunSettings, args: argparse.Namespace) -> None:
    """Raise FederationError for values that cannot work, before anything slow is done."""
    settings.check()
    cli.check_threads(args.threads)
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
            f"all that reach {fleet.stock_address} can join too: stock Flower clients, with "
            f"root_certificates from {admissions.path.with_name('authority.crt')}"
        )


# --- The story ------------------------------------------------------------------------


def serve(settings: RunSettings, args: argparse.Namespace) -> None:
    """Run the rounds over the devices that connect."""
    if args.log_file:
        cli.log_to(args.log_file)
    check_args(settings, args)
    gate = open_gate(args)

    def open_fleet(task: Task, model_bytes: int) -> StreamFleet:
        fleet = StreamFleet(
            args.server_address,
            greeting=settings.for_round(1).to_config(),
            admit=task.objection_to,
            model_bytes=model_bytes,
            gate=gate,
            stock_address=args.unauthenticated_address,
        )
        print_who_may_join(fleet)
        return fleet

    def call_devices_once_more(fleet: Fleet, directory: RunDirectory, observe: Observer) -> None:
        """Wait for the devices of a run that is over, so that they learn of it and end."""
        if (directory.path / "model.safetensors").exists():
            return  # the server that wrote it has dismissed its devices
        print("waiting for devices, to let them end")
        deadline = time.monotonic() + LAST_CALL_SECONDS
        while len(fleet.devices) < settings.min_num_clients and time.monotonic() < deadline:
            if event := fleet.wait(deadline - time.monotonic()):
                observe(event)

    command = os.environ.get("RESUME_COMMAND", "python server.py --resume") + " {}"
    page = RunPage(args.page, args.page_stay, ROOT / "runs", gate)
    with page, LiveBlock() as block:

        def open_observers(fleet: Fleet, directory: RunDirectory) -> Sequence[Observer]:
            return [*page.open(fleet, directory), *block.open(fleet, directory)]

        run(
            settings,
            args,
            open_fleet,
            call_devices_once_more,
            open_observers,
            resume_command=command,
        )


def main(argv: Sequence[str] | None = None) -> None:
    with cli.ready("server.py"):
        descriptors.reserve.hold()
        serve(*parse_args(argv))


if __name__ == "__main__":
    main()
