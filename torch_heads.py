"""Models with a frozen backbone and a head that learns, in torch: the server's side and a device's.

A model is of this kind if it has `features(images)` and `head`, and nothing but the head learns.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import utils
from federated.errors import FederationError
from federated.settings import RunSettings, Settings
from head_trainer import Card, HeadTrainer, Weights, hash_arrays
from light_trainer import OnnxBackbone
from plumbing.checkpoints import encode_weights, load_fitting
from plumbing.files import write_whole
from plumbing.photos import FeatureCache, Photo, labelled, set_apart
from plumbing.publish import CARD, Publication, is_worse
from plumbing.security.identity import Identity
from plumbing.stream.fetch import fetch_model
from torch_export import to_onnx

VIEWS = 4  # of a photograph in training: the whole, mirrored, and parts
BACKBONE, FROZEN, HEAD = "backbone.onnx", "frozen.safetensors", "head.safetensors"


def server_features(net: torch.nn.Module, views: int) -> FeatureCache:
    """Return what computes features here, as devices do: in half of torch's time."""
    frozen = hash_arrays(frozen_arrays(net))
    size = int(getattr(net, "image_size", utils.IMAGE_SIZE))
    folder = feature_folder() / "features"
    path = folder / f"{frozen[:16]}-{size}.onnx"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, to_onnx(net, size, features=True))
    return FeatureCache(folder, OnnxBackbone(path).features, frozen, size, views, 1 << 30)


def frozen_arrays(net: torch.nn.Module) -> dict[str, np.ndarray]:
    """Return what does not learn."""
    return {
        name: value.cpu().numpy().copy()
        for name, value in net.state_dict().items()
        if name not in utils.learned(net)
    }


def feature_folder() -> Path:
    """Return where features are kept on a machine that is no device."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "flower-embedded")


class TorchBackbone:
    """The frozen backbone of a model that has `features` and `head`, and the head's training."""

    source = hashlib.sha256(Path(utils.__file__).read_bytes()).hexdigest()

    def __init__(self, net: torch.nn.Module, device: str = "cpu") -> None:
        self.net = net.to(device).eval()
        self.device = device

    @torch.inference_mode()
    def features(self, pixels: np.ndarray) -> np.ndarray:
        images = utils.normalise(torch.from_numpy(pixels).to(self.device), self.net)
        features: Any = self.net.features  # a module's attributes have no types
        # One at a time, as on a device without torch: the least memory, and the same numbers.
        return torch.cat([features(image[None]) for image in images]).cpu().numpy()

    def train(
        self,
        weights: Mapping[str, np.ndarray],
        x: np.ndarray,
        labels: np.ndarray,
        order: list[list[np.ndarray]],
        settings: Settings,
    ) -> tuple[dict[str, np.ndarray], float, int]:
        utils.set_weights(self.net, weights)
        head: Any = self.net.head
        loader: Any = HeadLoader(x, labels, order, self.device)
        trained = utils.train(head, loader, settings, self.device, log=lambda line: None)
        return utils.get_weights(self.net), trained.loss, trained.steps


def device_folder(cid: str) -> Path:
    """Return where a device that trains with torch keeps what the server hands out."""
    return feature_folder() / f"device-{cid}"


def fetch_frozen(cid: str, server_address: str, identity: Identity | None) -> None:
    """Fetch the frozen part of the server's model, unless it is here."""
    fetch_model(server_address, identity, device_folder(cid), (FROZEN,))


def open_trainer(cid: str, model: str, data_dir: Path, device: str) -> HeadTrainer:
    """Return a device's Trainer, with the frozen part that `fetch_frozen` got."""
    folder = device_folder(cid)
    card = Card.read((folder / CARD).read_bytes())
    if card.model != model:
        raise FederationError(
            f"the server's model is {card.model}; start with --model {card.model}"
        )
    net = utils.build_model(model, len(card.classes))
    state = {n: v.cpu().numpy() for n, v in net.state_dict().items()}
    frozen = {n: a for n, a in state.items() if n not in utils.learned(net)}
    arrays, _ = load_fitting(folder / FROZEN, frozen, model)
    if hash_arrays(arrays) != card.frozen:
        raise FederationError(f"'{folder / FROZEN}' is not what the card names; remove it")
    net.load_state_dict({n: torch.tensor(a) for n, a in arrays.items()}, strict=False)
    backbone = TorchBackbone(net, device)
    return HeadTrainer(cid, card, backbone, data_dir / "train", folder / "features")


