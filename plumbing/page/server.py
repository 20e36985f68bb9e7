"""The page's web server, in a thread of its own: no browser can hold up the fleet.

python server.py page                       # past runs, without training
python server.py page --page 0.0.0.0:8081   # for other machines; they need the printed key
"""

import ipaddress
import socket
import ssl
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from federated.errors import FederationError
from federated.rounds import Fleet, Observer
from plumbing import cli
from plumbing.addresses import join_address, parse_address, reachable_address, resolve
from plumbing.page.app import App
from plumbing.page.door import Door
from plumbing.page.state import MAX_EVENTS, RunState, read_lines, read_rounds, shown_config
from plumbing.runs import ROOT, RunDirectory
from plumbing.security.gate import Gate, local_names

DEFAULT_PORT = 8081
PORTS = 100  # that are tried from there on
LOCAL = ("127.0.0.1", "localhost", "::1")


class Page:
    """Serves an App until `close`.

    Args:
        address: HOST:PORT; "on" and "" take the first free port at 127.0.0.1 from 8081 on.
        gate: where it is served beyond this machine, its authority certifies the page.

    Raises:
        FederationError: it cannot listen there.
    """

    def __init__(self, address: str, app: App, gate: Gate | None = None) -> None:
        address = "" if address == "on" else address
        self.app = app
        self.socket = _listen(address)
        host, port = self.socket.getsockname()[:2]
        loopback = ipaddress.ip_address(host).is_loopback
        tls = gate is not None and not loopback
        names = LOCAL if loopback else local_names(join_address(host, port), _typed(address))
        self.door = Door(app.starlette, names, port, loopback, tls)
        config = uvicorn.Config(
            self.door, log_config=None, log_level="warning", access_log=False, server_header=False,
            lifespan="off", ws="none", limit_concurrency=200, timeout_graceful_shutdown=1,
            proxy_headers=False,
        )  # fmt: skip
        config.load()
        if gate and tls:
            config.ssl = _tls(gate, names)
        scheme = "https" if tls else "http"
        self.address = f"{scheme}://{reachable_address(host, port)}/?key={self.door.key}"
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(
            target=self.server.run, args=([self.socket],), name="page", daemon=True
        )
        self.thread.start()

    def close(self) -> None:
        self.app.closing = self.server.should_exit = True
        self.thread.join(3)


def _listen(address: str) -> socket.socket:
    """Return a socket that listens at HOST:PORT, or at a free port of this machine."""
    if address:
        host, port = resolve(address)[0]
        ports = range(port, port + 1)
    else:
        host, ports = "127.0.0.1", range(DEFAULT_PORT, DEFAULT_PORT + PORTS)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in ports:
        try:
            return socket.create_server((host, port), family=family, backlog=128)
        except OSError as error:
            problem = error
    raise FederationError(
        f"cannot show the page at {join_address(host, port)} ({problem.strerror}); choose another "
        "--page HOST:PORT, or --page off"
    )


def _typed(address: str) -> list[str]:
    """Return the name that the user typed, which browsers may use, too."""
    host = parse_address(address)[0]
    return [] if host in ("0.0.0.0", "::") else [host]


def _tls(gate: Gate, names: Sequence[str]) -> ssl.SSLContext:
    """Return TLS with a certificate of the fleet's authority."""
    key, certificate = gate.authority.sign_server(sorted(names))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with tempfile.NamedTemporaryFile() as file:  # readable by its owner alone; ssl takes no bytes
        file.write(key + certificate + gate.authority.pem)
        file.flush()
        context.load_cert_chain(file.name)
    return context


# --- A run's page, and that of past runs ----------------------------------------------


def is_wanted(flag: str) -> bool:
    """Return whether --page, which may be "" for not given, asks for a page."""
    return flag != "off" and bool(flag or sys.stdout.isatty())


class RunPage:
    """The page of a run, from its first round to its end.

    Args:
        flag: --page: HOST:PORT, "on", "off", or "" for a page if a person watches.
        stay: whether it stays after the run, until Ctrl-C.
        runs: the directory with the runs.
    """

    def __init__(self, flag: str, stay: bool, runs: Path, gate: Gate | None) -> None:
        self.flag = flag
        self.stay = stay
        self.runs = runs
        self.gate = gate
        self.page: Page | None = None
        self.state: RunState | None = None

    def open(self, fleet: Fleet, directory: RunDirectory) -> Sequence[Observer]:
        """Serve the page; return the observer that feeds it, none if no page is wanted."""
        if not is_wanted(self.flag):
            return ()
        self.state = RunState(shown_config(directory.config), directory.path.name, fleet.address)
        events = read_lines(directory.path / "events.jsonl", MAX_EVENTS)
        self.state.replay(read_rounds(directory.path), events)
        self.page = Page(
            self.flag, App(self.runs, self.state, directory.path, self.gate), self.gate
        )
        print(f"page:  {self.page.address}")
        return (self.state,)

    def __enter__(self) -> "RunPage":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self.page or not self.state:
            return
        self.state.finish("stopped" if kind else "finished")
        try:
            if self.stay and not kind:
                print("the page stays until Ctrl-C")
                threading.Event().wait()
        finally:
            self.page.close()
        print("this run's page, and those before it: python server.py page")


def main(argv: Sequence[str]) -> None:
    """Show the runs in runs/ until Ctrl-C."""
    parser = cli.Parser(prog="server.py page", description=__doc__)
    parser.flag("page", "where", "", metavar="HOST:PORT")
    parser.flag("runs", "the directory with the runs (default: runs/)", metavar="DIR")
    args = parser.parse_args(argv)
    with cli.ready("server.py page"):
        runs = Path(args.runs).expanduser() if args.runs else ROOT / "runs"
        page = Page(args.page, App(runs))
        print(f"page:  {page.address}\nshows {len(list(runs.glob('*/')))} runs; Ctrl-C ends it")
        threading.Event().wait()
