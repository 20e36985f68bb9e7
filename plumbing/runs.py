"""What a run leaves on the disk: settings, metrics, events, checkpoints, the model.

docs/runs.md describes each file. Files are replaced as a whole or not at all.
"""

import contextlib
import datetime
import fcntl
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from federated.errors import FederationError
from federated.rounds import (
    Clipped,
    Dropped,
    Joined,
    Left,
    Notice,
    Observed,
    Resumed,
    Retry,
    Started,
    Step,
)
from plumbing import descriptors
from plumbing.checkpoints import (
    BEST,
    LAST,
    MEMORY,
    PREVIOUS,
    STATE,
    encode_weights,
    finished_round,
    read_checkpoint,
)
from plumbing.files import write_whole

NO_JSON = (ValueError, RecursionError)  # what json.loads raises for bytes from anywhere
ROOT = Path(__file__).resolve().parent.parent
MAX_NUMBER = 1e15  # no time, loss or count that a plot must take is larger
MAX_TEXT = 300  # characters of an event's text or of a device's name
MAX_EVENTS_BYTES = 64 << 20  # a device that reconnects without end must not fill the disk
OWN_FILES = ("lock", "config.json", "metrics.jsonl", "events.jsonl", LAST, PREVIOUS, BEST)


class RunDirectory:
    """The directory of one run, locked until this process ends or `close` is called.

    Args:
        path: made if it does not exist.
        config: written to config.json; checkpoints repeat its "model" and "classes".
        resumed_round: the round of the checkpoint that the run resumes from. Lines of
            metrics.jsonl on later rounds, which the checkpoint does not hold, are removed.
        take_free_name: if `path` exists, take `path`-2, -3, … instead.

    Raises:
        FederationError: it cannot be written, is locked by another server, or holds a run.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        resumed_round: int | None = None,
        take_free_name: bool = False,
    ) -> None:
        self.path = path
        self.config = config
        self.saved_round = resumed_round or 0  # that of the checkpoint
        self._made = False  # by this object, for a new run
        self._lock: BinaryIO | None = None
        self._unwritten = ""  # metrics that could not be written yet
        self._unsaved: tuple[int, dict[str, np.ndarray], dict[str, str]] | None = (
            None  # the same for a checkpoint
        )
        self._events_lock = threading.Lock()
        self._events_stopped = False  # the problem was reported
        try:
            if take_free_name:
                self.path, self._made = _make_free(path), True
            else:
                self._made = not path.exists()
                path.mkdir(parents=True, exist_ok=True)
            self._acquire_lock()
            if resumed_round is None:
                self._check_unused()
            else:
                self._cut_back(resumed_round)
            self._write_config()
        except OSError as error:
            self.abandon()
            raise FederationError(
                f"cannot write run directory '{path}' ({error.strerror}); choose another --run_dir"
            ) from error
        except BaseException:  # Ctrl-C too
            self.abandon()
            raise

    def __str__(self) -> str:
        return _short(self.path)

    # --- Begin and end ---

    def _acquire_lock(self) -> None:
        """Lock the directory; the system ends the lock with this process."""
        lock = (self.path / "lock").open("a+b", buffering=0)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            held_by = re.sub(rb"\D", b"", lock.read(20)).decode()
            lock.close()
            self._made = False
            raise FederationError(
                f"run directory '{self}' is locked by its server (process {held_by or 'unknown'}); "
                "stop that one first, or choose another --run_dir"
            ) from None
        except OSError as error:  # a network file system without locks
            print(
                f"cannot lock '{self}' ({error.strerror}); start no second server on it",
                file=sys.stderr,
            )
        self._lock = lock
        with contextlib.suppress(OSError):  # on a full disk the lock works without the number
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n".encode())

    def _check_unused(self) -> None:
        if (self.path / "metrics.jsonl").exists():
            raise FederationError(
                f"run directory '{self.path}' holds a run already; choose another --run_dir, "
                "or continue that run with --resume"
            )

    def _cut_back(self, resumed_round: int) -> None:
        """Bring the files back to the round that the run resumes from."""
        found = read_checkpoint(self.path)
        if found.server_round != resumed_round:
            raise FederationError(
                f"run directory '{self}' went on from round {resumed_round} to round "
                f"{found.server_round} while this server started; start it again"
            )
        if found.file.name == PREVIOUS:
            # The damaged one must not become the previous one when the next is written.
            found.file.replace(self.path / LAST)
        kept = [line for line, row in self._rows() if row["server_round"] <= resumed_round]
        write_whole(self.path / "metrics.jsonl", b"".join(line + b"\n" for line in kept))

    def _write_config(self) -> None:
        write_whole(self.path / "config.json", json.dumps(self.config, indent=2).encode() + b"\n")

    def abandon(self) -> bool:
        """Release the lock; remove the directory if this run made it and finished no round.

        Files of the user's are never removed, nor a directory that has some.

        Returns:
            Whether it was removed.
        """
        removed = False
        if self._made and not self.saved_round and not self._unsaved:
            with contextlib.suppress(OSError):
                names = {path.name for path in self.path.iterdir()}
                if names <= set(OWN_FILES):
                    for name in names:
                        (self.path / name).unlink()
                    self.path.rmdir()
                    removed = True
        self.close()
        return removed

    def close(self) -> None:
        """Release the lock."""
        if self._lock:
            self._lock.close()
            self._lock = None

    # --- Each round ---

    def save(
        self,
        server_round: int,
        weights: Mapping[str, np.ndarray],
        state: Mapping[str, np.ndarray] | None = None,
        metrics: Mapping[str, Any] | None = None,
        memory: Mapping[str, Any] | None = None,
    ) -> None:
        """Append a line to metrics.jsonl and replace the checkpoint.

        If that fails, on a full disk for example, a line on stderr reports it, the last
        checkpoint stays as it is, and the next call writes this round's metrics too.

        Args:
            state: the strategy's own arrays by name.
            metrics: the line; a UTC time stamp is added.
            memory: what else a resumed run needs, such as the strategy's own numbers.
        """
        if metrics:
            row = {"server_round": server_round, "time": utc_now(), **metrics}
            self._unwritten += json.dumps(_without_nan(row)) + "\n"
        named = {**weights, **{STATE + name: array for name, array in (state or {}).items()}}
        notes = {**self._notes(server_round), MEMORY: json.dumps(memory or {})}
        self._unsaved = server_round, named, notes
        try:
            self._write_unsaved()
        except OSError as error:
            print(
                f"round {server_round}: cannot write to '{self}' ({error.strerror}); "
                "training continues",
                file=sys.stderr,
            )

    def _write_unsaved(self) -> None:
        if self._unsaved is None:
            return
        server_round, named, notes = self._unsaved
        if not self.path.is_dir():
            self.path.mkdir(parents=True)
            self.close()
            self._acquire_lock()
            self._write_config()
            print(
                f"round {server_round}: run directory '{self}' was removed with all files in it; "
                "made it again",
                file=sys.stderr,
            )
        if self._unwritten:
            metrics = self._unwritten.encode()
            descriptors.reserve.call(lambda: append(self.path / "metrics.jsonl", metrics))
            self._unwritten = ""
        data = encode_weights(named, notes)
        write_whole(self.path / LAST, data, keep_as=self.path / PREVIOUS)
        self._unsaved, self.saved_round = None, server_round

    def keep_best(self) -> None:
        """Keep the last checkpoint apart if its round is the best one of the validation so far.

        A failure is reported on stderr, and never raised.
        """
        try:
            rows = {r["server_round"]: r.get("validation_accuracy") for r in self.rounds()}
            scores = {r: score for r, score in rows.items() if isinstance(score, int | float)}
            if scores and max(scores, key=lambda r: (scores[r], -r)) == self.saved_round:
                write_whole(self.path / BEST, (self.path / LAST).read_bytes())
        except (OSError, FederationError) as error:
            print(f"cannot write '{self}/{BEST}' ({error}); training continues", file=sys.stderr)

    def _notes(self, server_round: int) -> dict[str, str]:
        return {
            "server_round": str(server_round),
            "model": str(self.config["model"]),
            "classes": json.dumps(self.config["classes"]),
        }

    def rounds(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl; a line on stderr reports those that are no rounds.

        Raises:
            FederationError: the file cannot be read.
        """
        try:
            return [row for _, row in self._rows()]
        except OSError as error:
            raise FederationError(
                f"cannot read '{self}/metrics.jsonl' ({error.strerror})"
            ) from error

    def start_accuracy(self) -> float | None:
        """Return the test accuracy before round 1, of events.jsonl; None if it is not there."""
        with contextlib.suppress(OSError), (self.path / "events.jsonl").open("rb") as file:
            for line in file:
                with contextlib.suppress(*NO_JSON, KeyError, TypeError):
                    event = json.loads(line)
                    if event["event"] == "started" and _is_number(event["accuracy"]):
                        return float(event["accuracy"])
        return None

    def _rows(self) -> list[tuple[bytes, dict[str, Any]]]:
        """Return each line of metrics.jsonl with what it holds."""
        try:
            lines = (self.path / "metrics.jsonl").read_bytes().splitlines()
        except FileNotFoundError:
            return []
        rows, objections = [], []
        for i, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                objection = objection_to_round(row)
            except NO_JSON:
                objection = "it is not JSON"
            if objection:
                objections.append(f"line {i}: {objection}")
            else:
                rows.append((line, row))
        if objections:
            more = f" and {len(objections) - 1} more" if len(objections) > 1 else ""
            print(
                f"'{self}/metrics.jsonl' {objections[0]}{more}; left out as no record of a round",
                file=sys.stderr,
            )
        return rows

    def observe(self, event: Observed | Step) -> None:
        """An observer: joins, losses, drops and retries become lines of events.jsonl."""
        if record := event_record(event):
            self.log_event(record.pop("event"), **record)

    def log_event(self, kind: str, /, **fields: Any) -> None:
        """Append a line with a UTC time stamp to events.jsonl; may be called from any thread.

        A failure is reported once on stderr, and never raised.
        """
        record = {**bounded_record(fields), "time": utc_now(), "event": kind}
        path = self.path / "events.jsonl"
        with self._events_lock:
            try:
                if path.exists() and path.stat().st_size > MAX_EVENTS_BYTES:
                    raise OSError(0, f"it has reached {MAX_EVENTS_BYTES >> 20} MiB")
                line = json.dumps(record).encode() + b"\n"
                descriptors.reserve.call(lambda: append(path, line, sync=False))
                self._events_stopped = False
            except OSError as error:
                if not self._events_stopped:
                    print(
                        f"cannot write '{self}/events.jsonl' ({error.strerror}); events are lost",
                        file=sys.stderr,
                    )
                self._events_stopped = True

    # --- The result ---

    def finish(self, weights: Mapping[str, np.ndarray]) -> None:
        """Write model.safetensors, and what earlier calls could not write.

        If that fails, the model goes to a new directory beside this one or, if that fails too,
        to the temporary directory; on a terminal the user can then make room and try again.

        Raises:
            FederationError: not all could be written; it names the place of the model.
        """
        rescued: Path | None = None
        while True:
            server_round = self._unsaved[0] if self._unsaved else self.saved_round
            model = encode_weights(weights, self._notes(server_round))
            try:
                self._write_unsaved()
                write_whole(self.path / "model.safetensors", model)
                if rescued:
                    _remove(rescued)
                return
            except OSError as error:
                rescued = rescued or self._rescue(model)
                place = f"the model is in '{rescued}'" if rescued else "the model is not saved"
                problem = f"cannot write to '{self}' ({error.strerror}); {place}"
            if not _asks_again(problem):
                raise FederationError(problem)

    def _rescue(self, model: bytes) -> Path | None:
        """Write the model to another place; return its path, or None if there is no room."""
        for place in (self.path.absolute().parent, Path(tempfile.gettempdir())):
            try:
                # A new directory: nobody else can have put a file or link there before us.
                directory = Path(tempfile.mkdtemp(prefix=f"{self.path.name}-", dir=place))
            except OSError:
                continue
            try:
                write_whole(directory / "model.safetensors", model)
                return directory / "model.safetensors"
            except OSError:
                _remove(directory / "model.safetensors")
        return None


