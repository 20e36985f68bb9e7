"""Models, data and local training: the file to edit when you try an idea.

A new model is one class and one line in MODELS; server and devices then find it by
its name. To fetch CIFAR-10 ahead of a run, and to see what each model weighs:

    python utils.py --data_dir data
"""

import argparse
import contextlib
import importlib
import io
import math
import os
import re
import socket
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_SIZE = 32  # pixels a side; a model that wants more has an attribute `image_size`

# CIFAR-10's mean and standard deviation per channel, of pixels in 0..1. Constants,
# because every device must normalise alike and none may tell its own statistics.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


LR = 0.02  # at the start of a run; falls to 0 over it


class TaskError(Exception):
    """A model, a data set or a setting that cannot work; the message says what to do."""


class DownloadError(TaskError):
    """CIFAR-10 could not be downloaded."""


# --- Models ---------------------------------------------------------------------------


class PairedConv2d(nn.Conv2d):
    """Conv2d for few output channels (square kernel, no stride, no padding).

    It computes two neighbouring columns at once, as twice the channels, because AVX-512 takes
    16 numbers at a time and Net's first layer has 6. Same weights, same function: there a step
    of Net takes 0.93 of the time (not measured on Arm).
    """

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        (size, _), channels = self.kernel_size, self.out_channels
        if (width - size) % 2 == 0:  # an odd number of columns
            return super().forward(x)
        pair = torch.cat([F.pad(self.weight, (0, 1)), F.pad(self.weight, (1, 0))])
        assert self.bias is not None
        y = F.conv2d(x, pair, self.bias.repeat(2), stride=(1, 2))
        y = y.permute(0, 2, 3, 1).reshape(n, height - size + 1, width - size + 1, channels)
        return y.permute(0, 3, 1, 2)  # channels-last, as it lies in memory


class Net(nn.Module):
    """LeNet-like CNN of 62,006 parameters, the one of PyTorch's 60-minute blitz."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = PairedConv2d(3, 6, 5)
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
        x = x.flatten(1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class PiNet(nn.Module):
    """Small CNN for a Raspberry Pi: 58,202 parameters, 1.6 million multiplications an image.

    After three rounds of two devices (one epoch each, half of CIFAR-10, LR) it is right on
    67.7 % of the test images and Net on 58.5 % (means of 3 seeds), for 1.2 times Net's
    seconds per epoch.
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


def resnet18(num_classes: int = 10) -> nn.Module:
    """torchvision's ResNet18 for small images: 3x3 stride-1 stem, no max-pool.

    GroupNorm stands in for BatchNorm, whose running statistics are each device's own:
    their average describes no device when the data differ from one to the next
    (Hsieh et al. 2020, arXiv:1910.00189).
    """
    with _compiler_on_demand():
        import torchvision

    net = torchvision.models.resnet18(
        num_classes=num_classes, norm_layer=lambda channels: nn.GroupNorm(32, channels)
    )
    net.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "Net": Net,
    "PiNet": PiNet,
    "ResNet18": resnet18,
}


