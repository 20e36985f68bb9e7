"""Files that hold weights: safetensors with a checksum, replaced as a whole or not at all.

No pickle is written or read. The checkpoint before the last is kept beside the last one, and
read where the last is damaged.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from federated.errors import FederationError

LAST = "checkpoint.safetensors"
PREVIOUS = "checkpoint.previous.safetensors"
BEST = "checkpoint.best.safetensors"
STATE = "strategy/"  # before the names of a strategy's own arrays
MEMORY = "memory"  # the note with what else a run remembers from round to round, as JSON
CHECKSUM = "content_sha256"
OLD_NOTES = {"server_round", "model", "classes"}  # all that a checkpoint without a checksum notes


class DamagedFile(FederationError):
    """A weights file that is missing, unreadable or damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it is on the disk."""

    file: Path
    server_round: int  # the last finished round; 0 is none
    arrays: dict[str, np.ndarray]  # weights, and the strategy's own behind STATE
    memory: dict[str, Any] | None  # what else it keeps; None in files of older releases
    warning: str = ""  # set where it is the previous one, because the last is damaged


# --- Writing ---


def encode_weights(arrays: Mapping[str, np.ndarray], notes: Mapping[str, str]) -> bytes:
    """Return a safetensors file with the notes and a checksum in its metadata."""
    ordered = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    return safetensors.numpy.save(ordered, {**notes, CHECKSUM: _checksum(ordered, notes)})


def _checksum(arrays: Mapping[str, np.ndarray], notes: Mapping[str, str]) -> str:
    """Return SHA-256 over the notes and over each array's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(sorted(notes.items())).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        digest.update(array.data)
    return digest.hexdigest()


# --- Reading ---


def load_checkpoint(
    directory: Path, like: Mapping[str, np.ndarray], model: str
) -> tuple[int, dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any] | None]:
    """Read a run's last checkpoint; if it is damaged, the one before, with a line on stderr.

    Returns:
        The last finished round (0 is none), the weights by name in the order of `like`, the
        strategy's own arrays by name, and what else was remembered (see RunDirectory.save).

    Raises:
        FederationError: as for `load_fitting`; or it does not note its round.
    """
    found = read_checkpoint(directory)
    weights = _check_weights(str(found.file), found.arrays, like, model)
    if found.warning:
        print(found.warning, file=sys.stderr)
    state = {
        name.removeprefix(STATE): array
        for name, array in found.arrays.items()
        if name.startswith(STATE)
    }
    return found.server_round, weights, state, found.memory


def load_fitting(
    path: Path, like: Mapping[str, np.ndarray], model: str, new_rest: bool = False
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read what fits a model by name, shape and type; also return what the file has beside that.

    Args:
        new_rest: the model may have more than fits, which then keeps its random start.

    Raises:
        FederationError: no such file, a damaged one, or too little of it fits.
    """
    _, arrays = _read(path)
    found = {name: array for name, array in arrays.items() if not name.startswith(STATE)}
    return choose_fitting(str(path), found, like, model, new_rest)


def choose_fitting(
    source: str,
    found: Mapping[str, np.ndarray],
    like: Mapping[str, np.ndarray],
    model: str,
    new_rest: bool = False,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Do as `load_fitting`, with arrays that were read from `source`."""
    fits = {
        name: found[name]
        for name, array in like.items()
        if name in found and (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
    }
    if not new_rest or not fits:
        shared = {name: array for name, array in found.items() if name in like}
        fits = _check_weights(source, shared or found, like, model)
    return fits, [name for name in found if name not in fits]


def read_checkpoint(directory: Path) -> Checkpoint:
    """Return a directory's last checkpoint, or if it is damaged the one before.

    Raises:
        DamagedFile: there is no whole one.
    """
    last, previous = directory / LAST, directory / PREVIOUS
    try:
        return _read_one(last)
    except DamagedFile as error:
        if not previous.exists():
            raise
        try:
            found = _read_one(previous)
        except DamagedFile as second:
            raise DamagedFile(f"{error}; {second}") from None
        lost = noted_round(last)
        which = "an unknown round" if lost is None else f"round {lost}"
        warning = f"{error} (it was of {which}); using '{previous}' of round {found.server_round}"
        return replace(found, warning=warning)


def finished_round(directory: Path) -> int | None:
    """Return the round that a directory's checkpoint notes, unchecked; None if there is none."""
    noted = noted_round(directory / LAST)
    return noted_round(directory / PREVIOUS) if noted is None else noted


def noted_round(path: Path) -> int | None:
    """Return the round that a file notes, unchecked; None if it cannot be read."""
    try:
        with safetensors.safe_open(path, "np") as opened:
            return _round_in(opened.metadata() or {})
    except (OSError, safetensors.SafetensorError, ValueError):
        return None


def _round_in(notes: Mapping[str, str]) -> int | None:
    text = notes.get("server_round", "")
    return int(text) if text.isdecimal() and len(text) <= 9 else None


def _read_one(path: Path) -> Checkpoint:
    notes, arrays = _read(path)
    if CHECKSUM not in notes and not notes.keys() <= OLD_NOTES:  # its name may be what is damaged
        raise DamagedFile(f"weights file '{path}' is damaged (it has no checksum)")
    server_round = _round_in(notes)
    if server_round is None:
        raise DamagedFile(f"'{path}' does not note a round; it is not a checkpoint")
    try:
        memory = json.loads(notes[MEMORY]) if MEMORY in notes else None
    except (ValueError, RecursionError):
        raise DamagedFile(f"'{path}' notes no JSON in {MEMORY}; it is not a checkpoint") from None
    if memory is not None and not isinstance(memory, dict):
        raise DamagedFile(f"'{path}' notes no object in {MEMORY}; it is not a checkpoint")
    return Checkpoint(path, server_round, arrays, memory)


def _read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Return a file's notes and arrays; its checksum, if it has one, is verified.

    Raises:
        DamagedFile: it cannot be read, or is not what was written.
    """
    try:
        with safetensors.safe_open(path, "np") as opened:
            notes = opened.metadata() or {}
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise DamagedFile(f"no weights file '{path}'") from None
    except OSError as error:
        reason = error.strerror or "not a file"
        raise DamagedFile(f"cannot read weights file '{path}' ({reason})") from error
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedFile(
            f"weights file '{path}' is damaged or no safetensors file ({error})"
        ) from error
    others = {name: text for name, text in notes.items() if name != CHECKSUM}
    if CHECKSUM in notes and notes[CHECKSUM] != _checksum(arrays, others):
        raise DamagedFile(f"weights file '{path}' is damaged (its checksum does not match)")
    return notes, arrays


def _check_weights(
    path: str, arrays: Mapping[str, np.ndarray], like: Mapping[str, np.ndarray], model: str
) -> dict[str, np.ndarray]:
    """Return the model's arrays in the order of `like`; FederationError if they do not fit."""
    found = {name: array for name, array in arrays.items() if not name.startswith(STATE)}
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
    return {name: found[name] for name in like}
