"""The Trainer of client.py for the models and data of utils.py."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import utils
from federated.classes import load_class
from federated.errors import FederationError
from federated.partitions import partition
from federated.settings import Settings, parse_partition
from plumbing.board import Telemetry, available_memory, describe_board
from plumbing.files import write_whole
from plumbing.threads import Threads

WEIGHTS, ACTIVATIONS, REST = 6, 1.3, 20e6  # see `training_bytes`


def has_head(model: str) -> bool:
    """Return whether of a model only a head on frozen features learns."""
    find_model(model)
    net = utils.build_model(model)
    return hasattr(net, "features") and all(n.startswith("head.") for n in utils.learned(net))


class VariedLoader(utils.TrainLoader):
    """A TrainLoader that shows images in other ways, if one is chosen.

    The last partial batch is kept then, unless it is of one image, which has no deviation.

    Args:
        crop: show a part of each image, in other colours; see `changed`.
        balanced: draw images so that each class comes as often, instead of each image once.
    """

    def __init__(
        self, *args: Any, crop: bool = False, balanced: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.crop, self.balanced = crop, balanced
        if (crop or balanced) and len(self.labels) - self.used > 1:
            self.used = len(self.labels)

    def order(self) -> Tensor:
        if not self.balanced:
            return super().order()
        labels = self.labels.cpu()
        share = 1 / labels.bincount().float()[labels]
        return share.multinomial(len(labels), replacement=True, generator=self.generator)

    def changed(self, pixels: Tensor) -> Tensor:
        """Return a part of each image (N, H, W, 3), brighter or darker and in other colours.

        A part has 0.35 to 1 of the area and any place (Szegedy et al. 2015, arXiv:1409.4842).
        """
        if not self.crop:
            return pixels
        count = len(pixels)

        def between(low: float, high: float, *shape: int) -> Tensor:
            drawn = torch.rand(count, *shape, generator=self.generator)
            return (low + (high - low) * drawn).to(pixels.device)

        side = between(0.35, 1).sqrt()
        place = between(-1, 1, 2) * (1 - side)[:, None]
        part = torch.zeros(count, 2, 3, device=pixels.device)
        part[:, 0, 0] = part[:, 1, 1] = side
        part[:, :, 2] = place
        images = pixels.permute(0, 3, 1, 2).float()
        grid = F.affine_grid(part, list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        images *= between(0.8, 1.2, 1, 1, 1) * between(0.9, 1.1, 3, 1, 1)
        return images.clamp_(0, 255).permute(0, 2, 3, 1)


class TorchTrainer:
    """Trains a model of utils.py on this device's images.

    Args:
        threads: without it PyTorch's own number of threads is used.
        notes: a file in which the number is kept for the run that it was chosen for.

    Raises:
        FederationError: no such model, or no usable images in `data_dir`.
    """

    lr = utils.LR

    def __init__(
        self,
        cid: str,
        model: str,
        data_dir: str | Path,
        device: str,
        download: bool = False,
        load_data: Callable[..., utils.ImageSet] = utils.load_data,
        threads: Threads | None = None,
        notes: Path | None = None,
    ) -> None:
        self.cid = cid
        self.model = model
        self.data_dir = data_dir
        self.device = device
        self.load_data = load_data
        find_model(model)
        self.source = source_hash(model)
        # No image at first of data that every device has: this one's part comes with the settings.
        self.labels = np.empty(0, np.int64)  # of all images
        self.data = self._load(self._only_labels, download)
        if not self.data.everywhere:
            self.labels = self.data.labels.numpy()
        self.cut: tuple[str, int, int] | None = None  # which part, see `_cut_of`
        self.testset: utils.ImageSet | None = None  # loaded when a server asks for `evaluate`
        self.testset_cut: tuple[str, int, int] | None = None
        self.classes = self.data.classes
        self.net = utils.build_model(model, len(self.classes))
        self.names = list(self.net.state_dict())
        self.checked_batch_size = 0  # the largest that was found to fit into memory
        self.threads = threads or Threads(str(torch.get_num_threads()))
        self.notes = notes
        self.run_id: str | None = None  # for which the number of threads was chosen

    def describe(self) -> str:
        return f"{self.model} on {self.device}, {len(self.labels):,} {self.data.source}"

    def prepare(self, settings: Settings) -> tuple[int, str]:
        """Keep the images that these settings give to this device; return how many, in words too.

        Raises:
            FederationError: it cannot train with these settings.
        """
        self._cut_data(settings)
        self._check_memory(settings.batch_size)
        kind = self.data.source if self.data.everywhere else "images"
        if len(self.data) == len(self.labels):
            return len(self.data), f"{len(self.data):,} {kind}, all of them"
        part = f"part {self.cid} of {settings.num_partitions}"
        return len(self.data), f"{len(self.data):,} of {len(self.labels):,} {kind} ({part})"

    def get_weights(self) -> dict[str, np.ndarray]:
        return utils.get_weights(self.net)

    def fit(
        self,
        weights: Mapping[str, np.ndarray],
        settings: Settings,
        report: Callable[[int, int, torch.Tensor, float], None] = lambda *_: None,
    ) -> tuple[dict[str, np.ndarray], int, dict[str, Any]]:
        """Train from `weights` on; return the new ones, how many images were used, and metrics."""
        self._cut_data(settings)
        # Another order of images in each round and on each device, the same in a rerun.
        seed = zlib.crc32(f"{settings.seed} {self.cid} {settings.server_round}".encode())
        trainloader = VariedLoader(
            self.data,
            settings.batch_size,
            seed,
            self.device,
            crop=settings.augment == "crop",
            balanced=settings.sampling == "balanced",
        )
        trainloader.net = self.net
        utils.set_weights(self.net, weights)
        self._choose_threads(settings)
        torch.manual_seed(seed)  # for models with dropout
        show = ProgressBar()
        trial = partial(self._try, settings)
        last_step = time.perf_counter()

        def before_step(progress: utils.Progress) -> float | None:
            nonlocal last_step
            show(progress)
            images = progress.step * settings.batch_size
            report(progress.step, progress.steps, progress.loss, images / (progress.seconds or 1))
            seconds = time.perf_counter() - last_step
            if change := self.threads.watch(progress.step > 0, seconds, trial):
                show.print(f"Client {self.cid}: {change}")
                self._note_threads()
            last_step = time.perf_counter()
            return progress.seconds / settings.round_seconds if settings.round_seconds else None

        trained = utils.train(
            self.net, trainloader, settings, self.device, before_step, log=show.print
        )
        metrics = {
            "loss": trained.loss,
            "steps": trained.steps,
            "threads": torch.get_num_threads(),
            "images_per_second": trained.steps * settings.batch_size / trained.seconds,
        }
        return utils.get_weights(self.net), trained.num_examples, metrics

    def evaluate(
        self, weights: Mapping[str, np.ndarray], settings: Settings
    ) -> tuple[float, int, dict[str, Any]]:
        """Return loss, number of images and metrics of `weights` on this device's test images."""
        testset, which = self._test_images(settings)
        utils.set_weights(self.net, weights)
        result = utils.test(self.net, testset, self.device)
        return result.loss, len(testset), {"accuracy": result.accuracy, "images": which}

    def _test_images(self, settings: Settings) -> tuple[utils.ImageSet, str]:
        """Return this device's part of the test images, and which images these are."""
        if self.testset is None or self.testset_cut != self._cut_of(settings):
            try:
                size = utils.image_size(self.model)
                part = partial(self._chosen, settings=settings)
                found = self.load_data(self.data_dir, "test", size, part=part)
            except FederationError as error:
                print(f"Client {self.cid}: evaluates on its training images ({error})")
                self._cut_data(settings)
                return self.data, "training"
            if not found.everywhere:  # then all images were loaded
                found = found.subset(self._chosen(found.labels.numpy(), settings))
            self.testset, self.testset_cut = found, self._cut_of(settings)
        return self.testset, "test"

    def _choose_threads(self, settings: Settings) -> None:
        """Take the number of threads that this run has had here, or the fastest."""
        if not self.threads.auto or self.device != "cpu" or self.run_id == settings.run_id:
            return
        self.run_id = settings.run_id
        noted: dict[str, Any] = {}
        if self.notes and self.run_id:
            with contextlib.suppress(OSError, ValueError):  # there is none, or it is damaged
                noted = json.loads(self.notes.read_text())
        if noted.get("run_id") == self.run_id:
            self.threads.set(noted["threads"], noted["rate"])
            print(f"Client {self.cid}: {noted['threads']} thread(s), as before in this run")
            return
        rates = self.threads.choose(partial(self._try, settings))
        print(f"Client {self.cid}: {self.threads.count} thread(s), the fastest ({rates} steps/s)")
        self._note_threads()

    def _note_threads(self) -> None:
        if self.notes:
            choice = {"threads": self.threads.count, "rate": self.threads.rate}
            with contextlib.suppress(OSError):  # a full disk is no reason to stop
                self.notes.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                write_whole(self.notes, json.dumps({"run_id": self.run_id, **choice}).encode())

    def _try(self, settings: Settings, seconds: float) -> float:
        """Return how many steps a second a training does that leaves no trace."""
        few = 50 * settings.batch_size
        images, labels = self.data.images[:few], self.data.labels[:few]
        loader = utils.TrainLoader(
            replace(self.data, images=images, labels=labels), settings.batch_size
        )
        first_step = 0.0  # which starts threads

        def before_step(progress: utils.Progress) -> float | None:
            nonlocal first_step
            if progress.step == 1:
                first_step = progress.seconds
            return progress.seconds / seconds if progress.step > 1 else None

        with torch.random.fork_rng(devices=[]):
            net = copy.deepcopy(self.net)
            trained = utils.train(net, loader, settings, "cpu", before_step, lambda _: None)
        return max(1, trained.steps - 1) / (trained.seconds - first_step)

    def _cut_of(self, settings: Settings) -> tuple[str, int, int]:
        """Return which part these settings give to this device: scheme, number of parts, seed."""
        scheme = settings.partition
        if parse_partition(scheme)[0] == "auto":
            scheme = "iid" if self.data.everywhere else "none"
        return scheme, settings.num_partitions, settings.seed

    def _cut_data(self, settings: Settings) -> None:
        """Keep this device's part of the training images, and free the others."""
        if self.cut == self._cut_of(settings):
            return
        chosen = self._chosen(self.labels, settings)
        if self.data.everywhere:
            self.data = self._load(lambda labels: chosen)
        else:
            whole = self.data if len(self.data) == len(self.labels) else self._load()
            self.data = whole.subset(chosen) if len(chosen) < len(whole) else whole
        self.cut = self._cut_of(settings)

    def _chosen(self, labels: np.ndarray, settings: Settings) -> np.ndarray:
        """Return which of the images with these labels are this device's."""
        scheme, count, seed = self._cut_of(settings)
        if scheme == "none":
            return np.arange(len(labels))
        if self.cid not in map(str, range(count)):
            raise FederationError(
                f"--cid {self.cid} is none of the server's {count} partitions (0 to {count - 1}); "
                "give each device its own, or start the server with --partition none"
            )
        return partition(labels, count, scheme, seed)[int(self.cid)]

    def _only_labels(self, labels: np.ndarray) -> np.ndarray:
        self.labels = labels
        return labels[:0]

    def _load(self, part: utils.Part | None = None, download: bool = False) -> utils.ImageSet:
        size = utils.image_size(self.model)
        return self.load_data(self.data_dir, "train", size, download=download, part=part)

    def _check_memory(self, batch_size: int) -> None:
        """Warn of training that will swap.

        Raises:
            FederationError: it takes more than RAM and swap have.
        """
        if batch_size <= self.checked_batch_size:  # a device that reconnects has its memory already
            return
        needed = training_bytes(self.net, self.data, batch_size, self.device)
        ram, swap = available_memory()
        problem = (
            f"training {self.model} in batches of {batch_size} takes about {needed / 1e6:,.0f} MB "
            f"more, and this device has {ram / 1e6:,.0f} MB of RAM and {swap / 1e6:,.0f} MB of "
            "swap free"
        )
        advice = "start the server with a smaller --batch_size or another --model"
        if needed > ram + swap:
            raise FederationError(f"{problem}; {advice}, or add swap here")
        if needed > ram:
            print(
                f"Client {self.cid}: warning: {problem}, so it will swap and be slow; {advice}",
                file=sys.stderr,
            )
        self.checked_batch_size = batch_size


