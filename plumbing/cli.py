"""What the command lines share: how a process starts and ends, and its flags.

if __name__ == "__main__":
    cli.start("server.py")  # before anything imports torch, gRPC or Flower
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import datetime
import difflib
import gc
import importlib.util
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from federated.errors import FederationError

SECRETS = re.compile(r"(join1_|/\?key=)[A-Za-z0-9_-]+")  # join tokens, the page's key
NEEDED = ("numpy", "grpc", "google.protobuf", "torch")

ENVIRONMENT = {
    # Flower reads these when it is imported; with them it reports nothing to its makers.
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    # gRPC reads this when it is imported. It has no switch for TLS 1.3 alone
    # (https://github.com/grpc/grpc/issues/37305); this list names one cipher for TLS 1.2, which
    # needs an RSA key, and all of ours are ECDSA.
    "GRPC_SSL_CIPHER_SUITES": "ECDHE-RSA-AES256-GCM-SHA384",
}


def start(program: str, needed: Sequence[str] = NEEDED) -> None:
    """Set what must be set once in a process, in its main program, before the large imports.

    Args:
        needed: packages without which it ends with one line.

    Until `ready` is called, Ctrl-C ends the process without a traceback.
    """
    assert "grpc" not in sys.modules, "gRPC has read its environment already"
    os.environ.update(ENVIRONMENT)
    # Else it logs connections that come and go, and at ERROR each one that finds no descriptor.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.suppress(AttributeError, ValueError):  # not a file: a test's
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    for name in needed:
        if not _is_installed(name):
            sys.exit(
                f"{program}: {sys.executable} has no package '{name.partition('.')[0]}'; use "
                ".venv/bin/python, which ./run_local.sh sets up, or install requirements.txt"
            )
    _spare_the_imports()


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def _spare_the_imports() -> None:
    """Let the garbage collector look at what the imports make once, and never again.

    These are 300,000 objects, and to look at them in each collection takes a fifth of a short
    run's processor time. There is none at the end either, when all memory is freed anyway.
    """
    usual = gc.get_threshold()

    def freeze(phase: str, info: dict[str, Any]) -> None:
        if phase == "stop":
            gc.callbacks.remove(freeze)
            gc.set_threshold(*usual)
            gc.freeze()

    gc.callbacks.append(freeze)
    gc.set_threshold(300_000, *usual[1:])
    atexit.register(gc.freeze)


@contextlib.contextmanager
def ready(program: str) -> Iterator[None]:
    """Run a main program: errors become one line on stderr and an exit code.

    Ctrl-C and SIGTERM raise in it, so that everything is cleaned up; the exit codes are those
    that a shell gives.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        yield
    except FederationError as error:
        sys.exit(f"{program}: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output has ended: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _terminate(*_: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


class _Logged(io.TextIOBase):
    """A stream whose lines also go into a file, with the time and without tokens."""

    def __init__(self, stream: TextIO, log: TextIO) -> None:
        self.stream = stream
        self.log = log
        self.line = ""

    def write(self, text: str) -> int:
        self.stream.write(text)
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            with contextlib.suppress(OSError, ValueError):  # a full disk stops no run
                self.log.write(f"{now} " + SECRETS.sub(r"\1…", line) + "\n")
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()

    def isatty(self) -> bool:
        return self.stream.isatty()


def log_to(path: str) -> None:
    """From now on, append all that this process prints to a file as well.

    Raises:
        FederationError: the file cannot be opened.
    """
    try:
        log = Path(path).expanduser().open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise FederationError(f"cannot write --log_file '{path}' ({error.strerror})") from None
    sys.stdout, sys.stderr = _Logged(sys.stdout, log), _Logged(sys.stderr, log)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stdout)


def end_at_next_signal() -> None:
    """While a program cleans up, a second Ctrl-C ends it at once."""
    if signal.getsignal(signal.SIGTERM) is not _terminate:
        return  # not `ready`: the process is Flower's
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os._exit(128 + number))


# --- Flags ----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Takes --a_flag and --a-flag alike, and helps with misspelt ones.

    Args:
        others: flags of other programs, each with its program's name.
    """

    def __init__(self, others: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)
        self.others = others or {}

    def flag(self, name: str, help: str, default: Any = None, **kwargs: Any) -> None:
        """Add --name; the help shows the default."""
        flags = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
        if "action" not in kwargs:
            kwargs.setdefault("type", str if default is None else type(default))
        shown = "" if default is False or default in (None, "") else f" (default: {default})"
        self.add_argument(*flags, dest=name, default=default, help=help + shown, **kwargs)

    def switch(self, name: str, help: str) -> None:
        """Add --name, which takes no value."""
        self.flag(name, help, default=False, action="store_true")

    def add_settings(self, settings: type) -> None:
        """Add a flag for each field of a dataclass that federated.settings.setting declares."""
        for declared in dataclasses.fields(settings):
            unit, text = declared.metadata["unit"], declared.metadata["help"]
            self.flag(declared.name, text, declared.default, metavar=unit)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown))
        return found

    def error(self, message: str) -> NoReturn:
        """End with one line; argparse's own has the whole usage before it."""
        self.exit(2, f"{self.prog}: {message}\n")

    def _unknown(self, unknown: Sequence[str]) -> str:
        """Return what to do about arguments that this program does not have."""
        flag = unknown[0].partition("=")[0]
        name = flag.lstrip("-").replace("-", "_")
        if not flag.startswith("-"):
            return f"'{flag}' belongs to no flag; quote values that have spaces"
        if name in self.others:
            return f"{flag} is a flag of {self.others[name]}"
        known = [f for action in self._actions for f in action.option_strings if "-" not in f[2:]]
        near = difflib.get_close_matches(f"--{name}", known, n=1, cutoff=0.7)
        return f"there is no flag {flag}" + (f"; {near[0]}?" if near else "; --help lists them")


def check_threads(value: str) -> None:
    """Raise FederationError for a value of --threads that cannot work."""
    if value != "auto" and not value.lstrip("-").isdecimal():
        raise FederationError(f"--threads {value} is neither a number nor auto")
    if value != "auto" and int(value) < 1:
        raise FederationError(f"--threads {value} is below 1")


def given(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> set[str]:
    """Return the names of the flags that the user gave."""
    unset = object()
    blank = argparse.Namespace(**{action.dest: unset for action in parser._actions})
    found, _ = parser.parse_known_args(argv, blank)
    return {name for name, value in vars(found).items() if value is not unset}
