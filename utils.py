"""Models, data and local training: the file to edit when you try an idea.

A new model is one class and one line in MODELS; server and devices then find it by
its name. To fetch CIFAR-10 ahead of a run, and to see what each model weighs:

    python utils.py --data_dir data
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import hashlib
import importlib
import os
import pickle
import re
import sys
import tarfile
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from federated.errors import FederationError
from resnet import ResNet18

if TYPE_CHECKING:
    from federated.settings import Settings

IMAGE_SIZE = 32  # pixels a side; a model that wants more has an attribute `image_size`

# CIFAR-10's mean and deviation per channel, of pixels in 0..1, for all images on all devices:
# they must normalise alike, and the statistics of a device's images stay there.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
LR = 0.02  # at the start of a run; falls to 0 over it
Part = Callable[[np.ndarray], np.ndarray]  # from all labels to the indices of some images


class DownloadError(FederationError):
    """CIFAR-10 could not be downloaded."""


# --- Models ---------------------------------------------------------------------------


class Net(nn.Module):
    """LeNet-like CNN of 62,006 parameters, the one of PyTorch's 60-minute blitz."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)
        # PyTorch's own start is 2.4 times smaller than He et al. 2015 (arXiv:1502.01852) derive
        # for ReLUs. In the first layer theirs saves 100 of the 950 steps to 50 % on CIFAR-10; in
        # all of them devices drift apart, and the average of two loses 1.4 points.
        nn.init.kaiming_uniform_(self.conv1.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        # Pool, then ReLU: the same function as the blitz's ReLU, then pool, on a quarter of
        # the numbers (a step takes 0.9 of the time).
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class PiNet(nn.Module):
    """Small CNN for a Raspberry Pi: 58,202 parameters, 1.6 million multiplications an image.

    Three rounds of ./run_local.sh: about 67 % (Net: 58 %), for 1.2 times Net's seconds.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        # Stride 2 at once: most of Net's time goes into its first layer at full size. From
        # 16 channels up, in multiples of 8, vector units are full; Net's 6 leave half empty.
        self.conv1 = nn.Conv2d(3, 16, 6, stride=2, padding=2)
        self.conv2 = nn.Conv2d(16, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.fc = nn.Linear(64 * 4 * 4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.conv3(x))
        x = F.adaptive_avg_pool2d(x, 4)  # 4x4 already if the image is 32x32; fits any size
        return self.fc(x.flatten(1))


MODELS: dict[str, Callable[[int], nn.Module]] = {"Net": Net, "PiNet": PiNet, "ResNet18": ResNet18}


def build_model(name: str, num_classes: int = 10, seed: int = 0) -> nn.Module:
    """Return the model `name` with random weights drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _named_model(name)(num_classes)


def image_size(name: str) -> int:
    """Return how many pixels a side the model `name` wants its images to have."""
    return getattr(_named_model(name), "image_size", IMAGE_SIZE)


def _named_model(name: str) -> Callable[[int], nn.Module]:
    module, colon, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute) if colon else MODELS[name]
    except (ImportError, AttributeError, KeyError, ValueError) as error:
        why = f" ({error})" if colon else f"; utils.MODELS has {', '.join(MODELS)}"
        raise FederationError(f"no model '{name}'{why}") from None


def learned(net: nn.Module) -> dict[str, Tensor]:
    """Return what training changes: buffers, and all parameters but those without a gradient."""
    still = {name for name, p in net.named_parameters() if not p.requires_grad}
    return {name: value for name, value in net.state_dict().items() if name not in still}


def get_weights(net: nn.Module) -> dict[str, np.ndarray]:
    """Return copies of what learns, by name, in the order of `state_dict()`."""
    return {name: value.cpu().numpy().copy() for name, value in learned(net).items()}


