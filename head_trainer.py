"""The Trainer of client.py for a model with a frozen backbone and a head that learns.

What the backbone sees in a photograph is computed once and kept. Who computes it, and who
trains the head, is handed in: torch (torch_trainer.py), or ONNX Runtime and NumPy
(fridgecam/light.py), with the same numbers.
"""

import hashlib
import json
import secrets
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from federated.errors import FederationError
from federated.settings import Settings
from plumbing.files import write_whole
from plumbing.photos import (
    Excluded,
    FeatureCache,
    Photo,
    batches,
    hash_of,
    hold_out,
    labelled,
    unknown_classes,
)

Weights = dict[str, np.ndarray]


class Backbone(Protocol):
    """What computes features and trains a head on them."""

    device: str
    source: str  # the SHA-256 of the code that trains

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """Return float32 (N, D) for uint8 pixels (N, 3, H, W)."""

    def train(
        self,
        weights: Mapping[str, np.ndarray],
        x: np.ndarray,
        labels: np.ndarray,
        order: list[list[np.ndarray]],
        settings: Settings,
    ) -> tuple[Weights, float, int]:
        """Train a head on features (N, D), in this order; return it, its last loss, its steps."""


@dataclass(frozen=True)
class Card:
    """What a device must know of the model that it gets: card.json."""

    model: str
    classes: list[str]
    image_size: int
    views: int
    frozen: str  # the hash of what does not learn
    head: dict[str, list[int]]  # the shapes of the arrays that learn, in the order of the wire
    version: int = 0
    accuracy: float | None = None  # on the server's test images; None if it has not been tested

    @classmethod
    def read(cls, text: str | bytes) -> "Card":
        """Raise FederationError for what is no card."""
        try:
            values = json.loads(text)
            card = cls(
                **{name: values[name] for name in cls.__dataclass_fields__ if name in values}
            )
            if not (card.classes and 16 <= card.image_size <= 1024 and 1 <= card.views <= 64):
                raise ValueError("a value is out of range")
            return card
        except (TypeError, ValueError, KeyError) as error:
            raise FederationError(f"the server's card.json cannot be used: {error}") from None


class HeadTrainer:
    """Trains a head on the features of this device's photographs.

    Args:
        photos: the folder with a folder of photographs for each class; any may be missing.
        cache: where features are kept.
        exclude: a file with what the owner keeps out.
        validates: hold out one photograph in five, to judge new models by.
    """

    lr = 0.05

    def __init__(
        self,
        cid: str,
        card: Card,
        backbone: Backbone,
        photos: Path,
        cache: Path,
        exclude: Path | None = None,
        validates: bool = False,
    ) -> None:
        self.validates = validates
        self.cid, self.card, self.backbone = cid, card, backbone
        self.photos, self.exclude = photos, exclude
        self.model, self.classes, self.names = card.model, card.classes, list(card.head)
        self.device, self.source = backbone.device, backbone.source
        self.cache = FeatureCache(
            cache, backbone.features, card.frozen, card.image_size, card.views
        )
        for name in unknown_classes(photos, card.classes):
            print(f"Client {cid}: folder '{name}' is skipped: the model has no such class")

    def describe(self) -> str:
        return f"the head of {self.model} on {self.device}, {len(self.scan()):,} photographs"

    def scan(self) -> list[Photo]:
        """Return the photographs to train on that are there now and not kept out."""
        return self._split()[0]

    def held_out(self) -> list[Photo]:
        """Return the photographs that judge new models, and never train."""
        return self._split()[1]

    def _split(self) -> tuple[list[Photo], list[Photo]]:
        photos = labelled(self.photos, self.classes, Excluded(self.exclude))
        return hold_out(photos) if self.validates else (photos, [])

    def compare(
        self, old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]
    ) -> tuple[int, int, int]:
        """Return how many photographs are held out, newly right, and newly wrong."""
        x, labels = self.cache.features(self.held_out())
        if not len(labels):
            return 0, 0, 0
        before, after = (head_scores(w, x[:, 0]).argmax(1) == labels for w in (old, new))
        return len(labels), int((after & ~before).sum()), int((before & ~after).sum())

    def data_version(self) -> str:
        """Return what changes with the photographs to train on, and shows nothing of them.

        The server learns from it that there is something new. It is salted, so that nobody can
        find out whether a known photograph is here.
        """
        digest = hashlib.sha256(self._salt())
        for photo in self.scan():
            digest.update(f"{photo.label} {hash_of(photo.path)} ".encode())
        return digest.hexdigest()[:16]

    def _salt(self) -> bytes:
        path = self.cache.folder.parent / "salt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, secrets.token_bytes(16))
        return path.read_bytes()

    def prepare(self, settings: Settings) -> tuple[int, str]:
        """Return how many photographs it will train on, and which in words."""
        count = len(self.scan())
        if not count:
            raise FederationError(f"no photographs in '{self.photos}/<class>/' to train on")
        return count, f"{count:,} photographs"

    def get_weights(self) -> Weights:
        """Return the form of the weights: the server has the numbers."""
        return {name: np.zeros(shape, np.float32) for name, shape in self.card.head.items()}

    def fit(
        self,
        weights: Mapping[str, np.ndarray],
        settings: Settings,
        report: Callable[[int, int, float, float], None] = lambda *_: None,
    ) -> tuple[Weights, int, dict[str, Any]]:
        """Train from `weights` on, on the photographs that are there now.

        It takes less than a second once the features are there: `report` is not called.
        """
        x, labels = self.cache.features(self.scan())
        if not len(labels):
            raise FederationError("there are no photographs to train on")
        start = time.perf_counter()
        seed = zlib.crc32(f"{settings.seed} {self.cid} {settings.server_round}".encode())
        # Each view is an example of its own.
        count, flat = len(labels) * x.shape[1], x.reshape(-1, x.shape[2])
        labels_of_views = labels.repeat(x.shape[1])
        balance = labels_of_views if settings.sampling == "balanced" else None
        order = batches(count, settings.batch_size, settings.epochs, seed, balance)
        print(f"Training {settings.epochs} epoch(s) w/ {len(order[0])} batches each")
        trained, loss, steps = self.backbone.train(weights, flat, labels_of_views, order, settings)
        seconds = max(time.perf_counter() - start, 1e-6)
        metrics = {
            "loss": loss,
            "steps": steps,
            "images_per_second": count * settings.epochs / seconds,
        }
        return trained, len(labels), metrics

    def evaluate(
        self, weights: Mapping[str, np.ndarray], settings: Settings | None = None
    ) -> tuple[float, int, dict[str, Any]]:
        """Return the loss of `weights` on this device's photographs, how many, and metrics."""
        x, labels = self.cache.features(self.scan())
        if not len(labels):
            raise FederationError("there are no photographs to evaluate on")
        scores = head_scores(weights, x[:, 0])
        p = softmax(scores)[np.arange(len(labels)), labels]
        accuracy = float((scores.argmax(1) == labels).mean())
        return float(-np.log(np.maximum(p, 1e-30)).mean()), len(labels), {"accuracy": accuracy}


def head_scores(weights: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Return the scores (N, classes) of a linear head: a matrix, and a bias for each class."""
    matrix, bias = weights.values()
    return x @ matrix.T + bias


def softmax(scores: np.ndarray) -> np.ndarray:
    """Return probabilities along the last axis."""
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def hash_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """Return a hash over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        digest.update(array.data)
    return digest.hexdigest()
