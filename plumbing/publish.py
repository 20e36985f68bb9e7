"""The newest model for the devices: a card and the files that it names.

The server keeps both in <run>/published/ and hands them out by plumbing/stream/fleet.py; a
device fetches them by plumbing/stream/fetch.py.
"""

import base64
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from plumbing.files import write_whole
from plumbing.photos import MOST_HELD_OUT

CARD = "card.json"
MOST_DEVICES = 100_000
PUBLISHED = "published"  # the folder of a run with what its devices fetch


SURE = Fraction(1, 20)  # a model that is worse by chance alone is that as often at most


def is_worse(right: int, wrong: int) -> bool:
    """Return whether a model is worse, given what it has newly right and newly wrong.

    The exact one-sided sign test: with an equally good model, at least `wrong` of the changes are
    for the worse with a probability of at most SURE.
    """
    changes = right + wrong
    tail = sum(math.comb(changes, k) for k in range(wrong, changes + 1))
    return changes > 0 and tail <= 2**changes * SURE.numerator // SURE.denominator


class Publication:
    """What the server hands out; the thread of the schedule changes it, the fleet reads it.

    Args:
        folder: where the card and the files are kept.
        sign: returns the authority's signature of the card; None at an open server.
    """

    def __init__(self, folder: Path, sign: Callable[[bytes], bytes] | None = None) -> None:
        self.folder = folder
        self.sign = sign
        self.card = b""
        self.files: dict[str, Path] = {}  # by their SHA-256
        self.version = 0
        self.judgements: dict[str, tuple[int, int, int]] = {}  # of this version, by device

    def publish(self, card: Mapping[str, Any], files: Mapping[str, bytes]) -> int:
        """Hand out a new model from now on; return its version.

        The version is the time in seconds: it grows from run to run, too, so that a device can
        refuse an older model that somebody replays.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        named: dict[str, dict[str, Any]] = {}
        for name, data in files.items():
            digest = hashlib.sha256(data).hexdigest()
            path = self.folder / name
            if not (path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == digest):
                write_whole(path, data)
            named[name] = {"sha256": digest, "bytes": len(data)}
        version = max(int(time.time()), self._version() + 1)
        whole = {**card, "version": version, "files": named}
        text = json.dumps(whole, indent=1).encode()
        write_whole(self.folder / CARD, text)
        self.files |= {entry["sha256"]: self.folder / name for name, entry in named.items()}
        signature = base64.b64encode(self.sign(text)).decode() if self.sign else ""
        self.version, self.judgements = version, {}
        self.card = json.dumps({"card": text.decode(), "signature": signature}).encode()
        return version

    def judge(self, device: str, version: int, counts: tuple[int, int, int]) -> None:
        """Take what a device found: photographs held out, newly right and newly wrong ones."""
        held_out, right, wrong = counts
        possible = right >= 0 and wrong >= 0 and right + wrong <= held_out <= MOST_HELD_OUT
        if version == self.version and possible and len(self.judgements) < MOST_DEVICES:
            self.judgements[device] = counts

    def judged(self) -> tuple[int, int, int]:
        """Return the sums of what all devices found of this version."""
        sums = [sum(column) for column in zip(*self.judgements.values(), strict=True)]
        held_out, right, wrong = sums or (0, 0, 0)
        return held_out, right, wrong

    def _version(self) -> int:
        try:
            return int(json.loads((self.folder / CARD).read_bytes())["version"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def read(self, digest: str, offset: int, size: int) -> bytes:
        """Return a piece of a file; b"" after its end, or where there is no such file."""
        path = self.files.get(digest)
        if path is None:
            return b""
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)