def set_weights(net: nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Load what `get_weights` returned; raise FederationError if it is of another model."""
    state = learned(net)
    if odd := sorted(state.keys() ^ weights.keys()):
        raise FederationError(
            f"{len(weights)} arrays for a model that has {len(state)}; {odd[0]} is in only one"
        )
    for name, value in state.items():
        array = weights[name]
        if tuple(value.shape) != array.shape:
            raise FederationError(
                f"{name} has shape {tuple(value.shape)}, not {array.shape}; start server and "
                "devices with the same --model"
            )
        # torch warns of read-only memory, which it only reads.
        value.copy_(torch.from_numpy(np.require(array, requirements="W")))


# --- Data -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageSet:
    """Images in memory as they come from the disk: 8 bits a channel, not normalised."""

    images: Tensor  # uint8, (N, 3, H, W); channels-last in memory, the quickest to pick from
    labels: Tensor  # int64, (N,)
    classes: list[str]
    source: str  # "CIFAR-10 images", "images in /data", "synthetic images"
    everywhere: bool = False  # whether every device has the same images, in full

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray) -> ImageSet:
        """Return the images at `indices` as a set of its own (a copy)."""
        chosen = torch.from_numpy(indices)
        images = self.images.permute(0, 2, 3, 1)[chosen].permute(0, 3, 1, 2)
        return replace(self, images=images, labels=self.labels[chosen])


def load_data(
    data_dir: str | Path,
    split: str,
    image_size: int = IMAGE_SIZE,
    *,
    download: bool = False,
    part: Part | None = None,
) -> ImageSet:
    """Load the `train` or `test` images of `data_dir`, resized to `image_size` pixels.

    `data_dir` is a folder with `train/<class>/*` and `test/<class>/*`, or one that holds
    CIFAR-10 in `cifar-10-batches-py`; with `download` CIFAR-10 is fetched into it first.
    "synthetic" (or "synthetic:2000", with 2,000 training images) needs no folder at all.

    Args:
        part: which images of CIFAR-10 or "synthetic" to load; of a folder all are.

    Raises:
        FederationError: nothing usable is there.
        DownloadError: CIFAR-10 is not there and could not be downloaded.
    """
    if str(data_dir).split(":")[0] == "synthetic":
        return _synthetic(str(data_dir), split, image_size, part)
    data_dir = Path(data_dir).expanduser()
    if (data_dir / "train").is_dir() or (data_dir / "test").is_dir():
        return _image_folder(data_dir, split, image_size)
    if image_size != IMAGE_SIZE:
        raise FederationError(
            f"CIFAR-10 has 32x32 images, the model wants {image_size}x{image_size}; "
            "choose another --model or a --data_dir with your own images"
        )
    if download:
        with _one_at_a_time(data_dir):
            try:
                return _cifar10(data_dir, split, part)
            except FederationError:  # not there, or damaged
                _fetch_cifar10(data_dir)
    return _cifar10(data_dir, split, part)


CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_FOLDER = "cifar-10-batches-py"
CIFAR10_MD5 = {
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}


def _cifar10(data_dir: Path, split: str, part: Part | None) -> ImageSet:
    if not (folder := data_dir / CIFAR10_FOLDER).is_dir():
        raise FederationError(f"data directory '{data_dir}' {_what_is_wrong(data_dir)}")
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    labels = [np.array(_unpickle(folder / name)["labels"]) for name in names]
    chosen = part(np.concatenate(labels)) if part else np.arange(sum(map(len, labels)))
    images = np.empty((len(chosen), 32, 32, 3), np.uint8).transpose(0, 3, 1, 2)
    ends = np.cumsum([len(batch) for batch in labels])
    for name, end, batch in zip(names, ends, labels):  # one file at a time in memory
        here = (end - len(batch) <= chosen) & (chosen < end)
        if here.any():
            pixels = _unpickle(folder / name)["data"].reshape(-1, 3, 32, 32)
            images[here] = pixels[chosen[here] - end]
    classes = _unpickle(folder / "batches.meta")["label_names"]
    kept = torch.from_numpy(np.concatenate(labels)[chosen])
    return ImageSet(torch.from_numpy(images), kept, classes, "CIFAR-10 images", everywhere=True)


def _what_is_wrong(data_dir: Path) -> str:
    if data_dir.is_dir() and (found := _found(data_dir)):
        deeper = [f"; is it --data_dir {path.parent}?" for path in data_dir.glob("*/train")]
        return f"needs train/<class>/* and test/<class>/*, and has {found}{''.join(deeper[:1])}"
    kind = "empty" if data_dir.is_dir() else "not a directory"
    what = f"is {kind}" if data_dir.exists() else "does not exist"
    todo = "put your images there, or fetch CIFAR-10 with: python utils.py --data_dir"
    return f"{what}; {todo} {data_dir}"


def _found(folder: Path, count: int = 3) -> str:
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir() if p.name[0] != ".")
    return ", ".join(names[:count]) + ", …" * (len(names) > count)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings and NumPy arrays; a pickle could run any program."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.empty(0).__reduce__()[0]  # today's name of that function
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not in CIFAR-10's files")


def _unpickle(path: Path) -> dict[str, Any]:
    if not _is_whole(path):
        where = path.parent.parent
        raise FederationError(
            f"CIFAR-10 in '{where}' is damaged or incomplete; fetch it again with: "
            f"python utils.py --data_dir {where}"
        )
    with path.open("rb") as file:
        return _ArrayUnpickler(file, encoding="latin1").load()  # written by Python 2


def _is_whole(path: Path) -> bool:
    if not path.is_file():
        return False
    digest = hashlib.md5()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == CIFAR10_MD5[path.name]


def _fetch_cifar10(data_dir: Path) -> None:
    """Download the archive, unless it is there whole, and unpack it."""
    archive = data_dir / CIFAR10_URL.rpartition("/")[2]
    try:
        if not _is_whole(archive):
            _download(CIFAR10_URL, archive)
        with tarfile.open(archive) as tar:
            for name in CIFAR10_MD5.keys() - {archive.name}:  # Python 3.11.2 has no filter="data"
                tar.extract(f"{CIFAR10_FOLDER}/{name}", data_dir)
    except (OSError, KeyError, tarfile.TarError) as error:
        raise FederationError(f"cannot unpack '{archive}': {error}; it takes 180 MB") from error


def _download(url: str, path: Path) -> None:
    """Download `url`, and remove what is only a part of it or has a wrong MD5 sum."""
    try:
        # Without a time-out a server that falls silent would be waited for without end.
        with urllib.request.urlopen(url, timeout=30) as response, path.open("wb") as file:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                if sys.stderr.isatty():
                    print(f"\r{file.tell() / 1e6:.0f} MB\033[K", end="\r", file=sys.stderr)
        if not _is_whole(path):
            raise OSError("what came is incomplete or altered (wrong MD5 sum)")
    except (OSError, HTTPException) as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise FederationError(f"cannot write '{path}': {error}; it takes 350 MB") from error
        raise DownloadError(
            f"cannot download CIFAR-10 from {url} into '{path.parent}': "
            f"{getattr(error, 'reason', error)}; check the Internet connection, or use your own "
            "images or --data_dir synthetic"
        ) from error


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process at a time fill `folder`, which is removed if nothing came into it."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise FederationError(
            f"cannot make data directory '{folder}': {error.strerror}; choose another --data_dir"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
        for path in made:
            with contextlib.suppress(OSError):  # something came into it
                path.rmdir()


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def _image_folder(data_dir: Path, split: str, image_size: int) -> ImageSet:
    classes = class_names(data_dir, split)
    found = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((data_dir / split / name).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    ]
    if not found:
        raise FederationError(
            f"no images in '{data_dir / split}'; put some into {split}/<class>/ "
            f"({' '.join(sorted(IMAGE_SUFFIXES))})"
        )
    paths, labels = map(list, zip(*found))
    images = np.empty((len(paths), image_size, image_size, 3), np.uint8).transpose(0, 3, 1, 2)
    broken: dict[int, str] = {}

    def decode(first: int) -> None:
        for i in range(first, min(first + 8, len(paths))):
            try:
                images[i] = _decode(paths[i], image_size)
            except Exception as error:  # a broken file can raise nearly anything
                broken[i] = str(error)

    # Pillow decodes without the GIL: two cores read photos twice as fast as one (tiny images in
    # eights no slower). Four threads at most: each may hold a photo of 36 MB (12 megapixels).
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(decode, range(0, len(paths), 8)))

    for i in sorted(broken)[:10]:
        print(f"broken image skipped: {paths[i]}: {broken[i]}", file=sys.stderr)
    if len(broken) == len(paths):
        raise FederationError(
            f"all {len(paths)} images in '{data_dir / split}' are broken; replace them"
        )
    if broken:
        print(f"{len(broken)} of {len(paths)} images are broken and skipped", file=sys.stderr)
        good = [i for i in range(len(paths)) if i not in broken]
        for new, old in enumerate(good):  # in place: a Raspberry Pi may not hold a second copy
            images[new] = images[old]
        images, labels = images[: len(good)], [labels[i] for i in good]
    source = f"images in {data_dir}"
    return ImageSet(torch.from_numpy(images), torch.tensor(labels), classes, source)


def _decode(path: Path, image_size: int) -> np.ndarray:
    """Return the image as the camera held it, squeezed into (3, image_size, image_size)."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image: Image.Image = Image.open(path)
    except UnidentifiedImageError:
        raise ValueError("not an image that Pillow can read") from None
    with image:
        # JPEG halves, quarters or eighths a photo while it decodes it: three times as fast.
        image.draft(None, (2 * image_size, 2 * image_size))
        if image.mode.startswith("I"):  # 16 bits, which convert() would clip to white
            image = image.convert("I").point(lambda value: value / 256)
        elif image.mode == "P":  # a palette; RGB straight away would warn of transparency
            image = image.convert("RGBA")
        image = image.convert("RGB")
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), reducing_gap=2.0)
    if "exif" in image.info:  # a phone notes which way is up
        image = ImageOps.exif_transpose(image)
    return np.asarray(image).transpose(2, 0, 1)