def build_model(name: str, num_classes: int = 10, seed: int = 0) -> nn.Module:
    """Return the model `name` with random weights drawn from `seed`."""
    if name not in MODELS:
        raise TaskError(f"no model '{name}'; utils.MODELS has {', '.join(MODELS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](num_classes)


def image_size(name: str) -> int:
    """Return how many pixels a side the model `name` wants its images to have."""
    if name not in MODELS:
        raise TaskError(f"no model '{name}'; utils.MODELS has {', '.join(MODELS)}")
    return getattr(MODELS[name], "image_size", IMAGE_SIZE)


def get_weights(net: nn.Module) -> list[np.ndarray]:
    """Return copies of all parameters and buffers, in the order of `state_dict()`."""
    return [value.detach().cpu().numpy().copy() for value in net.state_dict().values()]


def set_weights(net: nn.Module, weights: Sequence[np.ndarray]) -> None:
    """Load what `get_weights` returned.

    Raises:
        TaskError: the number of arrays or the shape of one is not this model's.
    """
    state = net.state_dict()
    if len(weights) != len(state):
        raise TaskError(f"{len(weights)} arrays for a model that has {len(state)}")
    for (name, value), array in zip(state.items(), weights, strict=True):
        if tuple(value.shape) != array.shape:
            raise TaskError(f"{name} has shape {tuple(value.shape)}, not {array.shape}")
        if not array.flags.writeable:  # torch warns of read-only memory that it only reads
            array = array.copy()
        value.copy_(torch.from_numpy(array))


@contextlib.contextmanager
def _compiler_on_demand() -> Iterator[None]:
    """Import torchvision, where it is needed, without torch's compiler.

    torchvision.ops.roi_align asks torch._dynamo, on GPUs only, whether it may compile, and
    imports it for that: 1.0 s and 127 MB for `import torchvision` on x86-64, 0.2 s and 17 MB
    without. What stands in for the module meanwhile fetches the real one when it is used.
    """
    name = "torch._dynamo.utils"
    stand_in = types.ModuleType(name, "Imports the real one when something of it is used.")

    def withdraw() -> None:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]

    def real(attribute: str) -> Any:
        if attribute.startswith("__"):  # Python looks for some of these in every module
            raise AttributeError(attribute)
        withdraw()
        return getattr(importlib.import_module(name), attribute)

    def is_compile_supported(device_type: Any) -> bool:
        return real("is_compile_supported")(device_type)

    vars(stand_in).update(__getattr__=real, is_compile_supported=is_compile_supported)
    sys.modules.setdefault(name, stand_in)  # the real one stays if it is there
    try:
        yield
    finally:
        withdraw()


# --- Data -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageSet:
    """Images in memory as they come from the disk: 8 bits a channel, not normalised."""

    images: Tensor  # uint8, (N, 3, H, W); channels-last in memory, the quickest to pick from
    labels: Tensor  # int64, (N,)
    classes: list[str]
    source: str  # "CIFAR-10", "images in /data", "synthetic images"

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray) -> "ImageSet":
        """Return the images at `indices` as a set of its own (a copy)."""
        chosen = torch.from_numpy(indices)
        images = self.images.permute(0, 2, 3, 1)[chosen].permute(0, 3, 1, 2)
        return ImageSet(images, self.labels[chosen], self.classes, self.source)


def load_data(
    data_dir: str | Path, split: str, image_size: int = IMAGE_SIZE, *, download: bool = False
) -> ImageSet:
    """Load the `train` or `test` images of `data_dir`, resized to `image_size` pixels.

    `data_dir` is a folder with `train/<class>/*` and `test/<class>/*`, or one that holds
    CIFAR-10 as torchvision keeps it; with `download` CIFAR-10 is fetched into it first.
    "synthetic" (or "synthetic:2000" for so many training images) needs no folder at all.

    Raises:
        TaskError: nothing usable is there.
        DownloadError: CIFAR-10 is not there and could not be downloaded.
    """
    if str(data_dir).split(":")[0] == "synthetic":
        return _synthetic(str(data_dir), split, image_size)
    data_dir = Path(data_dir).expanduser()
    if (data_dir / "train").is_dir() or (data_dir / "test").is_dir():
        return _image_folder(data_dir, split, image_size)
    if image_size != IMAGE_SIZE:
        raise TaskError(
            f"CIFAR-10 has 32x32 images, the model wants {image_size}x{image_size}; "
            "choose another --model or a --data_dir with your own images"
        )
    if download:
        with _one_at_a_time(data_dir):
            try:
                return _cifar10(data_dir, split)
            except TaskError:  # not there, or damaged
                _fetch_cifar10(data_dir)
    return _cifar10(data_dir, split)


