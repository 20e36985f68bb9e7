"""What a run leaves on the disk: settings, metrics, checkpoints, the model.

Files are replaced as a whole or not at all, and hold no pickle.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from plumbing.errors import FederationError


class RunDirectory:
    """The directory of one run.

    Args:
        path: made if it is not there.
        config: written to config.json.

    Raises:
        FederationError: it cannot be written, or holds a run already.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path = path
        self._unwritten = ""  # metrics that found no room yet
        try:
            path.mkdir(parents=True, exist_ok=True)
            if (path / "metrics.jsonl").exists():
                raise FederationError(
                    f"run directory '{path}' holds a run already; choose another --run_dir"
                )
            write_whole(path / "config.json", json.dumps(config, indent=2).encode() + b"\n")
        except OSError as error:
            raise FederationError(
                f"cannot write run directory '{path}' ({error.strerror}); choose another --run_dir"
            ) from error

    def add_round(
        self,
        metrics: Mapping[str, Any],
        weights: Mapping[str, np.ndarray],
        notes: Mapping[str, str],
    ) -> None:
        """Append a line to metrics.jsonl and replace the checkpoint.

        Raises:
            FederationError: there is no room, say. The last checkpoint is intact then, and
                the next call writes this round's metrics too.
        """
        self._unwritten += json.dumps(_without_nan(metrics)) + "\n"
        try:
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
            self.write_weights("checkpoint.safetensors", weights, notes)
        except OSError as error:
            raise FederationError(f"cannot write to '{self.path}' ({error.strerror})") from error

    def write_weights(
        self, name: str, weights: Mapping[str, np.ndarray], notes: Mapping[str, str]
    ) -> None:
        """Write a safetensors file with `notes` as its metadata.

        Raises:
            FederationError: it cannot be written; a file of that name is as before.
        """
        path = self.path / name
        data = safetensors.numpy.save(
            {key: np.asarray(value, order="C") for key, value in weights.items()}, dict(notes)
        )
        try:
            write_whole(path, data)
        except OSError as error:
            raise FederationError(f"cannot write '{path}' ({error.strerror})") from error


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