def find_model(name: str) -> None:
    """Import a user's own model, "mine:Mine": Mine in mine.py where we run.

    Raises:
        FederationError: there is none, or it is no model.
    """
    if ":" not in name:
        return
    module, _, class_name = name.partition(":")
    found = load_class("--model", module, class_name)
    is_other = isinstance(found, type) and not issubclass(found, torch.nn.Module)
    if is_other or not callable(found):
        raise FederationError(f"--model {name}: {class_name} is no subclass of torch.nn.Module")
    try:
        inspect.signature(found).bind(10)
    except TypeError as error:
        raise FederationError(
            f"--model {name}: {class_name}(num_classes) cannot be made ({error}); give its "
            "__init__ the number of classes as its only argument"
        ) from None


def code_of(model: str) -> str:
    """Return the files of the code that trains, in words."""
    return f"utils.py or {model.partition(':')[0]}.py" if ":" in model else "utils.py"


def source_hash(model: str) -> str:
    """Return the SHA-256 of the code that trains: utils.py, and a user's own model's file."""
    digest = hashlib.sha256(Path(utils.__file__).read_bytes())
    if ":" in model:
        module = sys.modules[model.partition(":")[0]]
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()


def load_decoded(
    cache: Path,
    data_dir: str | Path,
    split: str,
    image_size: int,
    *,
    download: bool = False,
    part: utils.Part | None = None,
) -> utils.ImageSet:
    """Do as utils.load_data does, from what an earlier process decoded, if there is that.

    Under Flower's engine each message may be answered by a new process. The pixels are mapped,
    not read: processes share them, and each holds only its part in its own memory.
    """
    if str(data_dir).startswith("synthetic"):
        return utils.load_data(data_dir, split, image_size, part=part)

    def files() -> tuple[Path, Path]:
        # A folder's time changes when an image comes, goes or is replaced; to look at each of
        # 50,000 images takes a second, for each message.
        folders = [
            *Path(data_dir).glob(f"{split}/*"),
            *Path(data_dir).glob(f"{utils.CIFAR10_FOLDER}/*"),
        ]
        stats = [(str(path), path.stat().st_mtime_ns) for path in sorted(folders)]
        key = hashlib.sha256(repr((split, image_size, stats)).encode()).hexdigest()[:16]
        return cache / f"{key}.npy", cache / f"{key}.json"

    pixels, rest = files()
    if not rest.exists():
        data = utils.load_data(data_dir, split, image_size, download=download)
        pixels, rest = files()  # they may have been downloaded
        cache.mkdir(parents=True, exist_ok=True)
        new = pixels.with_suffix(f".{os.getpid()}.npy")
        np.save(new, data.images.permute(0, 2, 3, 1).contiguous().numpy())
        new.replace(pixels)
        noted = (data.labels.tolist(), data.classes, data.source, data.everywhere)
        write_whole(rest, json.dumps(noted).encode())
    labels, classes, source, everywhere = json.loads(rest.read_bytes())
    mapped = torch.from_numpy(np.load(pixels, mmap_mode="c", allow_pickle=False))
    data = utils.ImageSet(
        mapped.permute(0, 3, 1, 2), torch.tensor(labels), classes, source, everywhere
    )
    return data.subset(part(data.labels.numpy())) if part and everywhere else data


