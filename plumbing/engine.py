"""Flower's engine on this machine: a simulation, or a SuperLink with SuperNodes.

    ./run_engine.sh --nodes 2 --rounds 3

Starts what the run needs, passes on what the run prints, and ends all of it.
"""

from plumbing import cli

if __name__ == "__main__":
    cli.start("run_engine.sh")

import argparse
import contextlib
import ctypes
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import psutil

from federated.errors import FederationError
from federated.settings import EngineSettings, RunSettings
from plumbing.runs import load_config, new_run_name, newest_run

ROOT = Path(__file__).resolve().parent.parent
OLDEST_FLWR = (1, 42)  # what requirements-engine.txt pins
APP = "flower_app.py: "  # before what the app reports
NO_INTERNET = 3  # exit code of utils.py
START_SECONDS = 90  # for a SuperLink to listen; a loaded Raspberry Pi takes 40
END_SECONDS = 10  # for what was started to end by itself
PR_SET_CHILD_SUBREAPER = 36


# --- Flags ----------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    others = {"cid": "client.py", "server_address": "server.py", "secure": "server.py"}
    parser = cli.Parser(prog="run_engine.sh", description=__doc__, others=others)
    parser.flag("nodes", "nodes that take part", 2, metavar="N")
    parser.switch("superlink", "a SuperLink and SuperNodes, not a simulation")
    parser.flag("port", "where the SuperLink listens; 0 takes a free one", 0, metavar="PORT")
    parser.add_settings(RunSettings)
    parser.add_settings(EngineSettings)
    parser.set_defaults(data_dir="")
    args = parser.parse_args(argv)
    if args.resume:
        run_dir = newest_run(ROOT / "runs") if args.resume == "newest" else Path(args.resume)
        defaults = {declared.name: declared.default for declared in fields(RunSettings)}
        saved = load_config(run_dir.expanduser(), {**defaults, "data_dir": ""})
        parser.set_defaults(**saved, nodes=saved.get("min_num_clients", args.nodes))
        args = parser.parse_args(argv)
        args.resume = str(run_dir.expanduser().absolute())
    given = cli.given(parser, argv)
    if "min_num_clients" not in given and not args.resume:
        args.min_num_clients = args.nodes
    return args


def check_args(args: argparse.Namespace) -> RunSettings:
    """Raise FederationError for what cannot work, before anything is started."""
    settings = RunSettings(**{f.name: getattr(args, f.name) for f in fields(RunSettings)})
    settings.check()
    if args.nodes < settings.min_num_clients:
        raise FederationError(
            f"--nodes {args.nodes} is below --min_num_clients {settings.min_num_clients}; the run "
            "would wait for ever"
        )
    if not 0 <= args.port < 65536:
        raise FederationError(f"--port {args.port} is outside [0, 65535]")
    advice = f"install what is missing: {sys.executable} -m pip install -r requirements-engine.txt"
    try:
        version = importlib.metadata.version("flwr")
    except importlib.metadata.PackageNotFoundError:
        raise FederationError(f"there is no flwr; {advice}") from None
    if tuple(map(int, version.split(".")[:2])) < OLDEST_FLWR:
        wanted = ".".join(map(str, OLDEST_FLWR))
        raise FederationError(f"flwr {version} is older than {wanted}; {advice}")
    if not args.superlink:
        try:
            importlib.metadata.version("ray")
        except importlib.metadata.PackageNotFoundError:
            raise FederationError(f"a simulation needs flwr[simulation]; {advice}") from None
    return settings


