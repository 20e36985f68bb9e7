"""What a run leaves on the disk: settings, metrics, checkpoints, the model.

Files are replaced as a whole or not at all, and hold no pickle.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from federated.errors import FederationError

ROOT = Path(__file__).resolve().parent.parent
STATE = "strategy/"  # before the names of a strategy's own arrays
NO_JSON = (ValueError, RecursionError)  # what json.loads raises for bytes from anywhere


class RunDirectory:
    """The directory of one run.

    Args:
        path: made if it is not there.
        config: written to config.json; checkpoints repeat its "model" and "classes".
        resumed_round: the round of the checkpoint that a run goes on from. What metrics.jsonl
            says of later rounds, which the checkpoint does not hold, is taken out.

    Raises:
        FederationError: it cannot be written, or holds a run already.
    """

    def __init__(
        self, path: Path, config: Mapping[str, Any], resumed_round: int | None = None
    ) -> None:
        self.path = path
        self.config = config
        self.saved_round = resumed_round or 0  # that of the checkpoint
        self._unwritten = ""  # metrics that found no room yet
        self._problem: FederationError | None = None  # why the last round could not be written
        try:
            path.mkdir(parents=True, exist_ok=True)
            if resumed_round is not None:
                kept = [m for m in self.rounds() if m["server_round"] <= resumed_round]
                lines = "".join(json.dumps(metrics) + "\n" for metrics in kept)
                write_whole(path / "metrics.jsonl", lines.encode())
            elif (path / "metrics.jsonl").exists():
                raise FederationError(
                    f"run directory '{path}' holds a run already; choose another --run_dir, "
                    "or go on with --resume"
                )
            self._write_config()
        except OSError as error:
            raise FederationError(
                f"cannot write run directory '{path}' ({error.strerror}); choose another --run_dir"
            ) from error

    def _write_config(self) -> None:
        write_whole(self.path / "config.json", json.dumps(self.config, indent=2).encode() + b"\n")

    def rounds(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl; one that a power cut left half written is not one."""
        try:
            lines = (self.path / "metrics.jsonl").read_bytes().splitlines()
        except FileNotFoundError:
            return []
        rounds = []
        for line in lines:
            with contextlib.suppress(*NO_JSON, TypeError, KeyError, OverflowError):
                metrics = json.loads(line)
                rounds.append({**metrics, "server_round": int(metrics["server_round"])})
        return rounds

    def __str__(self) -> str:
        here = Path.cwd()
        return str(self.path.relative_to(here) if self.path.is_relative_to(here) else self.path)

    def save(
        self,
        server_round: int,
        weights: Mapping[str, np.ndarray],
        state: Mapping[str, np.ndarray] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Append a line to metrics.jsonl and replace the checkpoint.

        Where that fails, for want of room, say, it tells so, the last checkpoint stays as it
        is, and the next call writes this round's metrics too.

        Args:
            state: the strategy's own arrays by name.
        """
        if metrics:
            self._unwritten += json.dumps(_without_nan(metrics)) + "\n"
        named = {**weights, **{STATE + name: array for name, array in (state or {}).items()}}
        try:
            if not self.path.is_dir():
                self.path.mkdir(parents=True)
                self._write_config()
                print(
                    f"round {server_round}: run directory '{self}' is gone with what was in it; "
                    "made it anew",
                    file=sys.stderr,
                )
            self._append_metrics()
            self._write_weights("checkpoint.safetensors", named, server_round)
            self._problem, self.saved_round = None, server_round
        except OSError as error:
            self._problem = FederationError(f"cannot write to '{self}' ({error.strerror})")
            print(f"round {server_round}: {self._problem}; training goes on", file=sys.stderr)

    def finish(self, weights: Mapping[str, np.ndarray]) -> None:
        """Write model.safetensors.

        Raises:
            FederationError: it, or the last round, could not be written.
        """
        if self._problem:
            raise self._problem
        try:
            self._write_weights("model.safetensors", weights, self.saved_round)
        except OSError as error:
            raise FederationError(f"cannot write to '{self}' ({error.strerror})") from error

    def _append_metrics(self) -> None:
        # Unbuffered: nothing may be left to be written when the file is cut back.
        with (self.path / "metrics.jsonl").open("ab", buffering=0) as file:
            size = file.tell()
            try:
                rest = memoryview(self._unwritten.encode())
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                os.truncate(file.fileno(), size)
                raise
        self._unwritten = ""

    def _write_weights(
        self, name: str, weights: Mapping[str, np.ndarray], server_round: int
    ) -> None:
        notes = {
            "server_round": str(server_round),
            "model": str(self.config["model"]),
            "classes": json.dumps(self.config["classes"]),
        }
        data = safetensors.numpy.save(
            {key: np.asarray(value, order="C") for key, value in weights.items()}, notes
        )
        write_whole(self.path / name, data)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a power cut, sees the old one or the new one."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def newest_run(runs: Path) -> Path:
    """Return the directory in `runs` whose checkpoint is the newest.

    Raises:
        FederationError: there is none.
    """
    found = sorted(runs.glob("*/checkpoint.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FederationError(f"no run to resume in '{runs}'; say --resume DIRECTORY")
    return found[-1].parent


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
                f"'{path / 'config.json'}' has {name} {value!r}; mend it, or start a new run"
            )
    return settings


def load_checkpoint(
    path: Path, like: Mapping[str, np.ndarray], model: str
) -> tuple[int, list[np.ndarray], dict[str, np.ndarray]]:
    """Read a run's checkpoint.safetensors.

    Returns:
        The last finished round (0 is none), the weights in the order of `like`, and the
        strategy's own arrays by name.

    Raises:
        FederationError: as for `load_weights`; or it does not say which round it is of.
    """
    file = path / "checkpoint.safetensors"
    weights = load_weights(file, like, model)
    with safetensors.safe_open(file, "np") as opened:
        server_round = (opened.metadata() or {}).get("server_round", "")
        state = {
            name.removeprefix(STATE): opened.get_tensor(name)
            for name in opened.keys()  # noqa: SIM118  # no dict
            if name.startswith(STATE)
        }
    if not server_round.isdecimal() or len(server_round) > 9:
        raise FederationError(f"'{file}' does not say of which round it is; it is no checkpoint")
    return int(server_round), weights, state


def load_weights(path: Path, like: Mapping[str, np.ndarray], model: str) -> list[np.ndarray]:
    """Read a safetensors file into a list of arrays in the order of `like`.

    Raises:
        FederationError: no such file, a damaged one, or one of another model.
    """
    try:
        found = safetensors.numpy.load_file(path)
    except FileNotFoundError:
        raise FederationError(f"no weights file '{path}'") from None
    except OSError as error:
        reason = error.strerror or "not a file"
        raise FederationError(f"cannot read weights file '{path}' ({reason})") from error
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise FederationError(
            f"weights file '{path}' is damaged or no safetensors file ({error})"
        ) from error
    found = {name: array for name, array in found.items() if not name.startswith(STATE)}
    another = f"weights file '{path}' is of another model than {model}"
    if found.keys() != like.keys():
        odd = ", ".join(sorted(found.keys() ^ like.keys())[:3])
        raise FederationError(
            f"{another}: it has {len(found)} arrays, {model} has {len(like)} ({odd}, … differ)"
        )
    for name, array in like.items():
        if found[name].shape != array.shape or found[name].dtype != array.dtype:
            raise FederationError(
                f"{another}: {name} is {found[name].dtype} {found[name].shape}, "
                f"not {array.dtype} {array.shape}"
            )
        if array.dtype.kind == "f" and not np.isfinite(found[name]).all():
            raise FederationError(f"weights file '{path}' has non-finite values in {name}")
    return [found[name] for name in like]


def _without_nan(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_nan(item) for item in value]
    return value


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