class ProgressBar:
    """A line on a terminal that shows the progress of the training; nothing elsewhere."""

    def __init__(self) -> None:
        self.shown = 0.0
        self.on_terminal = sys.stdout.isatty()

    def __call__(self, progress: utils.Progress) -> None:
        if self.on_terminal and progress.seconds - self.shown > 0.3:
            self.shown = progress.seconds
            line = f"{progress.step}/{progress.steps} batches  loss {progress.loss:.3f}"
            print(f"\r{line}\033[K", end="", flush=True)

    def print(self, line: str) -> None:
        """Print a whole line in place of the bar."""
        print(f"\r\033[K{line}" if self.on_terminal else line)


def choose_device(wanted: str) -> str:
    """Return "cpu" or "cuda" for --device.

    A GPU counts once it has multiplied two matrices: a torch that was built for other GPUs
    reports it as available all the same, and fails at the first kernel.
    """
    if wanted == "cpu":
        return "cpu"
    problem = "torch finds no CUDA GPU here"
    if torch.cuda.is_available():
        try:
            ones = torch.ones(64, 64, device="cuda")
            if (ones @ ones == 64).all().item():
                return "cuda"
            problem = "the GPU multiplies wrongly"
        except RuntimeError as error:
            problem = f"the GPU fails at a matrix product ({str(error).splitlines()[0]})"
    if wanted == "cuda":
        raise FederationError(f"--device cuda: {problem}; choose auto or cpu")
    # Where nobody expects a GPU there is nothing to report; NVIDIA's images set this variable.
    if torch.cuda.is_available() or os.environ.get("NVIDIA_VISIBLE_DEVICES"):
        print(f"{problem}; training on the CPU")
    return "cpu"