def _asks_again(problem: str) -> bool:
    """On a terminal, wait for Enter to try again; return whether it came."""
    if not (sys.stdin and sys.stdin.isatty()):
        return False
    print(f"{problem}; make room and press Enter to try again, or Ctrl-C to end", file=sys.stderr)
    return bool(sys.stdin.readline())


def _remove(model: Path) -> None:
    """Remove a model, if it is there, and the directory that was made for it."""
    with contextlib.suppress(OSError):
        model.unlink(missing_ok=True)
        model.parent.rmdir()


def _make_free(path: Path) -> Path:
    """Make a new directory, under the first free of `path`, `path`-2, …; return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number, candidate = 1, path
    while True:
        try:
            candidate.mkdir()
            return candidate
        except FileExistsError:
            number += 1
            candidate = path.with_name(f"{path.name}-{number}")


def _short(path: Path) -> str:
    """Return a path as seen from here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def append(path: Path, data: bytes, sync: bool = True) -> None:
    """Append to a file; if that fails, the file is as before."""
    # Unbuffered: nothing may be left to be written when the file is cut back.
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            if sync:
                os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(
                OSError
            ):  # a disk that fails altogether; the first error is reported
                os.truncate(file.fileno(), size)
            raise


# --- What is in a line of events.jsonl and metrics.jsonl ---