def class_names(data_dir: Path, split: str) -> list[str]:
    """Return the class folders of `split`, sorted, once those of train and test agree."""
    folders = {
        part: sorted(e.name for e in (data_dir / part).iterdir() if e.is_dir() and e.name[0] != ".")
        for part in ("train", "test")
        if (data_dir / part).is_dir()
    }
    if split not in folders:
        raise FederationError(f"'{data_dir}' has no folder {split}/ with a folder per class")
    if len(folders[split]) < 2:
        found = f"{len(folders[split])} class folder(s) ({_found(data_dir / split) or 'none'})"
        raise FederationError(
            f"'{data_dir / split}' has {found}; at least 2 are needed, as {split}/<class>/*"
        )
    if len(folders) == 2 and folders["train"] != folders["test"]:
        odd = sorted(set(folders["train"]) ^ set(folders["test"]))
        raise FederationError(
            f"the classes in '{data_dir}' differ between train/ and test/: "
            f"{', '.join(odd)} in only one of them"
        )
    return folders[split]


def _synthetic(name: str, split: str, image_size: int, part: Part | None) -> ImageSet:
    """Make noisy, shifted colour patterns of CIFAR-10's shape, the same on every machine.

    "synthetic" has CIFAR-10's 50,000 and 10,000 images, "synthetic:N" N and N // 5. Each class
    has two patterns, and an image shows between nothing and 5/16 of one of them.
    """
    if not (match := re.fullmatch(r"synthetic(?::([1-9]\d*))?", name)):
        raise FederationError(f"no data set '{name}'; choose synthetic or synthetic:2000")
    size = int(match[1] or 50_000) if split == "train" else max(1, int(match[1] or 50_000) // 5)
    patterns = np.random.default_rng(1).integers(0, 256, (10, 2, 3, 4, 4), np.uint8)
    patterns = patterns.repeat(8, axis=3).repeat(8, axis=4)
    shifted = np.array([[np.roll(patterns, (y, x), (3, 4)) for x in range(8)] for y in range(8)])
    rng = np.random.default_rng([0, split == "test"])
    labels, kinds = rng.integers(0, 10, size), rng.integers(0, 2, size)
    shifts, shown = rng.integers(0, 8, (2, size)), rng.integers(0, 6, (size, 1, 1, 1), np.uint16)
    chosen = part(labels) if part else np.arange(size)
    images = np.empty((len(chosen), 32, 32, 3), np.uint8).transpose(0, 3, 1, 2)
    for start in range(0, size if len(chosen) else 0, 1000):  # 1000 at a time, for memory's sake
        s = slice(start, start + 1000)
        pattern = shifted[shifts[0, s], shifts[1, s], labels[s], kinds[s]]
        noise = rng.integers(0, 256, pattern.shape, np.uint8)
        here = (start <= chosen) & (chosen < start + 1000)
        images[here] = ((noise * (16 - shown[s]) + pattern * shown[s]) // 16)[chosen[here] - start]
    tensor = torch.from_numpy(images)
    tensor = tensor if image_size == 32 else F.interpolate(tensor, (image_size, image_size))
    classes, kept = [f"pattern {i}" for i in range(10)], torch.from_numpy(labels[chosen])
    return ImageSet(tensor, kept, classes, "synthetic images", everywhere=True)


# --- Batches, training, evaluation ----------------------------------------------------


def normalise(images: Tensor, net: nn.Module | None = None) -> Tensor:
    """Turn uint8 images (N, 3, H, W) into floats with mean 0 and deviation 1 a channel.

    These are the model's, if it has a `mean` and `std`. The result lies channels-last in memory,
    as the pixels do: nothing is moved, and a step of Net takes 0.85 of the time.
    """
    pixels = images.permute(0, 2, 3, 1)
    rows, width = pixels.flatten(2), images.shape[3]  # (N, H, W * 3)
    # Whole rows against a row of means: broadcasting 3 numbers takes 2.5 times as long.
    own = torch.tensor([getattr(net, "mean", MEAN), getattr(net, "std", STD)]).to(images.device)
    mean, scale = own[0].repeat(width) * 255, 1 / (own[1].repeat(width) * 255)
    return rows.float().sub_(mean).mul_(scale).view(pixels.shape).permute(0, 3, 1, 2)


class TrainLoader:
    """Shuffled batches of normalised floats, each image flipped left-right by a coin.

    Like a DataLoader with RandomHorizontalFlip and Normalize, but for several batches at once.
    The last partial batch is dropped, unless it is the only one.
    """

    def __init__(
        self, data: ImageSet, batch_size: int, seed: int = 0, device: str = "cpu", flip: bool = True
    ) -> None:
        self.net: nn.Module | None = None  # whose mean and deviation it normalises by
        self.pixels = data.images.permute(0, 2, 3, 1).contiguous().to(device)  # (N, H, W, 3)
        self.labels = data.labels.to(device)
        self.batch_size = min(batch_size, len(data))
        self.flip = flip
        self.used = len(data) // self.batch_size * self.batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-self.used // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.order()
        coins = torch.rand(len(self.labels), generator=self.generator) < 0.5
        # Blocks of about 1 MB still lie in the processor's cache when the step reads them.
        block = self.batch_size * max(1, 2**20 // self.pixels[: self.batch_size].numel())
        for chosen, coin in zip(order[: self.used].split(block), coins[: self.used].split(block)):
            chosen = chosen.to(self.pixels.device)
            pixels = self.changed(self.pixels.index_select(0, chosen))
            if self.flip:
                mirrored = coin.nonzero().squeeze(1).to(pixels.device)
                pixels.index_copy_(0, mirrored, pixels.index_select(0, mirrored).flip(2))
            images = normalise(pixels.permute(0, 3, 1, 2), self.net).split(self.batch_size)
            yield from zip(images, self.labels[chosen].split(self.batch_size))

    def order(self) -> Tensor:
        """Return which images come when, (N,): each once, in random order."""
        return torch.randperm(len(self.labels), generator=self.generator)

    def changed(self, pixels: Tensor) -> Tensor:
        """Return images (N, H, W, 3) as they are trained on, before some are mirrored."""
        return pixels


class SGD:
    """Nesterov SGD; the same numbers as torch.optim.SGD(nesterov=True), at a lower price.

    The first optimizer of torch.optim imports torch._dynamo and SymPy: 867 modules, 106 MB and
    1.0 to 1.5 s on x86-64 (torch 2.9.1); a step of Net then takes 1.10 of the processor time.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], momentum: float, decay: float = 0.0):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.velocities = [torch.zeros_like(p) for p in self.parameters]
        self.momentum, self.decay = momentum, decay

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move the weights w with velocity v: v = mu v + grad, w -= lr (grad + mu v)."""
        triples = zip(self.parameters, self.velocities, [p.grad for p in self.parameters])
        weights, velocities, gradients = map(list, zip(*[t for t in triples if t[2] is not None]))
        if self.decay:
            torch._foreach_add_(gradients, weights, alpha=self.decay)
        torch._foreach_mul_(velocities, self.momentum)
        torch._foreach_add_(velocities, gradients)
        torch._foreach_add_(gradients, velocities, alpha=self.momentum)
        torch._foreach_add_(weights, gradients, alpha=-lr)


class Progress(NamedTuple):
    """How far a training is, before each of its steps."""

    step: int  # how many are done
    steps: int  # how many there are in all epochs
    epoch: int  # from 0 on
    loss: Tensor  # of the step before, a scalar; reading it waits for a GPU
    seconds: float  # since the training began


@dataclass(frozen=True)
class Training:
    """What local training did."""

    loss: float  # mean over the last epoch, or what was done of it
    num_examples: int  # different images used
    steps: int
    seconds: float


def train(
    net: nn.Module,
    trainloader: TrainLoader,
    settings: Settings,
    device: str = "cpu",
    before_step: Callable[[Progress], float | None] | None = None,
    log: Callable[[str], None] = print,
) -> Training:
    """Train `net` in place with Nesterov SGD.

    Args:
        settings: the learning rate goes linearly from `lr` to `lr_end` over all steps of this call
            (the server changes both in each round); `proximal_mu` is the weight of FedProx's term
            mu/2 * ||w - w_global||^2, w_global being the weights that came in (arXiv:1812.06127).
        before_step: called before each step. It may return which part of the work counts as
            done, by time for example: the learning rate then follows that, if it is ahead of
            the steps, and 1.0 or more ends the training after one step at least.
    """
    net.to(device).train()
    optimizer = SGD(net.parameters(), settings.momentum, settings.weight_decay)
    mu = settings.proximal_mu
    global_weights = [p.detach().clone() for p in net.parameters()] if mu else []
    batches = len(trainloader)
    step, steps = 0, settings.epochs * batches
    loss = total_loss = torch.zeros((), device=device)
    log(f"Training {settings.epochs} epoch(s) w/ {batches} batches each")
    began = time.perf_counter()
    for epoch in range(settings.epochs):
        start = time.perf_counter()
        for batch, (images, labels) in enumerate(trainloader):
            done = step / steps
            if before_step:
                now = Progress(step, steps, epoch, loss, time.perf_counter() - began)
                done = max(done, before_step(now) or 0.0)
                if step and done >= 1:
                    break
            if batch == 0:
                total_loss = torch.zeros((), device=device)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels, label_smoothing=settings.label_smoothing)
            loss.backward()
            if mu:  # the gradient of FedProx's term, written out
                for p, w in zip(net.parameters(), global_weights):
                    if p.grad is not None:
                        p.grad.add_(p.detach() - w, alpha=mu)
            optimizer.step(settings.lr + (settings.lr_end - settings.lr) * min(done, 1.0))
            loss = loss.detach()
            total_loss += loss
            step += 1
        else:
            log(f"Epoch took: {time.perf_counter() - start:.2f} seconds")
            continue
        log(f"Stopped after {step} of {steps} batches")
        break
    return Training(
        loss=float(total_loss) / (step % batches or batches),
        num_examples=min(step * trainloader.batch_size, trainloader.used),
        steps=step,
        seconds=time.perf_counter() - began,
    )


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy and accuracy (0 to 1); NaN for a class without images."""

    loss: float
    accuracy: float
    class_loss: list[float]
    class_accuracy: list[float]


@torch.inference_mode()
def test(net: nn.Module, data: ImageSet, device: str = "cpu", batch_size: int = 100) -> Evaluation:
    """Evaluate `net` on all of `data`; with ResNet18 each image of a batch takes 1 MB."""
    net.to(device).eval()
    losses, correct = [], []
    for images, labels in zip(data.images.split(batch_size), data.labels.split(batch_size)):
        scores = net(normalise(images.to(device), net))
        labels = labels.to(device)
        losses.append(F.cross_entropy(scores, labels, reduction="none").cpu())
        correct.append((scores.argmax(1) == labels).float().cpu())
    loss, hit = torch.cat(losses).double(), torch.cat(correct).double()
    masks = [data.labels == c for c in range(len(data.classes))]
    by_class = [[values[mask].mean().item() for mask in masks] for values in (loss, hit)]
    return Evaluation(loss.mean().item(), hit.mean().item(), *by_class)


def main() -> None:
    parser = argparse.ArgumentParser(description="fetch CIFAR-10, list the data and the models")
    text = "where to, or train/<class>/* and test/<class>/* (default: data)"
    parser.add_argument("--data_dir", "--data-dir", default="data", help=text)
    args = parser.parse_args()
    # A device may have only images to train on, the server only some to test on.
    folders = [split for split in ("train", "test") if Path(args.data_dir, split).is_dir()]
    try:
        for split in folders or ["train", "test"]:
            data = load_data(args.data_dir, split, download=True)
            print(f"{data.source}: {len(data):,} {split} images of {len(data.classes)} classes")
    except FederationError as error:
        print(f"utils.py: {error}", file=sys.stderr)
        sys.exit(3 if isinstance(error, DownloadError) else 1)
    for name in MODELS:
        weights = get_weights(build_model(name, len(data.classes))).values()
        numbers, size = sum(w.size for w in weights), sum(w.nbytes for w in weights)
        print(f"{name}: {numbers:,} numbers, {size:,} bytes")


if __name__ == "__main__":
    main()