def training_bytes(
    net: torch.nn.Module, data: utils.ImageSet, batch_size: int, device: str = "cpu"
) -> int:
    """Estimate the memory that a device's first round of training takes beyond the present.

    What autograd saves for the backward pass is counted for two images; it grows with the batch.
    Three factors are fitted to peaks of `client.py` on x86-64 (not measured on Arm): ACTIVATIONS
    covers gradients and workspaces beside what is saved, WEIGHTS the flattened weights, gradients,
    velocities and the weights received and sent, REST the code and buffers of the first step.
    With batches of 32, the estimate and the real increase of the resident memory were, in MB:
    Net 24 and 12, PiNet 25 and 13, ResNet18 484 and 463.
    """
    net.to(device).train()
    buffers = [b.clone() for b in net.buffers()]  # BatchNorm's statistics, which the pass moves
    images = utils.normalise(data.images[:2].to(device))
    own = {_storage(t)[0] for t in net.state_dict().values()}
    saved: dict[int, int] = {}

    def count(t: torch.Tensor) -> torch.Tensor:
        address, size = _storage(t)
        if address not in own:
            saved[address] = size
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        output = net(images)
    activations = sum(saved.values()) * batch_size / len(images)
    del output  # the graph kept the storages alive, so that no two had one address
    for buffer, before in zip(net.buffers(), buffers):
        buffer.copy_(before)
    weights = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    return int(WEIGHTS * weights + ACTIVATIONS * activations + REST)