def event_record(event: Observed | Step) -> dict[str, Any] | None:
    """Return what events.jsonl has of an event, without its time; None for other events."""
    match event:
        case Joined(device):
            fields: dict[str, Any] = {**device.properties, "cid": device.cid}
        case Left(device, reason):
            fields = {"cid": device.cid, "reason": reason}
        case Resumed(device, job):
            fields = {"cid": device.cid, "job": job.id}
        case Dropped(server_round, device, reason):
            fields = {"server_round": server_round, "cid": device.cid, "reason": reason}
        case Clipped(server_round, device, num_examples, counted):
            fields = {
                "server_round": server_round,
                "cid": device.cid,
                "num_examples": num_examples,
                "counted_examples": counted,
            }
        case Retry(server_round, attempt, attempts, good, reason):
            fields = {
                "server_round": server_round,
                "attempt": attempt,
                "attempts": attempts,
                "good_replies": good,
                "reason": reason,
            }
        case Notice(text):
            fields = {"text": text}
        case Started(evaluation):
            fields = {name: evaluation[name] for name in ("loss", "accuracy")}
        case _:
            return None
    return {**bounded_record(fields), "event": type(event).__name__.lower()}


def bounded_record(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields as JSON can hold them, of a text from a device the beginning."""
    return _without_nan({name: _bounded(value) for name, value in fields.items()})


def objection_to_round(row: Any) -> str | None:
    """Return why a value from JSON is no round as metrics.jsonl has them, or None.

    Checked is what the report and a resumed run read.
    """
    if not isinstance(row, dict):
        return "it is not an object"
    server_round = row.get("server_round")
    if type(server_round) is not int or not 0 < server_round < 10**9:
        return f"server_round is {_shown(server_round)}"
    for name in ("accuracy", "loss", "seconds"):
        if row.get(name) is not None and not _is_number(row[name]):
            return f"{name} is {_shown(row[name])}"
    devices = row.get("devices", [])
    if not isinstance(devices, list):
        return f"devices is {_shown(devices)}"
    for device in devices:
        if not isinstance(device, dict):
            return f"devices has {_shown(device)}"
        text = device.get("name")
        if not (isinstance(text, str) and text.isprintable() and len(text) <= MAX_TEXT):
            return f"the name of a device is {_shown(text)}"
        if not _is_number(device.get("seconds")):
            return f"the seconds of a device are {_shown(device.get('seconds'))}"
    return None


def _is_number(value: Any) -> bool:
    # NaN and infinities, which JSON proper does not have, are no numbers here.
    return type(value) in (int, float) and -MAX_NUMBER <= value <= MAX_NUMBER


def _shown(value: Any) -> str:
    """Return a short text of a JSON value; of a list or an object only its kind."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return ascii(value)[:60] if isinstance(value, str) else json.dumps(value)[:60]


def _bounded(value: Any) -> Any:
    """Return a value for events.jsonl: of a text that came from a device, the beginning."""
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"


def _without_nan(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_nan(item) for item in value]
    return value


def utc_now() -> str:
    """Return the time in UTC: 2025-03-01T12:00:00.123+00:00."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


# --- Where a run came from, and how it resumes ---


def provenance(root: Path) -> dict[str, Any]:
    """Return what config.json notes of the code in `root`; None for what cannot be found out."""
    commit, changed = _git_state(root)
    try:
        utils_hash = hashlib.sha256((root / "utils.py").read_bytes()).hexdigest()
    except OSError:
        utils_hash = None
    return {"git_commit": commit, "git_changed": changed, "utils_sha256": utils_hash}


def _git_state(root: Path) -> tuple[str | None, bool | None]:
    """Return the commit, and whether files that git tracks differ from it."""
    command = ["git", "--no-optional-locks", "-C", str(root), "status"]
    command += ["--porcelain=v2", "--branch", "--untracked-files=no"]
    # GIT_DIR and the like, set in a hook for example, name another repository.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=environment, timeout=1
        )
    except (OSError, subprocess.SubprocessError):
        return None, None
    commit = re.search(rb"^# branch\.oid ([0-9a-f]{40,64})$", done.stdout, re.MULTILINE)
    if done.returncode or not commit:
        return None, None
    return commit[1].decode(), bool(re.search(rb"^[^#]", done.stdout, re.MULTILINE))


def new_run_name(model: str) -> str:
    """Return what the directory of a new run is called by default."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{model.replace(':', '-')}"


def newest_run(runs: Path) -> Path:
    """Return the directory in `runs` with the newest checkpoint of a finished round.

    What is newer, but has no finished round, is printed.

    Raises:
        FederationError: there is none.
    """
    found = []
    for directory in runs.glob("*/"):
        with contextlib.suppress(OSError):  # removed at this instant
            files = [directory / name for name in (LAST, PREVIOUS)]
            times = [file.stat().st_mtime for file in files if file.exists()]
            # An aborted start may have no checkpoint yet: its settings show that it is a run.
            if times or (directory / "config.json").exists():
                found.append((max(times, default=directory.stat().st_mtime), directory))
    for _, directory in sorted(found, reverse=True):
        if finished_round(directory):
            return directory
        print(f"not resuming '{_short(directory)}': it has no finished round")
    raise FederationError(
        f"no run with a finished round in '{_short(runs)}'; name its directory: --resume DIR"
    )


def load_config(path: Path, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Read the settings in a run's config.json.

    Args:
        defaults: the settings wanted, each with a value of its type; those whose value is
            None are strings, or None.

    Raises:
        FederationError: there is no such file, it is damaged, or a value has another type.
    """
    try:
        config = json.loads((path / "config.json").read_bytes())
    except FileNotFoundError:
        raise FederationError(f"no run to resume in '{path}': it has no config.json") from None
    except (OSError, *NO_JSON) as error:
        raise FederationError(f"cannot read '{path / 'config.json'}' ({error})") from None
    if not isinstance(config, dict):
        raise FederationError(f"'{path / 'config.json'}' is not the settings of a run")
    settings = {name: config[name] for name in defaults if name in config}
    for name, value in settings.items():
        default = defaults[name]
        if type(value) is not type(default) and not (default is None and isinstance(value, str)):
            raise FederationError(
                f"'{path / 'config.json'}' has {name} {value!r}; correct it, or start a new run"
            )
    return settings


def main() -> None:
    """Print what run_local.sh needs of a run, one value a line: `python -m plumbing.runs DIR`."""
    path = Path(sys.argv[1]) if sys.argv[1] else newest_run(ROOT / "runs")
    wanted = {"model": "", "data_dir": "", "min_num_clients": 0, "server_address": ""}
    config = load_config(path, {**wanted, "secure": False, "keys": None})
    if missing := [name for name in wanted if name not in config]:
        raise FederationError(f"'{path / 'config.json'}' lacks {', '.join(missing)}")
    print(path.absolute(), *(config[name] for name in wanted), sep="\n")
    print("yes" if config.get("secure") else "", config.get("keys") or "", sep="\n")


if __name__ == "__main__":
    try:
        main()
    except FederationError as error:
        sys.exit(f"run_local.sh: {error}")