def _cifar10(data_dir: Path, split: str) -> ImageSet:
    if not (data_dir / "cifar-10-batches-py").is_dir():
        if not data_dir.exists():
            what = "does not exist"
        elif not data_dir.is_dir():
            what = "is not a directory"
        elif not any(data_dir.iterdir()):
            what = "is empty"
        else:
            what = "has neither CIFAR-10 nor folders train/<class>, test/<class>"
        raise TaskError(
            f"data directory '{data_dir}' {what}; put your images there, or fetch "
            f"CIFAR-10 with: python utils.py --data_dir {data_dir}"
        )
    with _compiler_on_demand():
        from torchvision.datasets import CIFAR10

    try:
        cifar = CIFAR10(data_dir, split == "train")
    except RuntimeError as error:  # the MD5 sum of one of the files is wrong
        raise TaskError(
            f"CIFAR-10 in '{data_dir}' is damaged or incomplete; fetch it again with: "
            f"python utils.py --data_dir {data_dir}"
        ) from error
    images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2)  # as it lies in memory: no copy
    return ImageSet(images, torch.tensor(cifar.targets), list(cifar.classes), "CIFAR-10")


def _fetch_cifar10(data_dir: Path) -> None:
    """Download the archive, unless it is there whole, and unpack it."""
    with _compiler_on_demand():
        from torchvision.datasets import CIFAR10
        from torchvision.datasets.utils import download_url, extract_archive

    archive = data_dir / CIFAR10.filename
    progress = sys.stderr if sys.stderr.isatty() else io.StringIO()
    old_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # torchvision waits for ever for a server that falls silent
    try:
        with contextlib.redirect_stderr(progress):
            download_url(CIFAR10.url, data_dir, CIFAR10.filename, CIFAR10.tgz_md5)
    except (OSError, HTTPException, RuntimeError) as error:
        archive.unlink(missing_ok=True)  # only a part, or not what it should be
        reason = getattr(error, "reason", error)
        if isinstance(error, RuntimeError):
            reason = "what came is incomplete or altered (wrong MD5 sum)"
        raise DownloadError(
            f"cannot download CIFAR-10 from {CIFAR10.url} into '{data_dir}': {reason}; check the "
            "Internet connection, or use your own images or --data_dir synthetic"
        ) from error
    finally:
        socket.setdefaulttimeout(old_timeout)
    try:
        extract_archive(archive, data_dir)
    except OSError as error:
        raise TaskError(f"cannot unpack '{archive}': {error}; it takes 180 MB") from error


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process at a time fill `folder`; the others wait and find it filled.

    The folder is made if need be, and removed again if nothing came into it.
    """
    import fcntl

    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise TaskError(
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
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(
            path
            for path in (data_dir / split / name).rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
        )
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise TaskError(
            f"no images in '{data_dir / split}'; put some into {split}/<class>/ "
            f"({' '.join(sorted(IMAGE_SUFFIXES))})"
        )

    images = np.empty((len(paths), image_size, image_size, 3), np.uint8).transpose(0, 3, 1, 2)
    broken: dict[int, str] = {}

    def decode(first: int) -> None:
        for i in range(first, min(first + 8, len(paths))):
            try:
                images[i] = _decode(paths[i], image_size)
            except Exception as error:  # a broken file can raise nearly anything
                broken[i] = str(error)

    # Pillow decodes without the GIL: two cores read photos twice as fast as one. Tiny images
    # gain nothing, but in eights the threads cost them nothing either. Four threads at most,
    # because each may hold a photo in full (36 MB for 12 megapixels).
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(decode, range(0, len(paths), 8)))

    for i in sorted(broken)[:10]:
        print(f"broken image skipped: {paths[i]}: {broken[i]}", file=sys.stderr)
    if len(broken) == len(paths):
        raise TaskError(f"all {len(paths)} images in '{data_dir / split}' are broken; replace them")
    if broken:
        print(f"{len(broken)} of {len(paths)} images are broken and skipped", file=sys.stderr)
    good = [i for i in range(len(paths)) if i not in broken]
    if broken:
        for new, old in enumerate(good):  # in place: a Raspberry Pi may not hold a second copy
            images[new] = images[old]
    return ImageSet(
        torch.from_numpy(images[: len(good)]),
        torch.tensor(labels)[good],
        classes,
        f"images in {data_dir}",
    )


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
    if "exif" in image.info:  # a phone says which way is up
        image = ImageOps.exif_transpose(image)
    return np.asarray(image).transpose(2, 0, 1)


def class_names(data_dir: Path, split: str) -> list[str]:
    """Return the class folders of `split`, sorted, once they make sense.

    Raises:
        TaskError: no such split, fewer than two classes, or train and test that differ.
    """
    folders = {
        part: sorted(
            entry.name
            for entry in (data_dir / part).iterdir()
            if entry.is_dir() and not entry.name.startswith(".")
        )
        for part in ("train", "test")
        if (data_dir / part).is_dir()
    }
    if split not in folders:
        raise TaskError(f"'{data_dir}' has no folder {split}/ with a folder of images per class")
    if len(folders[split]) < 2:
        raise TaskError(
            f"'{data_dir / split}' has {len(folders[split])} class folder(s) "
            f"({', '.join(folders[split]) or 'none'}); at least 2 are needed to tell apart"
        )
    if len(folders) == 2 and folders["train"] != folders["test"]:
        odd = sorted(set(folders["train"]) ^ set(folders["test"]))
        raise TaskError(
            f"the classes in '{data_dir}' differ between train/ and test/: "
            f"{', '.join(odd)} in only one of them"
        )
    return folders[split]


def _synthetic(name: str, split: str, image_size: int) -> ImageSet:
    """Make noisy, shifted colour patterns of CIFAR-10's shape, the same on every machine.

    "synthetic" has CIFAR-10's 50,000 and 10,000 images, "synthetic:N" N and N // 5.
    """
    match = re.fullmatch(r"synthetic(?::([1-9]\d*))?", name)
    if not match:
        raise TaskError(f"no data set '{name}'; say synthetic or synthetic:2000")
    size = int(match[1] or 50_000)
    if split == "test":
        size = max(1, size // 5)
    rng = np.random.default_rng([0, split == "test"])
    # A coarse coloured grid per class, shifted at random and three quarters hidden by noise.
    patterns = np.random.default_rng(1).integers(0, 256, (10, 3, 4, 4), np.uint8)
    patterns = patterns.repeat(8, axis=2).repeat(8, axis=3)
    labels = rng.integers(0, 10, size)
    images = rng.integers(0, 256, (size, 3, 32, 32), np.uint8)
    shifts = rng.integers(0, 8, (size, 2))
    shifted = np.array(
        [[np.roll(patterns, (y, x), (2, 3)) // 4 for x in range(8)] for y in range(8)]
    )  # (8, 8, 10, 3, 32, 32)
    for start in range(0, size, 1000):  # 1000 at a time, for memory's sake
        part = slice(start, start + 1000)
        pattern = shifted[shifts[part, 0], shifts[part, 1], labels[part]]
        images[part] = images[part] // 4 * 3 + pattern
    tensor = torch.from_numpy(images)
    if image_size != 32:
        tensor = F.interpolate(tensor, size=(image_size, image_size))
    classes = [f"pattern {i}" for i in range(10)]
    tensor = tensor.contiguous(memory_format=torch.channels_last)
    return ImageSet(tensor, torch.from_numpy(labels), classes, "synthetic images")


# --- Partitions -----------------------------------------------------------------------


def partition(labels: np.ndarray, num_partitions: int, scheme: str, seed: int) -> list[np.ndarray]:
    """Split a data set that every device has in full into disjoint parts.

    Args:
        labels: the class of each example, (N,).
        scheme: "iid", or "dirichlet:ALPHA" for skewed classes: each part draws its own
            mix of classes from Dirichlet(ALPHA * p) and takes an equal share of the
            examples by that mix (Hsu et al. 2019, arXiv:1909.06335). Small ALPHA: nearly
            one class a part; large: nearly iid. p is the mix of what earlier parts left;
            with the mix of the whole the last part would be odd even for a large ALPHA.
            Not "none", with which a device uses all that it has and nothing is split.
        seed: the same seed gives the same parts on every machine.

    Returns:
        Sorted indices into `labels`, one array a part; sizes differ by 1 at most, and
        together they cover every example once.

    Raises:
        TaskError: no such scheme, or a part would be empty.
    """
    kind, alpha = parse_partition(scheme)
    if kind == "none":
        raise ValueError("partition 'none' splits nothing; use the data set as it is")
    if not 1 <= num_partitions <= len(labels):
        raise TaskError(
            f"cannot split {len(labels)} images into {num_partitions} parts; "
            f"take 1 to {len(labels)}, or more images"
        )
    rng = np.random.default_rng(seed)
    sizes = [len(part) for part in np.array_split(np.empty(len(labels)), num_partitions)]
    if kind == "iid":
        order = rng.permutation(len(labels))
        return [np.sort(part) for part in np.split(order, np.cumsum(sizes)[:-1])]

    classes = np.unique(labels)
    pools = [rng.permutation(np.flatnonzero(labels == c)) for c in classes]
    left = np.array([len(pool) for pool in pools])
    parts = []
    for size in sizes:
        mix, taken = np.zeros(len(classes)), np.zeros_like(left)
        while (missing := size - taken.sum()) > 0:
            rest = left - taken
            mix[rest == 0] = 0
            if mix.sum() == 0:  # at first, and when the classes that this part likes are used up
                mix[rest > 0] = rng.dirichlet(alpha * rest[rest > 0] / rest.sum())
            draw = rng.multinomial(missing, mix / mix.sum())
            taken += np.minimum(draw, left - taken)
        parts.append(
            np.sort(
                np.concatenate(
                    [pool[n - t : n] for pool, n, t in zip(pools, left, taken, strict=True)]
                )
            )
        )
        left -= taken
    return parts


def parse_partition(scheme: str) -> tuple[str, float]:
    """Return ("iid", 0), ("none", 0) or ("dirichlet", ALPHA) for `scheme`."""
    kind, _, value = scheme.partition(":")
    if kind in ("iid", "none") and not value:
        return kind, 0.0
    if kind == "dirichlet":
        with contextlib.suppress(ValueError):
            if 1e-6 <= (alpha := float(value)) <= 1e6:  # beyond, doubles fail and nothing changes
                return kind, alpha
    raise TaskError(
        f"no partition '{scheme}'; say iid, none or dirichlet:0.5 (any number from 1e-6 to 1e6)"
    )


# --- Batches, training, evaluation ----------------------------------------------------


def normalise(images: Tensor) -> Tensor:
    """Turn uint8 images (N, 3, H, W) into floats with mean 0 and deviation 1 a channel.

    The result lies channels-last in memory, which convolutions read faster: a step of Net
    takes 0.85 of the time with one x86-64 thread and 0.75 with two.
    """
    n, channels, height, width = images.shape
    rows = images.permute(0, 2, 3, 1).reshape(n, height, width * channels)
    # Whole rows against a row of means: broadcasting 3 numbers takes 2.5 times as long.
    mean = torch.tensor(MEAN, device=images.device).repeat(width) * 255
    scale = 1 / (torch.tensor(STD, device=images.device).repeat(width) * 255)
    floats = rows.float().sub_(mean).mul_(scale)
    return floats.view(n, height, width, channels).permute(0, 3, 1, 2)


class TrainLoader:
    """Shuffled batches of normalised floats, each image flipped left-right by a coin.

    Does what a DataLoader with ToTensor, RandomHorizontalFlip and Normalize does, but
    several batches at a time on images that are decoded already; of the data set itself
    there is never a copy in floats. The last partial batch is dropped.
    """

    def __init__(
        self, data: ImageSet, batch_size: int, seed: int = 0, device: str = "cpu", flip: bool = True
    ) -> None:
        if len(data) < batch_size:
            raise TaskError(
                f"{len(data)} images do not fill a batch of {batch_size}; lower --batch_size"
            )
        self.pixels = data.images.permute(0, 2, 3, 1).contiguous().to(device)  # (N, H, W, 3)
        self.labels = data.labels.to(device)
        self.batch_size = batch_size
        self.flip = flip
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels), generator=self.generator)
        coins = torch.rand(len(self.labels), generator=self.generator) < 0.5
        used = len(self) * self.batch_size
        # Blocks of about 1 MB still lie in the processor's cache when the step reads them.
        block = self.batch_size * max(1, 2**20 // self.pixels[: self.batch_size].nbytes)
        for chosen, coin in zip(order[:used].split(block), coins[:used].split(block), strict=True):
            chosen = chosen.to(self.pixels.device)
            pixels = self.pixels.index_select(0, chosen)
            if self.flip:
                mirrored = coin.nonzero().squeeze(1).to(pixels.device)
                pixels.index_copy_(0, mirrored, pixels.index_select(0, mirrored).flip(2))
            yield from zip(
                normalise(pixels.permute(0, 3, 1, 2)).split(self.batch_size),
                self.labels[chosen].split(self.batch_size),
                strict=True,
            )


class SGD:
    """Nesterov SGD; the same numbers as torch.optim.SGD(nesterov=True), at a lower price.

    The first optimizer of torch.optim imports torch._dynamo and SymPy: 867 modules, 105 MB
    and 2 seconds on an x86-64 machine, of which a Raspberry Pi has none to spare. Here all
    parameters become views of one tensor, so a step is four operations however many layers
    there are: 3 to 4 % of a step of Net or PiNet less than with torch's lists of tensors.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], momentum: float) -> None:
        self.momentum = momentum
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []  # weights, gradient, velocity
        self.gradients: list[tuple[nn.Parameter, Tensor]] = []  # where each one's belongs
        kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for p in parameters:
            if p.requires_grad:
                kinds.setdefault((p.dtype, p.device), []).append(p)
        for alike in kinds.values():
            weights = torch.cat([p.detach().flatten() for p in alike])
            gradient = torch.zeros_like(weights)
            self.parts.append((weights, gradient, torch.zeros_like(weights)))
            sizes = [p.numel() for p in alike]
            views = zip(alike, weights.split(sizes), gradient.split(sizes), strict=True)
            for p, w, g in views:
                p.data, p.grad = w.view_as(p), g.view_as(p)
                self.gradients.append((p, p.grad))

    def zero_grad(self) -> None:
        for _, gradient, _ in self.parts:
            gradient.zero_()

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move the weights w with velocity v: v = mu v + grad, w -= lr (grad + mu v)."""
        for p, g in self.gradients:
            if p.grad is not g:  # by net.zero_grad(), say
                g.copy_(p.grad) if p.grad is not None else g.zero_()
                p.grad = g
        for weights, gradient, velocity in self.parts:
            velocity.mul_(self.momentum).add_(gradient)
            weights.add_(gradient, alpha=-lr).add_(velocity, alpha=-lr * self.momentum)


WEIGHTS, ACTIVATIONS, REST = 6, 1.3, 20e6  # see `training_bytes`


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
    epochs: int = 1,
    lr: float = LR,
    lr_end: float | None = None,
    momentum: float = 0.9,
    proximal_mu: float = 0.0,
    max_seconds: float = math.inf,
    device: str = "cpu",
    log: Callable[[str], None] = print,
) -> Training:
    """Train `net` in place with Nesterov SGD.

    Args:
        lr, lr_end: the learning rate falls linearly from `lr` to `lr_end` over all the
            steps of this call (constant without `lr_end`); the server lowers both from
            round to round.
        proximal_mu: weight of FedProx's term mu/2 * ||w - w_global||^2, w_global being
            the weights that came in (Li et al. 2018, arXiv:1812.06127).
        max_seconds: stop when so many are over, after one step at least. The learning rate
            falls by time then, if that is ahead of the steps.
    """
    net.to(device).train()
    optimizer = SGD(net.parameters(), momentum)
    lr_end = lr if lr_end is None else lr_end
    global_weights = [p.detach().clone() for p in net.parameters()] if proximal_mu else []
    batches = len(trainloader)
    log(f"Training {epochs} epoch(s) w/ {batches} batches each")
    steps = 0
    began = time.perf_counter()
    for _ in range(epochs):
        start = shown = time.perf_counter()
        if steps and start - began >= max_seconds:
            break
        total_loss = torch.zeros((), device=device)
        for batch, (images, labels) in enumerate(trainloader):
            spent = (time.perf_counter() - began) / max_seconds
            if batch and spent >= 1:
                break
            done = max(steps / (epochs * batches), spent)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            if proximal_mu:  # the gradient of the term, written out
                for p, w in zip(net.parameters(), global_weights, strict=True):
                    if p.grad is not None:
                        p.grad.add_(p.detach() - w, alpha=proximal_mu)
            optimizer.step(lr + (lr_end - lr) * min(done, 1.0))
            total_loss += loss.detach()
            steps += 1
            if sys.stdout.isatty() and time.perf_counter() - shown > 0.3:
                shown = time.perf_counter()
                print(f"\r{batch + 1}/{batches} batches  loss {loss:.3f}\033[K", end="", flush=True)
        if sys.stdout.isatty():
            print("\r\033[K", end="", flush=True)
        seconds = time.perf_counter() - start
        if steps % batches:
            log(f"Stopped after {steps} batches: {max_seconds:g} seconds are over")
            break
        log(f"Epoch took: {seconds:.2f} seconds")
    return Training(
        loss=float(total_loss) / (steps % batches or batches),
        num_examples=min(steps, batches) * trainloader.batch_size,
        steps=steps,
        seconds=time.perf_counter() - began,
    )


def training_bytes(net: nn.Module, data: ImageSet, batch_size: int, device: str = "cpu") -> int:
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
    images = normalise(data.images[:2].to(device))
    own = {t.untyped_storage().data_ptr() for t in net.state_dict().values()}
    saved: dict[int, int] = {}

    def count(t: Tensor) -> Tensor:
        storage = t.untyped_storage()  # which several saved tensors may share
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        output = net(images)
    activations = sum(saved.values()) * batch_size / len(images)
    del output  # the graph kept the storages alive, so that no two had one address
    for buffer, before in zip(net.buffers(), buffers, strict=True):
        buffer.copy_(before)
    weights = sum(t.nbytes for t in net.state_dict().values())
    return int(WEIGHTS * weights + ACTIVATIONS * activations + REST)


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy and accuracy (0 to 1) over a data set, and per class.

    A class without images has NaN for both.
    """

    loss: float
    accuracy: float
    class_loss: list[float]
    class_accuracy: list[float]