def _storage(t: torch.Tensor) -> tuple[int, int]:
    """Return address and bytes of a tensor's memory, which several tensors may share."""
    if hasattr(t, "untyped_storage"):
        return t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
    storage = t.storage()  # before torch 2.0
    return storage.data_ptr(), storage.size() * storage.element_size()


def self_test(model: str, wanted: str) -> None:
    """Train `model` for some steps on synthetic images, and show what this device is and can do.

    Raises:
        FederationError: no such model, or training on the GPU gives other numbers than on the CPU.
    """
    board = describe_board()
    ram, swap = available_memory()
    print(f"{board['board']}, {board['machine']}, {board['cores']} cores, {board['software']}")
    print(f"{ram / 1e6:,.0f} MB of RAM and {swap / 1e6:,.0f} MB of swap are free")
    device = choose_device(wanted)
    settings = Settings(lr=utils.LR, lr_end=utils.LR, epochs=2)
    losses = {}
    for processor in dict.fromkeys(["cpu", device]):
        data = utils.load_data("synthetic:320", "train", utils.image_size(model))
        net = utils.build_model(model, len(data.classes))
        loader = utils.TrainLoader(data, settings.batch_size, device=processor)
        trained = utils.train(net, loader, settings, processor, log=lambda line: None)
        losses[processor] = trained.loss
        rate = trained.steps * settings.batch_size / trained.seconds
        print(f"{model} on {processor}: loss {trained.loss:.3f}, {rate:,.0f} images/s")
    measured = Telemetry().measure()
    print(", ".join(f"{name} {value}" for name, value in measured.items() if value != ""))
    if not abs(losses[device] - losses["cpu"]) < 0.1:
        raise FederationError(
            f"training on {device} ends at loss {losses[device]:.3f}, on the CPU at "
            f"{losses['cpu']:.3f}; use --device cpu"
        )
    print(f"training works here, on {device}")
