"""What a fridge's computer keeps in its folder, and what it sees with the model that is there.

inbox/               what the camera wrote; never trained on
photos/<class>/      labelled; the only thing trained on
exclude.txt          class names and globs; wins over everything
model/               card.json, backbone.onnx, head.safetensors, personal.safetensors
config.json          {"share": false, …}
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from federated.errors import FederationError
from head_trainer import Card, head_scores, softmax
from plumbing.files import write_whole
from plumbing.photos import Excluded, views
from plumbing.publish import CARD

BACKBONE, HEAD, PERSONAL = "backbone.onnx", "head.safetensors", "personal.safetensors"
WANTED = (BACKBONE, HEAD)
TOP = 3
FIXED = {"share": False, "server_address": "", "cid": "", "image_threads": 1}


@dataclass(frozen=True)
class Seen:
    """What may be in a photograph, and how sure that is, from 0 to 1."""

    name: str
    confidence: float


class Home:
    """The folder of one fridge."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser()
        self.inbox = self.folder / "inbox"
        self.photos = self.folder / "photos"
        self.exclude = self.folder / "exclude.txt"
        self.model = self.folder / "model"
        self.cache = self.folder / "cache"
        self.keys = self.folder / "keys"
        self._config = self.folder / "config.json"

    @property
    def config(self) -> dict[str, Any]:
        """Return the owner's choices; what is not in the file has its default."""
        try:
            found = json.loads(self._config.read_bytes())
        except FileNotFoundError:
            found = {}
        except ValueError as error:
            raise FederationError(f"'{self._config}' is no JSON ({error}); correct it") from None
        if not isinstance(found, dict):
            raise FederationError(f"'{self._config}' holds no object; correct it")
        return {**FIXED, **found}

    def change(self, **values: Any) -> None:
        """Change some of the owner's choices."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self.config, **values}, indent=1)
        write_whole(self._config, f"{text}\n".encode())

    @property
    def shares(self) -> bool:
        """Return whether the owner has opted in; only a plain true counts."""
        return self.config["share"] is True

    def make(self) -> None:
        """Make the folders of a new fridge; FederationError if it cannot write there."""
        try:
            for folder in (self.inbox, self.photos, self.model):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FederationError(
                f"cannot make '{error.filename}' ({error.strerror}); user {os.getuid()} must own "
                f"'{self.folder}'"
            ) from None

    def card(self) -> Card:
        try:
            return Card.read((self.model / CARD).read_bytes())
        except FileNotFoundError:
            raise FederationError(
                f"there is no model in '{self.model}' yet; ./run_fridgecam.sh install gets it"
            ) from None

    def excluded(self) -> Excluded:
        return Excluded(self.exclude)

    def head(self, personal: bool = True) -> dict[str, np.ndarray]:
        """Return the head that this fridge looks with: its own, if it has one for this model."""
        from safetensors.numpy import load_file

        card, own = self.card(), self.model / PERSONAL
        if personal and own.exists():
            arrays = load_file(own)
            if int(arrays.pop("version", np.zeros(1))[0]) == card.version:
                return {name: arrays[name] for name in card.head}
        arrays = load_file(self.model / HEAD)
        return {name: arrays[name] for name in card.head}


class Looker:
    """Names what is in photographs, with the model in a fridge's folder."""

    def __init__(self, home: Home) -> None:
        from light_trainer import OnnxBackbone

        self.home, self.card = home, home.card()
        self.backbone = OnnxBackbone(home.model / BACKBONE)
        self.head = home.head()

    def look(self, path: Path) -> list[Seen]:
        """Return the three likeliest classes of a photograph; none that the owner excludes."""
        try:
            pixels = views(path, self.card.image_size, 1)
        except (OSError, SyntaxError, ValueError) as error:
            raise FederationError(f"cannot read '{path}': {error}") from None
        p = softmax(head_scores(self.head, self.backbone.features(pixels)))[0]
        excluded = self.home.excluded()
        order = [i for i in np.argsort(-p) if not excluded.has(path, self.card.classes[i])]
        return [Seen(self.card.classes[i], float(p[i])) for i in order[:TOP]]


def default_home() -> Path:
    """Return the fridge's folder: $FRIDGE_HOME or ~/fridge."""
    return Path(os.environ.get("FRIDGE_HOME") or Path.home() / "fridge")