@torch.inference_mode()
def test(net: nn.Module, data: ImageSet, device: str = "cpu", batch_size: int = 100) -> Evaluation:
    """Evaluate `net` on all of `data`; with ResNet18 each image of a batch takes 1 MB."""
    net.to(device).eval()
    losses, correct = [], []
    for images, labels in zip(
        data.images.split(batch_size), data.labels.split(batch_size), strict=True
    ):
        scores = net(normalise(images.to(device)))
        labels = labels.to(device)
        losses.append(F.cross_entropy(scores, labels, reduction="none").cpu())
        correct.append((scores.argmax(1) == labels).float().cpu())
    loss, hit = torch.cat(losses).double(), torch.cat(correct).double()
    of_class = [data.labels == c for c in range(len(data.classes))]
    return Evaluation(
        loss=loss.mean().item(),
        accuracy=hit.mean().item(),
        class_loss=[loss[mask].mean().item() for mask in of_class],
        class_accuracy=[hit[mask].mean().item() for mask in of_class],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="fetch CIFAR-10 if it is not there, and list the data and the models"
    )
    parser.add_argument(
        "--data_dir",
        "--data-dir",
        default="data",
        help="where to, or a folder with train/<class>/* and test/<class>/* (default: data)",
    )
    args = parser.parse_args()
    # A device may have images to train on alone, the server some to test on alone.
    folders = [split for split in ("train", "test") if Path(args.data_dir, split).is_dir()]
    try:
        for split in folders or ["train", "test"]:
            data = load_data(args.data_dir, split, download=True)
            print(f"{data.source}: {len(data):,} {split} images of {len(data.classes)} classes")
    except TaskError as error:
        print(f"utils.py: {error}", file=sys.stderr)
        sys.exit(3 if isinstance(error, DownloadError) else 1)
    for name in MODELS:
        weights = get_weights(build_model(name, len(data.classes)))
        numbers, size = sum(w.size for w in weights), sum(w.nbytes for w in weights)
        print(f"{name}: {numbers:,} numbers, {size:,} bytes")


if __name__ == "__main__":
    main()