class HeadLoader:
    """The batches of features that a head is trained on, epoch by epoch in a given order."""

    def __init__(
        self, x: np.ndarray, labels: np.ndarray, order: list[list[np.ndarray]], device: str
    ) -> None:
        self.x = torch.from_numpy(x).to(device)
        self.labels = torch.from_numpy(labels).to(device)
        self.epochs = iter(order)
        self.batches = len(order[0])
        self.batch_size = len(order[0][0])
        self.used = len(labels)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for chosen in next(self.epochs):
            yield self.x[chosen], self.labels[chosen]


class ServiceTrainer(HeadTrainer):
    """Trains on given photographs of the service, as devices train on theirs."""

    def __init__(
        self, card: Card, net: torch.nn.Module, photos: list[Photo], device: str = "cpu"
    ) -> None:
        nowhere = Path(os.devnull)  # it is given its photographs
        super().__init__("service", card, TorchBackbone(net, device), nowhere, feature_folder())
        self.chosen = photos
        self.cache = server_features(net, card.views)

    def scan(self) -> list[Photo]:
        return self.chosen


def own_photos(data_dir: Path, classes: list[str]) -> list[Photo]:
    """Return the service's photographs, without those that test where there is no test/."""
    photos = labelled(data_dir / "train", classes)
    rest = photos if (data_dir / "test").is_dir() else set_apart(photos)[0]
    if not rest:
        raise FederationError(f"no photographs in '{data_dir}/train' to train on")
    return rest


class HeadTest:
    """Test photographs as the backbone sees them, so that a round's test takes milliseconds.

    Args:
        data_dir: test/<class>/*, and if there is none a fixed quarter of train/<class>/*.
    """

    def __init__(self, data_dir: str | Path) -> None:
        self.classes, self.photos, self.source = test_photos(Path(data_dir).expanduser())
        self.x: torch.Tensor | None = None
        self.labels = torch.empty(0)
        self.hits = np.empty(0, bool)  # which photographs were right in the last evaluation

    def __len__(self) -> int:
        return len(self.photos)

    @torch.inference_mode()
    def evaluate(self, net: torch.nn.Module, device: str) -> utils.Evaluation:
        """Evaluate the head; the backbone must be the same each time."""
        if self.x is None:
            x, labels = server_features(net, 1).features(self.photos)
            self.x, self.labels = torch.from_numpy(x[:, 0]), torch.from_numpy(labels)
        head: Any = net.to(device).head
        scores = head(self.x.to(head.weight.device)).cpu()
        self.hits = (scores.argmax(1) == self.labels).numpy()
        losses = F.cross_entropy(scores, self.labels, reduction="none").double()
        hits = (scores.argmax(1) == self.labels).double()
        of_class = [self.labels == c for c in range(len(self.classes))]
        return utils.Evaluation(
            losses.mean().item(),
            hits.mean().item(),
            [losses[mask].mean().item() for mask in of_class],
            [hits[mask].mean().item() for mask in of_class],
        )


def class_folders(data_dir: Path) -> list[str]:
    """Return the names of the class folders below train/ and test/."""
    folders = [p for part in ("train", "test") for p in (data_dir / part).glob("*/")]
    names = sorted({p.name for p in folders if not p.name.startswith(".")})
    if len(names) < 2:
        raise FederationError(f"'{data_dir}' needs train/<class>/* or test/<class>/*")
    return names


def test_photos(data_dir: Path) -> tuple[list[str], list[Photo], str]:
    """Return the classes, the photographs that test, and where they are from."""
    classes = class_folders(data_dir)
    if (data_dir / "test").is_dir():
        photos, source = labelled(data_dir / "test", classes), f"images in {data_dir}"
    else:
        _, photos = set_apart(labelled(data_dir / "train", classes))
        source = f"images set apart in {data_dir}/train"
    if not photos:
        raise FederationError(f"no photographs in '{data_dir}' to test with")
    return classes, photos, source