def find_data(data_dir: str) -> str:
    """Return where the images are; CIFAR-10 is fetched if no other data is named."""
    if data_dir.startswith("synthetic"):
        return data_dir
    path = Path(data_dir).expanduser().absolute() if data_dir else ROOT / "data"
    if any((path / name).is_dir() for name in ("train", "test", "cifar-10-batches-py")):
        return str(path)
    if data_dir:
        raise FederationError(f"no images in '{path}'; give --data_dir another directory")
    print(f"fetching CIFAR-10 into {path} (170 MB, once)")
    command = [sys.executable, str(ROOT / "utils.py"), "--data_dir", str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    problem = (done.stdout.strip().splitlines() or [""])[-1].removeprefix("utils.py: ")
    if done.returncode == NO_INTERNET:
        print(f"{problem}; using synthetic images")
        return "synthetic"
    if done.returncode:
        raise FederationError(problem)
    return str(path)


# --- Processes ------------------------------------------------------------------------


class Processes:
    """What is started here, and all that it starts in turn.

    Args:
        home: for Flower's own files and the logs.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.bin = Path(sys.executable).parent
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        self.environment = {
            **os.environ,
            **cli.ENVIRONMENT,
            "FLWR_HOME": str(home),
            "PATH": f"{self.bin}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONUNBUFFERED": "1",
            # For a strategy or a model of the user's own: mine:Mine in the working directory.
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path.cwd()), *paths])),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray's 15 starves simulated nodes where the machine has other work.
            "RAY_worker_niceness": "0",
        }
        # Flower detaches its processes: this one inherits those whose parent ends.
        with contextlib.suppress(AttributeError, OSError):  # not Linux
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def start(self, name: str, *command: str, **kwargs: Any) -> subprocess.Popen[str]:
        """Start one of Flower's programs; its output goes to a file by default."""
        with (self.home / f"{name}.log").open("w") as log:
            kwargs = {"stdout": log, **kwargs}
            return subprocess.Popen(
                [str(self.bin / command[0]), *command[1:]],
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.environment,
                text=True,
                start_new_session=True,  # Ctrl-C is for this process, which ends the others
                **kwargs,
            )

    def problem(self, name: str) -> str:
        """Return the last line that a program printed."""
        lines = (self.home / f"{name}.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it printed nothing"

    def end(self) -> None:
        """End all of them, by SIGKILL if they do not end; new ones may have come meanwhile."""
        deadline = time.monotonic() + END_SECONDS
        asked: set[int] = set()
        while running := psutil.Process().children(recursive=True):
            for process in running:
                with contextlib.suppress(psutil.Error):
                    if time.monotonic() > deadline:
                        process.kill()
                    elif process.pid not in asked:
                        process.terminate()
                asked.add(process.pid)
            psutil.wait_procs(running, timeout=0.3)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def check_port(port: int) -> int:
    """Return the port, a free one for 0; raise FederationError if another program has it."""
    if not port:
        return free_port()
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise FederationError(
            f"cannot listen at 127.0.0.1:{port} ({reason}); choose another --port"
        ) from None
    return port


def start_superlink(processes: Processes, port: int, simulation: bool) -> None:
    """Start a SuperLink, and wait until it listens."""
    superlink = processes.start(
        "superlink", "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port),
        "--disable-runtime-dependency-installation", *(["--simulation"] if simulation else []),
    )  # fmt: skip
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and superlink.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return
        time.sleep(0.1)
    raise FederationError(f"the SuperLink does not start ({processes.problem('superlink')})")


def start_supernodes(processes: Processes, nodes: int, port: int) -> None:
    """Start SuperNodes that are named 0, 1, … as the parts of a data set."""
    for node in range(nodes):
        processes.start(
            f"supernode-{node}", "flower-supernode", "--insecure",
            "--superlink", f"127.0.0.1:{port}", "--host", "127.0.0.1", "--port", str(free_port()),
            "--node-config", f"partition-id={node} num-partitions={nodes}",
        )  # fmt: skip


@contextlib.contextmanager
def open_flower_home() -> Iterator[Path]:
    """Return the directory for Flower's files: $FLWR_HOME, or one that is removed at the end."""
    if named := os.environ.get("FLWR_HOME"):
        home = Path(named).expanduser().absolute()
        home.mkdir(parents=True, exist_ok=True)
        yield home
        return
    home = Path(tempfile.mkdtemp(prefix="flower-engine-"))
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


# --- The story ------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Start the engine, run the app on it, end the engine."""
    settings = check_args(args)
    port = check_port(args.port)
    config = {**asdict(settings), **{f.name: getattr(args, f.name) for f in fields(EngineSettings)}}
    config["data_dir"] = find_data(args.data_dir)
    config["override"] = ",".join(asdict(settings))  # the run's own are among them already
    if (Path(config["data_dir"]) / "train").is_dir() and settings.partition == "auto":
        config["partition"] = "iid"  # elsewhere a node's images are its own; here all share them
    run_dir = Path(args.resume or args.run_dir or ROOT / "runs" / new_run_name(settings.model))
    run_dir = run_dir.expanduser().absolute()
    config["run_dir"] = str(run_dir)
    started = time.time()
    with open_flower_home() as home:
        processes = Processes(home)
        try:
            start_superlink(processes, port, simulation=not args.superlink)
            if args.superlink:
                start_supernodes(processes, args.nodes, port)
            connection = '[superlink]\ndefault = "engine"\n\n[superlink.engine]\n'
            connection += f'address = "127.0.0.1:{port}"\ninsecure = true\n'
            (home / "config.toml").write_text(connection)
            values = home / "run.toml"
            # What JSON writes for a string, a number, true and false, TOML reads alike.
            values.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in config.items()))
            command = ["flwr", "run", str(ROOT), "engine", "--stream", "--run-config", str(values)]
            if not args.superlink:
                resources = f"num-supernodes={args.nodes} client-resources-num-cpus=1"
                command += ["--federation-config", resources]
            flwr = processes.start("run", *command, stdout=subprocess.PIPE)
            assert flwr.stdout
            problem = pass_on(flwr.stdout)
        finally:
            processes.end()
    model = run_dir / "model.safetensors"
    if problem or not (model.exists() and model.stat().st_mtime >= started):
        raise FederationError(problem or "the run has not finished; the reason is above")


def pass_on(lines: Iterable[str]) -> str:
    """Print what the run prints; return the line with which the app ended it, if there is one.

    After that line Flower prints where in the code it was raised, which is left out.
    """
    problem = ""
    for line in lines:
        if line.startswith(APP):
            if problem:
                print(problem)
            problem = line.removeprefix(APP).strip()
        elif not problem:
            print(line, end="")
    return problem


def main(argv: Sequence[str] | None = None) -> None:
    with cli.ready("run_engine.sh"):
        run(parse_args(argv))


if __name__ == "__main__":
    main()
