"""The device's end of the newest model: ask for the card, fetch what is not here yet.

Over a channel like the stream's, through the same door. Files come in pieces, and a
transfer that was cut off goes on where it ended.
"""

import base64
import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from federated.errors import FederationError
from plumbing.files import write_whole
from plumbing.publish import CARD
from plumbing.security import keys
from plumbing.security.identity import NO_PROXY, Identity
from plumbing.stream.device import open_channel

logger = logging.getLogger(__name__)

FETCH = "/plumbing.Fleet/Fetch"
PIECE_BYTES = 1 << 18
CARD_SECONDS = 20.0
FILE_SECONDS = 600.0
MAX_FILE_BYTES = 1 << 30
REFUSED = "refused"  # the version that this device did not accept
PREVIOUS = "previous"  # the folder of the model before


def fetch_model(
    server_address: str,
    identity: Identity | None,
    folder: Path,
    wanted: tuple[str, ...],
    accept: Callable[[dict[str, Any], dict[str, Path]], bool] = lambda card, files: True,
) -> dict[str, Any] | None:
    """Bring `folder` up to date; return the new card, None if the newest is here already.

    Args:
        wanted: which of the card's files this device uses.
        accept: called with a new card and its files before they are installed; if it returns
            False the old model stays, and this version is not fetched again.

    Raises:
        FederationError: the card or a file is not what it should be, or older than what is here.
        grpc.RpcError: the server could not be reached.
    """
    options: list[tuple[str, int]] = [*NO_PROXY, ("grpc.max_receive_message_length", 4 << 20)]
    with open_channel(server_address, options, identity) as channel:
        text = _fetch_card(channel, identity)
        card = _parse(text)
        old = read_card(folder)
        if old and card["version"] < old["version"]:
            raise FederationError(
                f"the server offers model version {card['version']}, older than "
                f"{old['version']} that is here; it stays"
            )
        complete = all((folder / name).exists() for name in wanted)
        if old and card["version"] == old["version"] and complete:
            return None
        if old and card["version"] == _refused_version(folder):
            return None
        folder.mkdir(parents=True, exist_ok=True)
        for name in wanted:
            if name not in card["files"]:
                raise FederationError(f"the server's model has no {name}; update the project there")
            _fetch_file(channel, folder, name, card["files"][name])
    staged = {name: folder / f"{card['files'][name]['sha256']}.new" for name in wanted}
    files = {name: path if path.exists() else folder / name for name, path in staged.items()}
    if not accept(card, files):
        write_whole(folder / REFUSED, str(card["version"]).encode())
        for path in staged.values():
            path.unlink(missing_ok=True)
        return None
    _install(folder, text, card, wanted)
    return card


def _refused_version(folder: Path) -> int:
    """Return the version that this device did not accept; -1 if there is none."""
    try:
        return int((folder / REFUSED).read_text())
    except (OSError, ValueError):
        return -1


def send_judgement(
    server_address: str, identity: Identity | None, version: int, counts: tuple[int, int, int]
) -> None:
    """Report how many photographs were held out here, newly right and newly wrong."""
    request = {"file": CARD, "version": version, "counts": counts}
    with open_channel(server_address, [*NO_PROXY], identity) as channel:
        for _ in _ask(channel, request, CARD_SECONDS):
            pass


def read_card(folder: Path) -> dict[str, Any] | None:
    """Return the card of the model that is here, or None."""
    try:
        return _parse((folder / CARD).read_bytes())
    except (OSError, FederationError):
        return None


def _fetch_card(channel: grpc.Channel, identity: Identity | None) -> bytes:
    answer = b"".join(_ask(channel, {"file": CARD}, CARD_SECONDS))
    try:
        envelope = json.loads(answer)
        text, signature = envelope["card"].encode(), base64.b64decode(envelope["signature"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FederationError("the server has no model to hand out") from None
    if identity and not keys.is_signed(text, signature, identity.authority):
        raise FederationError("the model's card is not signed by the server's authority")
    return text


def _parse(text: bytes) -> dict[str, Any]:
    """Return a card of which this module's part is as it should be."""
    try:
        card = json.loads(text)
        files = card["files"].items()
        if type(card["version"]) is int and all(
            Path(name).name == name and name[0] != "." and len(bytes.fromhex(f["sha256"])) == 32
            and 0 <= f["bytes"] <= MAX_FILE_BYTES
            for name, f in files
        ):  # fmt: skip
            return card
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        pass
    raise FederationError("the model's card cannot be used")


def _fetch_file(channel: grpc.Channel, folder: Path, name: str, entry: dict[str, Any]) -> None:
    """Fetch a file into <sha256>.new, unless it is there or was installed before."""
    digest, size = entry["sha256"], entry["bytes"]
    new, part = folder / f"{digest}.new", folder / f"{digest}.part"
    if new.exists() or _sha256(folder / name) == digest:
        return
    have = part.stat().st_size if part.exists() else 0
    with part.open("ab") as file:
        if have:
            logger.info(f"{name}: {have:,} of {size:,} bytes are here already")
        for piece in _ask(channel, {"file": digest, "offset": have}, FILE_SECONDS):
            have += len(piece)
            if have > size:
                break
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    if have < size:
        raise FederationError(f"{name}: only {have:,} of {size:,} bytes came; they are kept")
    if _sha256(part) != digest:
        part.unlink()
        raise FederationError(f"{name} is not what the card names (wrong SHA-256); it is removed")
    part.replace(new)


def _install(folder: Path, text: bytes, card: dict[str, Any], wanted: tuple[str, ...]) -> None:
    """Put the fetched files and the card in place; what they replace is kept for going back."""
    previous = folder / PREVIOUS
    if (folder / CARD).exists():
        previous.mkdir(exist_ok=True)
    for name in [*wanted, CARD]:
        new = folder / f"{card['files'][name]['sha256']}.new" if name != CARD else None
        if previous.exists() and (folder / name).exists():
            (previous / name).unlink(missing_ok=True)
            (previous / name).hardlink_to(folder / name)
        if new and new.exists():
            new.replace(folder / name)
    write_whole(folder / CARD, text)
    for leftover in folder.glob("*.part"):
        leftover.unlink()


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _ask(channel: grpc.Channel, request: dict[str, Any], seconds: float) -> Any:
    """Return the pieces of the answer."""
    call = channel.stream_stream(FETCH)
    return call(iter([json.dumps(request).encode()]), timeout=seconds)