def make_card(settings: RunSettings, net: torch.nn.Module, classes: list[str]) -> Card:
    """Return what devices must know of a model."""
    return Card(
        model=settings.model,
        classes=classes,
        image_size=int(getattr(net, "image_size", utils.IMAGE_SIZE)),
        views=VIEWS,
        frozen=hash_arrays(frozen_arrays(net)),
        head={name: list(value.shape) for name, value in utils.learned(net).items()},
    )


class Publisher:
    """Hands out each new model; the files of the frozen part are made once.

    Args:
        judge: photographs that judge each model.
        strict: hand out only what is not worse; else each model.
    """

    def __init__(
        self,
        card: Card,
        net: torch.nn.Module,
        publication: Publication,
        judge: HeadTest,
        torch_device: str = "cpu",
        strict: bool = True,
    ) -> None:
        self.card = asdict(card)
        self.net = net
        self.publication = publication
        self.judge = judge
        self.torch_device = torch_device
        self.strict = strict
        self.hits: np.ndarray | None = None  # of the model that is handed out
        self.changes = (0, 0)  # what it had newly right and newly wrong at the gate
        self.best: tuple[float, Weights, np.ndarray] | None = None  # by the gate; with its hits
        self.fixed = {
            # Without notes: safetensors writes several in any order, and a server that starts again
            # would have another file, which all devices would fetch.
            FROZEN: encode_weights(frozen_arrays(net), {}),
            BACKBONE: to_onnx(net, card.image_size, features=True),
        }

    def begin(self, weights: Weights) -> None:
        """Hand out what devices had before this server was started again, or else `weights`.

        Raises:
            FederationError: its files cannot be written.
        """
        head = self.publication.folder / HEAD
        with contextlib.suppress(FederationError):  # there is none
            weights, _ = load_fitting(head, weights, self.card["model"])
        if problem := self.offer(weights):
            raise FederationError(problem)

    def offer(self, weights: Weights) -> str:
        """Hand out a new model; return why not, or ""."""
        utils.set_weights(self.net, weights)
        accuracy = self.judge.evaluate(self.net, self.torch_device).accuracy
        try:
            if self.strict:
                return self.consider(weights, accuracy, self.judge.hits)
            self.publish(weights, accuracy)
        except OSError as error:
            return f"cannot write '{self.publication.folder}' ({error.strerror})"
        return ""

    def consider(self, weights: Weights, accuracy: float, hits: np.ndarray) -> str:
        """Hand out a model unless it is worse than the one before; return why not, or ""."""
        held_out = sum(counts[0] for counts in self.publication.judgements.values())
        if self.best and self._is_worse_on_devices():
            best_accuracy, best_weights, best_hits = self.best
            self.publish(best_weights, best_accuracy)
            self.changes, self.hits = (0, 0), best_hits
            return f"worse on {held_out} photographs of devices; back to the best model"
        changes = (0, 0)
        if self.hits is not None:
            changes = int((hits & ~self.hits).sum()), int((self.hits & ~hits).sum())
            if is_worse(*changes):
                return f"worse at the gate: {changes[0]} newly right, {changes[1]} newly wrong"
        self.publish(weights, accuracy)
        if not self.best or accuracy >= self.best[0]:
            self.best = accuracy, weights, hits
        self.hits, self.changes = hits, changes
        return ""

    def _is_worse_on_devices(self) -> bool:
        """Return whether the gate and the devices find the model worse.

        They must do so without any one device, too: none alone can take back a model.
        """
        found = [(0, 0, 0), *self.publication.judgements.values()]
        right = self.changes[0] + sum(counts[1] for counts in found)
        wrong = self.changes[1] + sum(counts[2] for counts in found)
        return all(is_worse(right - r, wrong - w) for _, r, w in found)

    def publish(self, weights: Mapping[str, np.ndarray], accuracy: float | None = None) -> int:
        """Hand out a model; return its version."""
        head = encode_weights(weights, {"frozen": self.card["frozen"]})
        card = {**self.card, "accuracy": accuracy}
        return self.publication.publish(card, {**self.fixed, HEAD: head})
